"""The training loop, the same for detection and scene graphs, on one process or many."""

import json
import logging
import platform
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PreTrainedModel

from .._version import __version__
from ..data.training_dataset import Collator, seed_torch_worker
from ..metrics.frequency_baseline import FrequencyBaseline
from ..visualization.training_curves import draw_training_curves
from .checkpoints import Progress, find_checkpoint, save_checkpoint
from .evaluation import Evaluator, evaluate
from .optimization import make_optimizer, make_schedule
from .recipe import Recipe
from .run_log import RunLog
from .setup_run import make_image_processor, make_model, make_splits


logger = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to train, on what, and how.

    Raises:
        ValueError: If the recipe does not fit the data.
    """

    def __init__(self, recipe: Recipe) -> None:
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
        self.output_dir = Path(self.settings.output_dir)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(self.output_dir / "log.jsonl", enabled=self.accelerator.is_main_process)
        self.splits = make_splits(recipe.data, self.settings.seed)
        self.image_processor = make_image_processor(recipe)
        self.progress = Progress()
        self._prepare()

    def _prepare(self) -> None:
        names = (self.splits.train.id2label, self.splits.train.id2predicate)
        model = make_model(self.recipe, *names)
        if self.settings.gradient_checkpointing:
            model.activation_checkpointing_enable()
        self.average: AveragedModel | None = None
        if self.settings.ema_decay > 0:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema_decay)
            ).to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.average)
        optimizer = make_optimizer(model, self.settings)
        loader = self._loader(self.splits.train, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        updates_per_epoch = -(-len(self.loader) // self.settings.gradient_accumulation_steps)
        self.num_updates = updates_per_epoch * self.settings.epochs
        # Not prepared: accelerate would advance it once a process.
        self.schedule = make_schedule(self.optimizer.optimizer, self.settings, self.num_updates)
        self.accelerator.register_for_checkpointing(self.schedule, self.progress)
        self.baseline: FrequencyBaseline | None = None
        if self.recipe.task == "scene_graph":
            self.baseline = FrequencyBaseline(*map(len, names)).fit(self.splits.train.references())

    def _loader(self, dataset: Any, *, shuffle: bool) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=self.settings.batch_size,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.recipe.data.num_workers,
            collate_fn=Collator(self.image_processor),
            worker_init_fn=seed_torch_worker,
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, and return the figures of the last evaluation.

        SIGTERM or Ctrl-C saves a checkpoint, from which the same command goes on.

        Raises:
            ValueError: If the loss is not finite.
        """
        checkpoint = find_checkpoint(self.output_dir, self.settings.resume)
        if checkpoint is not None:
            self.accelerator.load_state(str(checkpoint))
            logger.info("Resumed from %s at update %d.", checkpoint, self.progress.updates)
        figures: dict[str, Any] = {}
        with _Interruption() as interruption:
            while self.progress.epoch < self.settings.epochs:
                self._train_epoch(interruption)
                if interruption.requested:
                    self._save_checkpoint()
                    raise KeyboardInterrupt(
                        f"Stopped after update {self.progress.updates}; the same command resumes."
                    )
                epoch, is_last = self.progress.epoch, self.progress.epoch == self.settings.epochs
                if is_last or epoch % self.settings.checkpoint_every == 0:
                    self._save_checkpoint()
                if is_last or epoch % self.settings.evaluate_every == 0:
                    figures = self._evaluate()
        if not figures:
            figures = self._evaluate()
        self._save_final(figures)
        return figures

    def _train_epoch(self, interruption: "_Interruption") -> None:
        self.model.train()
        self.splits.train.epoch = self.progress.epoch
        for batch in self._batches():
            started = time.monotonic()
            with self.accelerator.accumulate(self.model):
                outputs = self.model(
                    batch["pixel_values"], batch.get("pixel_mask"), labels=batch["labels"]
                )
                self._check_loss(outputs.loss, outputs.loss_dict)
                self.accelerator.backward(outputs.loss)
                if self.accelerator.sync_gradients and self.settings.gradient_clip_norm > 0:
                    self.accelerator.clip_grad_norm_(
                        self.model.parameters(), self.settings.gradient_clip_norm
                    )
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.progress.batches += 1
            if self.accelerator.sync_gradients:
                self._after_update(outputs.loss, outputs.loss_dict)
            self.progress.seconds += time.monotonic() - started
            if interruption.requested:
                return
        self.progress.epoch += 1
        self.progress.batches = 0

    def _batches(self) -> Iterator[dict[str, Any]]:
        """The batches of the epoch that are still to come."""
        self.loader.set_epoch(self.progress.epoch)
        loader = self.loader
        if self.progress.batches:
            loader = self.accelerator.skip_first_batches(loader, self.progress.batches)
        yield from tqdm(
            loader,
            initial=self.progress.batches,
            total=len(self.loader),
            desc=f"epoch {self.progress.epoch + 1}/{self.settings.epochs}",
            disable=not self.accelerator.is_local_main_process,
        )

    def _after_update(self, loss: Tensor, losses: dict[str, Tensor]) -> None:
        rate = self.schedule.get_last_lr()[-1]
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        self.progress.updates += 1
        if self.progress.updates % self.settings.log_every == 0:
            epoch = self.progress.epoch + self.progress.batches / len(self.loader)
            values = {"loss": loss.item(), "learning_rate": rate}
            values |= {name: value.item() for name, value in losses.items()}
            self.log.write("train", self.progress.updates, epoch, values)

    def _check_loss(self, loss: Tensor, losses: dict[str, Tensor]) -> None:
        if not torch.isfinite(loss):
            entries = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
            raise ValueError(
                f"The loss is {loss.item()} after update {self.progress.updates} ({entries}). "
                "Lower `training.learning_rate` or `training.gradient_clip_norm`, check the data, "
                "or use `training.mixed_precision=no`; the last checkpoint is as it was."
            )

    def _evaluated_model(self) -> PreTrainedModel:
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
        flat = {name: value for name, value in figures.items() if name != "details"}
        self.log.write("validation", self.progress.updates, float(self.progress.epoch), flat)
        if self.accelerator.is_main_process:
            logger.info("Epoch %d: %s", self.progress.epoch, flat)
            draw_training_curves(self.log.path, self.output_dir / "curves.png")
        return figures

    def _save_checkpoint(self) -> None:
        save_checkpoint(
            self.accelerator,
            self.output_dir,
            self.progress.updates,
            self.settings.keep_checkpoints,
        )

    def _save_final(self, figures: dict[str, Any]) -> None:
        """Write the model as safetensors, its image processor, and how it came about."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        final = self.output_dir / "final"
        self._evaluated_model().save_pretrained(final)
        self.image_processor.save_pretrained(final)
        images = self.progress.updates * self.settings.gradient_accumulation_steps
        images *= self.settings.batch_size * self.accelerator.num_processes
        record = {
            "figures": figures,
            "images_seen": images,
            "training_minutes": round(self.progress.seconds / 60, 1),
            "seed": self.settings.seed,
            "processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "processor": platform.processor() or platform.machine(),
            "versions": {
                "sgtr_hf": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        (self.output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")


class _Interruption:
    """Notes SIGTERM and Ctrl-C, so that the running step can finish."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True


def _unwrap(average: AveragedModel) -> PreTrainedModel:
    module: nn.Module = average.module
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"The averaged model must be a PreTrainedModel, got {type(module)}.")
    return module
