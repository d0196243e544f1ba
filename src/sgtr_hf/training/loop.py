"""The training loop, the same for detection and scene graphs, on one process or many."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.streaming_dataset import SceneGraphStream
from ..data.training_dataset import Collator, SceneGraphDataset, prepare_worker
from ..metrics.frequency_baseline import FrequencyBaseline
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..visualization.training_curves import draw_training_curves
from .checkpoints import Progress, find_checkpoint, save_checkpoint, save_model
from .detector_cache import CachedDetectorDataset, collate_cached
from .evaluation import Evaluator, evaluate
from .interruption import Interruption
from .optimization import make_optimizer, make_schedule
from .recipe import Recipe
from .run_log import LossMeter, RunLog
from .run_record import describe_run
from .setup_run import (
    make_image_processor,
    make_model,
    make_splits,
    with_predicate_frequencies,
)


logger = logging.getLogger(__name__)

# The figure by which the best model is kept. F is the harmonic mean of R and mR.
BEST_FIGURE = {"detection": "AP", "scene_graph": "F@50"}


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to train, on what, and how.
        scene_graph_class: Class of a scene graph model, as for `make_model`.

    Raises:
        ValueError: If the recipe does not fit the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        scene_graph_class: type[SgtrForSceneGraphGeneration] = SgtrForSceneGraphGeneration,
    ) -> None:
        self.recipe, self.settings = recipe, recipe.training
        if self.settings.num_threads is not None:
            torch.set_num_threads(self.settings.num_threads)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=self.settings.gradient_accumulation_steps,
            mixed_precision=self.settings.mixed_precision,
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=self.settings.seed
            ),
        )
        # Each process draws its own noise, the weights start the same (DDP broadcasts them).
        set_seed(self.settings.seed, device_specific=True)
        # Of the code that runs, whatever is committed meanwhile.
        self.description = describe_run(recipe, self.accelerator.num_processes)
        self.output_dir = Path(self.settings.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, self.settings.resume)
        self.splits = make_splits(recipe.data, self.settings.seed)
        self.image_processor = make_image_processor(recipe)
        self.progress = Progress()
        self.meter = LossMeter()
        self._prepare(scene_graph_class)
        self.baseline = self._fit_baseline()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(self.output_dir / "log.jsonl", enabled=self.accelerator.is_main_process)

    def _prepare(self, scene_graph_class: type[SgtrForSceneGraphGeneration]) -> None:
        model = make_model(
            with_predicate_frequencies(self.recipe, self.splits.train),
            self.splits.train.id2label,
            self.splits.train.id2predicate,
            scene_graph_class,
        )
        if self.settings.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.average: AveragedModel | None = None
        if self.settings.ema_decay > 0:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema_decay)
            ).to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.average)
        optimizer = make_optimizer(model, self.settings)
        loader = self._training_loader(model)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        is_stream = isinstance(self.train_images, SceneGraphStream)
        self.loader: Any = loader if is_stream else self.accelerator.prepare(loader)
        if len(self.loader) == 0:
            raise ValueError(
                f"The training split has {self.splits.train.num_images} images, too few for a "
                f"batch of {self.settings.batch_size} on each of "
                f"{self.accelerator.num_processes} processes; lower `training.batch_size`."
            )
        self.updates_per_epoch = -(-len(self.loader) // self.settings.gradient_accumulation_steps)
        self.num_updates = self.settings.max_steps or self.updates_per_epoch * (
            self.settings.epochs or 0
        )
        # Not prepared: accelerate would advance it once a process.
        self.schedule = make_schedule(self.optimizer.optimizer, self.settings, self.num_updates)
        self.accelerator.register_for_checkpointing(self.schedule, self.progress)

    def _training_loader(self, model: PreTrainedModel) -> DataLoader[Any]:
        """Read images or, with a cache, what the detector made of them."""
        images = self.splits.train
        self.train_images: SceneGraphDataset | SceneGraphStream | CachedDetectorDataset = images
        if isinstance(images, SceneGraphStream):
            return self._streaming_loader(images)
        if not self.settings.cached_epochs or not isinstance(model, SgtrForSceneGraphGeneration):
            return self._loader(images, shuffle=True)
        cache = CachedDetectorDataset(
            self.output_dir / "detector-cache", images, self.settings.cached_epochs
        )
        cache.prepare(
            model.to(self.accelerator.device),
            Collator(self.image_processor, with_references=False),
            self.accelerator,
            self.recipe.data.num_workers,
        )
        self.train_images = cache
        return DataLoader(
            cache,
            batch_size=self.settings.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=collate_cached,
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def _streaming_loader(self, images: SceneGraphStream) -> DataLoader[Any]:
        """Read this process's shards; accelerate, which would split them again, only moves them."""
        accelerator = self.accelerator
        part = images.for_training(
            accelerator.process_index, accelerator.num_processes, self.settings.batch_size
        )
        self.train_images = part
        loader: DataLoader[Any] = prepare_data_loader(
            DataLoader(
                part,
                batch_size=self.settings.batch_size,
                drop_last=True,
                num_workers=part.num_useful_workers(self.recipe.data.num_workers),
                collate_fn=Collator(self.image_processor, with_references=False),
                worker_init_fn=prepare_worker,
                generator=torch.Generator().manual_seed(self.settings.seed),
            ),
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )
        return loader

    def _fit_baseline(self) -> FrequencyBaseline | None:
        if self.recipe.task == "detection":
            return None
        train = self.splits.train
        baseline = FrequencyBaseline(len(train.id2label), len(train.id2predicate))
        return baseline.fit(train.references())

    def _loader(self, dataset: Any, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.settings.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.recipe.data.num_workers,
            collate_fn=Collator(self.image_processor, with_references=not shuffle),
            worker_init_fn=prepare_worker,
            # Its own, or each start of a loader would draw from the generator of the noise, and
            # a resumed run, which starts one more, would go on with other noise.
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, and return the figures of the last evaluation.

        SIGTERM or Ctrl-C saves a checkpoint, from which the same command goes on.

        Raises:
            FloatingPointError: If loss or gradient is not finite.
            KeyboardInterrupt: After a signal, once the checkpoint is saved.
        """
        self._begin()
        figures: dict[str, Any] = {}
        with Interruption(self.accelerator) as interruption:
            if self.progress.updates and self._is_due(self.settings.evaluate_every):
                # The checkpoint was saved before the evaluation, which may not have ended.
                figures = self._evaluate()
            for _ in self._updates():
                if interruption.is_requested():
                    self._save_checkpoint()
                    raise KeyboardInterrupt(
                        f"Stopped after update {self.progress.updates}; the same command resumes."
                    )
                if self._is_due(self.settings.checkpoint_every):
                    self._save_checkpoint()
                if self._is_due(self.settings.evaluate_every):
                    figures = self._evaluate()
        self._finish(figures)
        return figures

    def _begin(self) -> None:
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))
            logger.info("Resumed from %s.", self.checkpoint)
        self.log.rewind(self.progress.updates, self.progress.seconds)
        if self.accelerator.is_main_process:
            recipe = yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False)
            (self.output_dir / "recipe.yaml").write_text(recipe)

    def _is_due(self, epochs: float) -> bool:
        """Tell whether something done every so many epochs is due after this update."""
        interval = max(round(epochs * self.updates_per_epoch), 1)
        return self.progress.updates % interval == 0 or self.progress.updates == self.num_updates

    def _updates(self) -> Iterator[None]:
        """Train, and give way after each update."""
        progress = self.progress
        while progress.updates < self.num_updates:
            self.train_images.epoch = progress.epoch
            for batch in self._batches():
                self._step(batch)
                progress.batches += 1
                if not self.accelerator.sync_gradients:
                    continue
                progress.updates += 1
                if progress.batches == len(self.loader):
                    progress.epoch, progress.batches = progress.epoch + 1, 0
                self._after_update()
                yield
                self.meter.start_clock()
                if progress.updates == self.num_updates:
                    break

    def _batches(self) -> Iterator[dict[str, Any]]:
        """The batches of the epoch that are still to come."""
        self.loader.set_epoch(self.progress.epoch)
        loader, done = self.loader, self.progress.batches
        if done:
            loader = self.accelerator.skip_first_batches(loader, done)
        yield from tqdm(
            loader,
            initial=done,
            total=len(self.loader),
            desc=f"epoch {self.progress.epoch + 1}",
            disable=not self.accelerator.is_local_main_process,
        )

    def _step(self, batch: dict[str, Any]) -> None:
        self.model.train()
        with self.accelerator.accumulate(self.model):
            outputs = self.model(**batch)
            losses = {"loss": outputs.loss, **outputs.loss_dict}
            self._check_finite(outputs.loss, losses)
            self.accelerator.backward(outputs.loss)
            if self.accelerator.sync_gradients:
                limit = self.settings.gradient_clip_norm or float("inf")
                losses["gradient_norm"] = self.accelerator.clip_grad_norm_(
                    self.model.parameters(), limit
                )
                self._check_finite(losses["gradient_norm"], losses)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.meter.add(losses, len(batch["labels"]))

    def _after_update(self) -> None:
        rate = self.schedule.get_last_lr()[-1]
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        if self.progress.updates % self.settings.log_every == 0:
            values = {**self.meter.summarize(), "learning_rate": rate}
            self.log.write("train", self.progress.updates, self._epoch(), values)

    def _epoch(self) -> float:
        return self.progress.epoch + self.progress.batches / len(self.loader)

    def _check_finite(self, value: Tensor, losses: dict[str, Tensor]) -> None:
        """Stop before weights, moments and checkpoints are spoilt."""
        if not torch.isfinite(value):
            entries = ", ".join(f"{name} {loss.item():.3g}" for name, loss in losses.items())
            raise FloatingPointError(
                f"Loss or gradient is not finite after update {self.progress.updates} ({entries}). "
                "Lower `training.learning_rate` or `training.gradient_clip_norm`, check the data, "
                "or use `training.mixed_precision=no`; the last checkpoint is as it was."
            )

    def _evaluated_model(self) -> PreTrainedModel:
        """The moving average where there is one: it is evaluated and saved."""
        model = self.accelerator.unwrap_model(self.model)
        return model if self.average is None else _unwrap(self.average)

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate each process's share of the validation split, and gather."""
        validation = self.splits.validation
        shares = range(
            self.accelerator.process_index, len(validation), self.accelerator.num_processes
        )
        evaluator = Evaluator(
            self.image_processor, validation.id2label, validation.id2predicate, self.baseline
        )
        loader = self._loader(Subset(validation, list(shares)), shuffle=False)
        evaluate(self._evaluated_model(), loader, evaluator)
        evaluator.gather()
        figures = evaluator.compute()
        if self.accelerator.is_main_process:
            flat = {name: value for name, value in figures.items() if name != "details"}
            self.log.write("validation", self.progress.updates, self._epoch(), flat)
            logger.info("Update %d: %s", self.progress.updates, flat)
            draw_training_curves(self.log.path, self.output_dir / "curves.png")
        self._keep_best(figures[BEST_FIGURE[self.recipe.task]])
        return figures

    def _keep_best(self, figure: float | None) -> None:
        best = self.progress.best
        if figure is None or (best is not None and figure <= best):
            return
        self.progress.best = figure
        if self.accelerator.is_main_process:
            save_model(self._evaluated_model(), self.image_processor, self.output_dir / "best")

    def _save_checkpoint(self) -> None:
        self.progress.seconds = self.log.seconds
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.progress.updates,
            self.settings.keep_checkpoints,
        )

    def _finish(self, figures: dict[str, Any]) -> None:
        """Write the model as safetensors, its image processor, and how it came about."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        save_model(self._evaluated_model(), self.image_processor, self.output_dir / "final")
        batch_size = self.settings.batch_size * self.settings.gradient_accumulation_steps
        record = {
            "figures": figures,
            "updates": self.progress.updates,
            "images_seen": self.progress.updates * batch_size * self.accelerator.num_processes,
            "training_minutes": round(self.log.seconds / 60, 1),
            **self.description,
        }
        (self.output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _unwrap(average: AveragedModel) -> PreTrainedModel:
    module: nn.Module = average.module
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"The averaged model must be a PreTrainedModel, got {type(module)}.")
    return module
