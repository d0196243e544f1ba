"""Training with a larger model as a teacher."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ...image_processing.image_processing_sgtr import SgtrImageProcessor
from ...losses.knowledge_distillation_loss import knowledge_distillation_losses
from ...losses.scene_graph_distillation_loss import (
    GraphDistillation,
    GraphPredictions,
    check_teacher,
    scene_graph_distillation_losses,
)
from ...modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ...self_supervision.image_preparation import seen_size
from ..checkpoints import Progress
from ..recipe import Recipe
from .classification_task import ClassificationTask
from .scene_tasks import SceneGraphTask


# Settings that decide what a model sees of a picture.
_SEEN = ("size", "do_resize", "do_rescale", "rescale_factor", "image_mean", "image_std",
         "channel_order")  # fmt: skip

# The training crops of a classifier are of the size of the processor's.
_SEEN_CLASSIFIED = ("rescale_factor", "image_mean", "image_std")


class DistilledSceneGraphTask(SceneGraphTask):
    """Trains a scene graph model on annotations and on what a larger one says.

    Args:
        recipe: With a teacher.
        accelerator: Knows device and processes.

    Raises:
        ValueError: If the recipe does not fit the data, or the teacher sees pictures otherwise.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        super().__init__(recipe, accelerator)
        self.teacher = load_teacher(recipe, SgtrForSceneGraphGeneration)
        self.teacher.to(accelerator.device)
        processor = SgtrImageProcessor.from_pretrained(teacher_of(recipe))
        if not (recipe.image_processor or recipe.pretrained_model or recipe.detector):
            self.image_processor = processor
        check_same_view(self.image_processor, processor, _SEEN)

    def make_model(self) -> PreTrainedModel:
        """Build the student."""
        student = super().make_model()
        check_teacher(student.config, self.teacher.config)
        self.student_config = student.config
        return student

    def compute_losses(
        self, model: torch.nn.Module, batch: dict[str, Any], progress: Progress
    ) -> dict[str, Tensor]:
        """Weigh the losses of annotations and teacher."""
        settings = self.recipe.distillation
        if settings.soft_weight == 0:
            return super().compute_losses(model, batch, progress)
        outputs = model(**batch)
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(batch["pixel_values"], batch.get("pixel_mask"))
        soft = scene_graph_distillation_losses(
            self.student_config,
            GraphPredictions.of(outputs),
            GraphPredictions.of(wanted),
            GraphDistillation(
                settings.temperature, settings.entity_confidence, settings.predicate_confidence
            ),
        )
        return weigh(outputs.loss_dict, soft, settings.soft_weight)


class DistilledClassificationTask(ClassificationTask):
    """Trains a classifier on annotations and on the distributions of a larger one.

    Args:
        recipe: With a teacher: any image classifier of transformers whose image processor makes
            pictures of one size.
        accelerator: Knows device and processes.

    Raises:
        ValueError: If the recipe does not fit the data, or the teacher sees pictures otherwise.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        super().__init__(recipe, accelerator)
        self.teacher = load_teacher(recipe, AutoModelForImageClassification)
        self.teacher.to(accelerator.device)
        processor = AutoImageProcessor.from_pretrained(teacher_of(recipe))
        if not (recipe.image_processor or recipe.pretrained_model):
            self.image_processor = processor
        check_same_view(self.image_processor, processor, _SEEN_CLASSIFIED)
        own, wanted = seen_size(self.image_processor), seen_size(processor)
        if own != wanted:
            raise ValueError(
                "Teacher and student look at the same pixels; `image_processor` must make pictures "
                f"of {wanted} pixels, as the teacher's, got {own}."
            )

    def make_model(self) -> PreTrainedModel:
        """Build the student."""
        student = super().make_model()
        mine, other = student.config.id2label, self.teacher.config.id2label
        if mine != other:
            raise ValueError(
                f"The teacher {teacher_of(self.recipe)} knows the classes {other}, the data has "
                f"{mine}; they must be the same."
            )
        return student

    def compute_losses(
        self, model: torch.nn.Module, batch: dict[str, Any], progress: Progress
    ) -> dict[str, Tensor]:
        """Weigh the losses of annotations and teacher."""
        settings = self.recipe.distillation
        if settings.soft_weight == 0:
            return super().compute_losses(model, batch, progress)
        logits = model(batch["pixel_values"]).logits
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(batch["pixel_values"]).logits
        losses = knowledge_distillation_losses(
            logits,
            wanted,
            batch["labels"],
            settings.temperature,
            settings.soft_weight,
            self.label_smoothing,
        )
        accuracy = (logits.argmax(-1) == batch["labels"]).float().mean()
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, "accuracy": accuracy}


def teacher_of(recipe: Recipe) -> str:
    """Return the name of the recipe's teacher.

    Raises:
        ValueError: If it has none.
    """
    if recipe.distillation.teacher is None:
        raise ValueError("The recipe lacks `distillation.teacher`, which distillation needs.")
    return recipe.distillation.teacher


def load_teacher(recipe: Recipe, kind: Any) -> PreTrainedModel:
    """Load a model that is asked and not trained.

    Args:
        recipe: Names it.
        kind: Class whose `from_pretrained` loads it.
    """
    teacher: PreTrainedModel = kind.from_pretrained(teacher_of(recipe), dtype=torch.float32)
    return teacher.eval().requires_grad_(False)


def check_same_view(student: Any, teacher: Any, names: tuple[str, ...]) -> None:
    """Reject image processors that would show teacher and student different pictures.

    Raises:
        ValueError: If one of the named settings differs.
    """
    mine, other = student.to_dict(), teacher.to_dict()
    for name in names:
        if mine.get(name) != other.get(name):
            raise ValueError(
                f"Teacher and student look at the same pixels; `image_processor.{name}` must be "
                f"{other.get(name)}, as the teacher's, got {mine.get(name)}."
            )


def weigh(
    hard: dict[str, Tensor], soft: dict[str, Tensor], soft_weight: float
) -> dict[str, Tensor]:
    """Add up "loss" of the parts, which come back with their weights."""
    parts = {name: (1 - soft_weight) * loss for name, loss in hard.items()}
    parts |= {name: soft_weight * loss for name, loss in soft.items()}
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}
