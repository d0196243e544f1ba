"""The training loop, the same for every task, on one process or many."""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from ..visualization.training_curves import draw_training_curves
from .checkpoints import Progress, find_checkpoint, save_checkpoint, save_model
from .interruption import Interruption, TrainingStopped
from .progress_bar import ProgressBar
from .recipe import Recipe
from .run_log import LossMeter, RunLog
from .run_record import describe_run
from .sharding import gather_weights, prepare_sharding
from .tasks.task_choice import make_task
from .tasks.training_task import RunLength, TrainingTask
from .trackers import check_trackers, start_trackers


logger = logging.getLogger(__name__)


class Trainer:
    """One run of a recipe.

    Args:
        recipe: What to train, on what, and how.
        open_task: Makes the task; another than the recipe's own for another model, to compare with.

    Raises:
        ValueError: If the recipe does not fit the data.
    """

    def __init__(
        self,
        recipe: Recipe,
        open_task: Callable[[Recipe, Accelerator], TrainingTask] = make_task,
    ) -> None:
        self.recipe, self.settings = recipe, recipe.training
        if self.settings.num_threads is not None:
            torch.set_num_threads(self.settings.num_threads)
        check_trackers(self.settings.trackers)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=self.settings.gradient_accumulation_steps,
            mixed_precision=self.settings.mixed_precision,
            log_with=list(self.settings.trackers) or None,
            project_dir=self.settings.output_dir,
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=self.settings.seed
            ),
        )
        prepare_sharding(self.accelerator, self.settings)
        # Each process draws its own noise, the weights start the same (DDP broadcasts them).
        set_seed(self.settings.seed, device_specific=True)
        # Of the code that runs, whatever is committed meanwhile.
        self.description = describe_run(recipe, self.accelerator.num_processes)
        self.output_dir = Path(self.settings.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, self.settings.resume)
        self.task = open_task(recipe, self.accelerator)
        self.progress = Progress()
        self.meter = LossMeter()
        self._prepare()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(
            self.output_dir / "log.jsonl",
            enabled=self.accelerator.is_main_process,
            track=self.accelerator.log,
        )

    def _prepare(self) -> None:
        model = self.task.make_model()
        _check_weights(model)
        if self.settings.gradient_checkpointing:
            # The older name is all that transformers 5.20 has, and a warning since 5.21.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        self.average: AveragedModel | None = None
        if self.settings.ema_decay > 0:
            self.average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(self.settings.ema_decay)
            ).to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.average)
        optimizer = self.task.make_optimizer(model)
        self.loader = self.task.training_loader(model)
        if self.settings.compile_backend is not None:
            # In place, so that names of weights and the saved model stay as they are.
            model.compile(backend=self.settings.compile_backend)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        # As a batch that is not full, a group of batches that is not is dropped: an update is of
        # the same images however they are divided among processes and batches.
        self.updates_per_epoch = len(self.loader) // self.settings.gradient_accumulation_steps
        if self.updates_per_epoch == 0:
            raise ValueError(
                f"The training split has {self.task.num_images} images, too few for "
                f"{self.settings.gradient_accumulation_steps} batches of "
                f"{self.settings.batch_size} on each of {self.accelerator.num_processes} "
                "processes; lower `training.batch_size` or "
                "`training.gradient_accumulation_steps`."
            )
        self.num_updates = self.settings.max_steps or self.updates_per_epoch * (
            self.settings.epochs or 0
        )
        # Not prepared: accelerate would advance it once a process.
        self.schedule = self.task.make_schedule(
            self.optimizer.optimizer, RunLength(self.num_updates, self.updates_per_epoch)
        )
        self.accelerator.register_for_checkpointing(self.schedule, self.progress)

    def run(self) -> dict[str, Any]:
        """Train to the end, and return the figures of the last evaluation.

        SIGTERM or Ctrl-C saves a checkpoint, from which the same command goes on.

        Raises:
            FloatingPointError: If loss or gradient is not finite.
            TrainingStopped: After a signal, once the checkpoint is saved.
            OSError: If a checkpoint cannot be written.
        """
        self._begin()
        figures: dict[str, Any] = {}
        with Interruption(self.accelerator) as interruption:
            if self.progress.updates and self._is_due(self.settings.evaluate_every):
                # The checkpoint was saved before the evaluation, which may not have ended.
                figures = self._evaluate()
            for _ in self._updates():
                number = interruption.requested()
                if number is not None:
                    self._save_checkpoint()
                    raise TrainingStopped(self.progress.updates, number)
                if self._is_due(self.settings.checkpoint_every):
                    self._save_checkpoint()
                if self._is_due(self.settings.evaluate_every):
                    figures = self._evaluate()
        self._finish(figures)
        self.accelerator.end_training()
        return figures

    def _begin(self) -> None:
        layout = self._layout()
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))
            self._check_layout(layout)
            logger.info("Resumed from %s.", self.checkpoint)
        self.progress.layout = layout
        self.log.rewind(self.progress.updates, self.progress.seconds)
        start_trackers(self.accelerator, self.recipe)
        self.bar = ProgressBar(
            self.num_updates, self.progress.updates, enabled=self.accelerator.is_main_process
        )
        if self.accelerator.is_main_process:
            recipe = yaml.safe_dump(dataclasses.asdict(self.recipe), sort_keys=False)
            (self.output_dir / "recipe.yaml").write_text(recipe)

    def _layout(self) -> dict[str, Any]:
        """What decides which images a batch holds."""
        data, settings = self.recipe.data, self.settings
        layout: dict[str, Any] = {
            "processes": self.accelerator.num_processes,
            "training.batch_size": settings.batch_size,
            "training.gradient_accumulation_steps": settings.gradient_accumulation_steps,
            "training.seed": settings.seed,
            "data.path": data.path,
        }
        if data.streaming:
            layout |= {
                "data.num_workers": data.num_workers,
                "data.shuffle_buffer": data.shuffle_buffer,
            }
        return layout

    def _check_layout(self, layout: dict[str, Any]) -> None:
        """Compare with the checkpoint's: within an epoch, images would be lost and doubled."""
        # Earlier checkpoints have none.
        for name, former in self.progress.layout.items():
            value = layout.get(name)
            if value == former:
                continue
            if self.progress.batches:
                raise ValueError(
                    f"{self.checkpoint} was saved within an epoch, with `{name}` {former}; with "
                    f"{value} images would be lost and others come twice. Go on with {former}, or "
                    "begin in a new `training.output_dir`."
                )
            logger.warning("`%s` was %s until now and is %s.", name, former, value)

    def _is_due(self, epochs: float) -> bool:
        """Tell whether something done every so many epochs is due after this update."""
        interval = max(round(epochs * self.updates_per_epoch), 1)
        return self.progress.updates % interval == 0 or self.progress.updates == self.num_updates

    def _updates(self) -> Iterator[None]:
        """Train, and give way after each update."""
        progress = self.progress
        batches_per_epoch = self.updates_per_epoch * self.settings.gradient_accumulation_steps
        while progress.updates < self.num_updates and not self._is_patience_over():
            self.task.train_images.epoch = progress.epoch
            for batches in self._groups_of_batches():
                self._update(batches)
                progress.updates += 1
                progress.batches += len(batches)
                if progress.batches == batches_per_epoch:
                    progress.epoch, progress.batches = progress.epoch + 1, 0
                self._after_update()
                yield
                self.meter.start_clock()
                if progress.updates == self.num_updates or self._is_patience_over():
                    break
        self.bar.close()

    def _groups_of_batches(self) -> Iterator[list[dict[str, Any]]]:
        """What is left of the epoch, as much as an update takes at a time."""
        self.loader.set_epoch(self.progress.epoch)
        loader = self.loader
        if self.progress.batches:
            loader = self.accelerator.skip_first_batches(loader, self.progress.batches)
        batches: list[dict[str, Any]] = []
        for batch in loader:
            batches.append(batch)
            if len(batches) == self.settings.gradient_accumulation_steps:
                yield batches
                batches = []

    def _update(self, batches: list[dict[str, Any]]) -> None:
        self.model.train()
        shared = self.task.prepare_update(self.accelerator.unwrap_model(self.model), batches)
        for number, batch in enumerate(batches, start=1):
            is_last = number == len(batches)
            # The optimizer of accelerate moves only then, and processes exchange gradients.
            self.accelerator.sync_gradients = is_last
            with nullcontext() if is_last else self.accelerator.no_sync(self.model):
                losses = self._losses(batch | shared, batches)
                self._check_finite(losses["loss"], losses, batches)
                self.accelerator.backward(losses["loss"])
            if is_last:
                losses["gradient_norm"] = self.task.clip_gradients(self.model, self.progress)
                # With a scaled loss, the scaler leaves the update out and lowers the scale.
                if self.accelerator.scaler is None:
                    self._check_finite(losses["gradient_norm"], losses, batches)
            self.meter.add(losses, self.task.count_images(batch))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _losses(self, batch: dict[str, Any], batches: list[dict[str, Any]]) -> dict[str, Tensor]:
        try:
            return self.task.compute_losses(self.model, batch, self.progress)
        except ValueError as error:
            raise ValueError(
                f"{error} This was after update {self.progress.updates}, {self._origin(batches)}."
            ) from error

    def _origin(self, batches: list[dict[str, Any]]) -> str:
        """Name the images and this process."""
        images = [name for batch in batches for name in self.task.image_ids(batch)]
        return (
            f"with the images {', '.join(images) or 'without names'} on process "
            f"{self.accelerator.process_index}"
        )

    def _after_update(self) -> None:
        rate = self.schedule.get_last_lr()[-1]
        self.schedule.step()
        model = self.accelerator.unwrap_model(self.model)
        values = self.task.after_update(model, self.progress)
        if self.average is not None:
            self.average.update_parameters(model)
        self.bar.advance((self.progress.updates - 1) // self.updates_per_epoch)
        if self.progress.updates % self.settings.log_every == 0:
            line: dict[str, float] = {
                **self.meter.summarize(),
                "learning_rate": float(rate),
                **values,
            }
            self.log.write("train", self.progress.updates, self._epoch(), line)
            self.bar.show(line)

    def _epoch(self) -> float:
        batches = self.updates_per_epoch * self.settings.gradient_accumulation_steps
        return self.progress.epoch + self.progress.batches / batches

    def _check_finite(
        self, value: Tensor, losses: dict[str, Tensor], batches: list[dict[str, Any]]
    ) -> None:
        """Stop before weights, moments and checkpoints are spoilt."""
        if torch.isfinite(value):
            return
        entries = ", ".join(f"{name} {loss.item():.3g}" for name, loss in losses.items())
        raise FloatingPointError(
            f"Loss or gradient is not finite after update {self.progress.updates} ({entries}), "
            f"{self._origin(batches)}. "
            "Lower `training.learning_rate`, clip gradients more, check the images, or use "
            "`training.mixed_precision=no`; the last checkpoint is as it was."
        )

    def _is_patience_over(self) -> bool:
        patience = self.settings.patience
        return patience is not None and self.progress.evaluations_since_best >= patience

    def _evaluated_model(self) -> PreTrainedModel:
        """The moving average where there is one: it is evaluated and saved."""
        model = self.accelerator.unwrap_model(self.model)
        return model if self.average is None else _unwrap(self.average)

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate, and keep the best model."""
        figures = self.task.evaluate(self._evaluated_model(), self.progress)
        if self.accelerator.is_main_process:
            flat = {name: value for name, value in figures.items() if name != "details"}
            self.log.write("validation", self.progress.updates, self._epoch(), flat)
            logger.info("Update %d: %s", self.progress.updates, flat)
            draw_training_curves(self.log.path, self.output_dir / "curves.png")
        name = self.settings.best_figure or self.task.best_figure
        ranked = figures.keys() - {"details", *self.task.unranked_figures}
        if name not in ranked:
            known = ", ".join(key for key in figures if key in ranked)
            raise ValueError(f"`training.best_figure` must be one of {known}, got {name!r}.")
        self._keep_best(name, figures)
        return figures

    def _keep_best(self, name: str, figures: dict[str, Any]) -> None:
        figure, best = figures[name], self.progress.best
        if figure is None:
            return
        if best is not None and figure <= best:
            self.progress.evaluations_since_best += 1
            return
        self.progress.best, self.progress.evaluations_since_best = figure, 0
        flat = {key: value for key, value in figures.items() if key != "details"}
        self.progress.best_record = {"updates": self.progress.updates, "figures": flat}
        self._save_model(self.output_dir / "best")

    def _save_model(self, folder: Path) -> None:
        """Save what is evaluated; every process must call it, for each may hold a part of it."""
        state = gather_weights(self.accelerator, self.model)
        if self.accelerator.is_main_process:
            save_model(self._evaluated_model(), self.task.image_processor, folder, state)

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
        self._save_model(self.output_dir / "final")
        if not self.accelerator.is_main_process:
            return
        batch_size = self.settings.batch_size * self.settings.gradient_accumulation_steps
        record = {
            "figures": figures,
            "best": self.progress.best_record,
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


def _check_weights(model: nn.Module) -> None:
    """Name a tensor that would spoil everything, before data are read for it."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(
                f"`{name}` of the model holds NaN or infinity before the first update; what "
                "`pretrained_model`, `detector` or `backbone_weights` names is broken."
            )
