"""What a task brings to the training loop."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from ..checkpoints import Progress
from ..optimization import clip_each_gradient, make_optimizer, make_schedule
from ..recipe import Recipe


class RunLength(NamedTuple):
    """How long a run is."""

    num_updates: int
    updates_per_epoch: int


class TrainingTask(ABC):
    """Model, data, loss and evaluation of one kind of training.

    The loop calls the methods in the order in which they stand here. Whatever a task must
    remember over an interruption belongs into its model, which checkpoints hold.

    Args:
        recipe: Of the run.
        accelerator: Knows device and processes.

    Attributes:
        best_figure: The figure of `evaluate` by which the best model is kept.
        unranked_figures: Those of which more is not better.
        image_processor: Saved beside the model.
        train_images: What `training_loader` reads; its `epoch` is set before each pass.
        num_images: Images of the training split.
    """

    best_figure: ClassVar[str]
    unranked_figures: ClassVar[tuple[str, ...]] = ()
    image_processor: Any
    train_images: Any
    num_images: int

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.settings, self.accelerator = recipe, recipe.training, accelerator

    @abstractmethod
    def make_model(self) -> PreTrainedModel:
        """Build the model; a mistake in the recipe is a `ValueError`."""

    def make_optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        """Group the parameters by rate and decay."""
        return make_optimizer(model, self.settings)

    @abstractmethod
    def training_loader(self, model: PreTrainedModel) -> Any:
        """Return the loader of training batches, prepared by the accelerator."""

    def make_schedule(self, optimizer: torch.optim.Optimizer, length: RunLength) -> LRScheduler:
        """Return what sets the optimizer's rates; it is advanced after each update."""
        return make_schedule(optimizer, self.settings, length.num_updates)

    def prepare_update(
        self,
        model: PreTrainedModel,  # noqa: ARG002 - for tasks whose losses are divided by counts
        batches: list[dict[str, Any]],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return entries that each batch of an update gets, from all of them."""
        return {}

    def compute_losses(
        self,
        model: torch.nn.Module,
        batch: dict[str, Any],
        progress: Progress,  # noqa: ARG002 - for tasks whose loss changes
    ) -> dict[str, Tensor]:
        """Return "loss", which is minimised, and its parts for the log."""
        outputs = model(**batch)
        return {"loss": outputs.loss, **outputs.loss_dict}

    def count_images(self, batch: dict[str, Any]) -> int:
        """Return the number of images in a batch."""
        return len(batch["labels"])

    def image_ids(self, batch: dict[str, Any]) -> list[str]:  # noqa: ARG002 - for data with names
        """Name the images of a batch, as far as they have names, for an error."""
        return []

    def clip_gradients(
        self,
        model: torch.nn.Module,
        progress: Progress,  # noqa: ARG002 - for tasks that hold something still at first
    ) -> Tensor:
        """Limit the gradients of an update, and return the norm they had."""
        limit = self.settings.gradient_clip_norm or float("inf")
        norm: Tensor = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        if self.settings.gradient_clip_norm_per_tensor > 0:
            clip_each_gradient(model, self.settings.gradient_clip_norm_per_tensor)
        return norm

    def after_update(
        self,
        model: PreTrainedModel,  # noqa: ARG002 - for tasks with a teacher
        progress: Progress,  # noqa: ARG002
    ) -> Mapping[str, float]:
        """Do what follows each update, and return values for the log."""
        return {}

    @abstractmethod
    def evaluate(self, model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        """Return figures by name: flat numbers, and on request `details`.

        Every process calls it, and gets figures of the whole validation split. They must depend on
        model and progress alone: after a resume the last evaluation is made again.
        """
