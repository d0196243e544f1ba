"""Self-distillation without labels (DINO, Caron et al. 2021)."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Subset
from transformers import PreTrainedModel

from ...data.picture_source import PictureStream
from ...data.training_pictures import ChangedPicture, ReadablePictures
from ...image_processing.batched_crops import BatchedMultiCrop, CropDraws
from ...image_processing.multi_crop import MultiCrop
from ...modeling.modeling_dino_pretraining import DinoVitForPreTraining
from ...self_supervision.feature_extraction import extract_features
from ...self_supervision.image_preparation import ProcessorPreparation
from ...self_supervision.nearest_neighbours import neighbour_accuracy
from ..checkpoints import Progress
from ..collapse_watch import EntropyMeter, describe_collapse
from ..image_recipe import SelfDistillationRecipe
from ..recipe import Recipe
from ..self_distillation_schedules import (
    RateAndDecaySchedule,
    SelfDistillationSchedules,
    limit_gradients,
    make_parameter_groups,
    make_schedules,
)
from .picture_task import PictureCollator, PictureTask
from .training_task import RunLength


logger = logging.getLogger(__name__)


class SelfDistillationTask(PictureTask):
    """Trains `DinoVitForPreTraining`, and watches its teacher.

    Args:
        recipe: A `SelfDistillationRecipe`.
        accelerator: Knows device and processes.

    Raises:
        TypeError: If the recipe is of another kind.
        ValueError: If the recipe does not fit the data.
    """

    # Without classes there is none, and the last model is the one to take.
    best_figure = "knn_top1"
    unranked_figures = ("teacher_entropy", "mean_entropy")
    model_class = DinoVitForPreTraining

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        if not isinstance(recipe, SelfDistillationRecipe):
            raise TypeError(
                f"Self-distillation needs a SelfDistillationRecipe, got {type(recipe).__name__}; "
                "`load_recipe` makes it with `kinds=IMAGE_RECIPES`."
            )
        super().__init__(recipe, accelerator, recipe.data)
        self.crops, self.training = recipe.data.crops, recipe.training
        self.num_bank_images = recipe.data.neighbour_images
        self.has_classes = self._can_compare_classes()
        # Until then the teacher is as good as random, which looks like a collapse.
        self.may_collapse_from = max(recipe.training.warmup_epochs, 1.0)

    def make_model(self) -> PreTrainedModel:
        """Build student and teacher."""
        model = self.make_vision_transformer()
        for name in ("global_size", "local_size"):
            size, least = getattr(self.crops, name), model.config.patch_size
            if size < least:
                raise ValueError(
                    f"`data.crops.{name}` must be at least a patch ({least} pixels), got {size}."
                )
        return model

    def complete(self, model: PreTrainedModel, missing: set[str]) -> None:
        """Let the student begin as the teacher, where there is only one network."""
        super().complete(model, missing)
        if any(name.startswith("student.model.") for name in missing):
            pretraining = _pretraining(model)
            pretraining.student.model.load_state_dict(pretraining.model.state_dict())
            # Neither head was trained; they begin alike, too.
            pretraining.copy_student()
            logger.info(
                "`pretrained_model` holds one network; student and teacher both begin with it."
            )

    def make_optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        """AdamW on the student; rate and decay come from the schedule."""
        return torch.optim.AdamW(make_parameter_groups(model))

    def training_loader(self, model: PreTrainedModel) -> Any:  # noqa: ARG002
        """Read images as crops."""
        flips, processor = self.data.flip_probability, self.image_processor
        if self.crops.batched:
            crop = BatchedMultiCrop(self.crops, flips)
            return self.load_training_pictures(
                CropDraws(self.crops), BatchedCropCollator(processor, crop)
            )
        return self.load_training_pictures(MultiCrop(self.crops, flips), CropCollator(processor))

    def make_schedule(self, optimizer: torch.optim.Optimizer, length: RunLength) -> LRScheduler:
        """Lay out rate, decay, momentum and temperature of the run."""
        settings = self.training
        batch_size = (
            settings.batch_size
            * settings.gradient_accumulation_steps
            * self.accelerator.num_processes
        )
        self.schedules: SelfDistillationSchedules = make_schedules(
            settings, length.num_updates, length.updates_per_epoch, batch_size
        )
        return RateAndDecaySchedule(optimizer, self.schedules)

    def compute_losses(
        self, model: torch.nn.Module, batch: dict[str, Any], progress: Progress
    ) -> dict[str, Tensor]:
        """Compare the crops."""
        outputs = model(
            batch["pixel_values"],
            batch["local_pixel_values"],
            teacher_temperature=self.schedules.temperature(progress.epoch),
        )
        return {"loss": outputs.loss, "teacher_entropy": outputs.teacher_entropy}

    def clip_gradients(self, model: torch.nn.Module, progress: Progress) -> Tensor:
        """Limit each tensor's gradient, and hold the prototypes still at first."""
        self.accelerator.unscale_gradients()
        norm = limit_gradients(model, self.training.gradient_clip_norm_per_tensor)
        if progress.epoch < self.training.frozen_prototype_epochs:
            student = _pretraining(self.accelerator.unwrap_model(model)).student
            for parameter in student.head.prototypes.parameters():
                parameter.grad = None
        return norm

    def after_update(self, model: PreTrainedModel, progress: Progress) -> Mapping[str, float]:
        """Move the teacher."""
        update = min(progress.updates, len(self.schedules.teacher_momentum)) - 1
        momentum = float(self.schedules.teacher_momentum[update])
        _pretraining(model).update_teacher(momentum)
        return {
            "weight_decay": float(self.schedules.weight_decay[update]),
            "teacher_momentum": momentum,
            "teacher_temperature": self._last_temperature(progress),
        }

    def evaluate(self, model: PreTrainedModel, progress: Progress) -> dict[str, Any]:
        """Measure the teacher: entropies and, where there are classes, its nearest neighbours."""
        pretraining = _pretraining(model).eval()
        meter = EntropyMeter(pretraining.center, self._last_temperature(progress))

        def compute_and_measure(pixel_values: Tensor) -> Tensor:
            tokens = pretraining.model(pixel_values).pooler_output
            meter.add(pretraining.head(tokens))
            return tokens

        has_validation = self.data.validation_split is not None
        pictures = self.validation if has_validation else self._bank_pictures()
        queries = self._features(pictures, compute_and_measure)
        entropies = meter.compute(self.accelerator)
        figures: dict[str, Any] = {
            "knn_top1": None,
            "teacher_entropy": entropies.of_samples,
            "mean_entropy": entropies.of_mean,
            "entropy_gap": entropies.gap,
        }
        warning = describe_collapse(entropies, self.training.least_entropy_gap)
        if warning and progress.epoch >= self.may_collapse_from:
            logger.warning("%s", warning)
        if self.has_classes:
            bank = self._features(
                self._bank_pictures(), lambda pixels: pretraining.model(pixels).pooler_output
            )
            count = self.training.num_neighbours
            (accuracy,) = neighbour_accuracy(_classified(queries), _classified(bank), [count])
            figures |= {"knn_top1": accuracy.top1, "knn_top5": accuracy.top5}
        return figures

    def _last_temperature(self, progress: Progress) -> float:
        """The teacher's temperature in the last update, after which an epoch may have ended."""
        return self.schedules.temperature(progress.epoch - (progress.batches == 0))

    def _can_compare_classes(self) -> bool:
        """Tell whether neighbours can be asked for classes; they are not needed to train."""
        if self.data.validation_split is None or not self.validation.has_classes:
            return False
        if not self.pictures.has_classes:
            logger.warning(
                "The images of the split %s have no classes, so those of nearest neighbours are "
                "not measured.",
                self.data.train_split,
            )
            return False
        self.check_same_classes()
        return True

    def _bank_pictures(self) -> Any:
        """Training images that are searched, spread over the split."""
        if isinstance(self.pictures, PictureStream):
            return self.pictures.first(self.num_bank_images)
        step = max(len(self.pictures) // self.num_bank_images, 1)
        indices = range(0, len(self.pictures), step)[: self.num_bank_images]
        return Subset(ReadablePictures(self.pictures, self.data.on_error), list(indices))

    def _features(self, pictures: Any, compute: Any) -> tuple[Tensor, Tensor]:
        """Compute features and classes of all pictures, each process its share."""
        batches = extract_features(
            self.share_of(pictures),
            ProcessorPreparation(self.image_processor),
            compute,
            batch_size=self.settings.batch_size,
            num_workers=self.data.num_workers,
            device=self.accelerator.device,
        )
        own = [(batch.vectors, batch.labels) for batch in batches]
        shares = gather_object(own)
        return torch.cat([vectors for vectors, _ in shares]), torch.cat([row for _, row in shares])


class CropCollator(PictureCollator):
    """Makes a batch of crops."""

    def __call__(self, items: list[ChangedPicture]) -> dict[str, Any]:
        """Return pixel_values (2, B, 3, H, W), local_pixel_values (L, B, 3, h, w), and names."""
        batch: dict[str, Any] = {"names": [item.name for item in items]}
        for name, field in (
            ("pixel_values", "global_crops"),
            ("local_pixel_values", "local_crops"),
        ):
            crops = torch.stack([getattr(item.pixels, field) for item in items], dim=1)
            batch[name] = self.normalize(crops)
        return batch


class BatchedCropCollator(PictureCollator):
    """Makes a batch of images, and then its crops.

    Args:
        image_processor: Gives mean and standard deviation.
        crop: Makes the crops.
    """

    def __init__(self, image_processor: Any, crop: BatchedMultiCrop) -> None:
        super().__init__(image_processor)
        self.crop = crop

    def __call__(self, items: list[ChangedPicture]) -> dict[str, Any]:
        """Return the same entries as `CropCollator`.

        Raises:
            ValueError: If the images are of several sizes.
        """
        images = [item.pixels.pixels for item in items]
        for image, item in zip(images, items, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    "`data.crops.batched` needs images of one size; "
                    f"{item.name} has {image.shape[2]} x {image.shape[1]} pixels, "
                    f"{items[0].name} {images[0].shape[2]} x {images[0].shape[1]}."
                )
        numbers = torch.stack([item.pixels.draws for item in items])
        views, local = self.crop(torch.stack(images), numbers)
        return {
            "names": [item.name for item in items],
            "pixel_values": self.normalize(views),
            "local_pixel_values": self.normalize(local),
        }


def _classified(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Leave out features of pictures without a class."""
    vectors, labels = found
    return vectors[labels >= 0], labels[labels >= 0]


def _pretraining(model: torch.nn.Module) -> DinoVitForPreTraining:
    if not isinstance(model, DinoVitForPreTraining):
        raise TypeError(f"Self-distillation trains DinoVitForPreTraining, got {type(model)}.")
    return model
