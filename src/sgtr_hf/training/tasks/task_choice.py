"""Which task a recipe asks for."""

from accelerate import Accelerator

from ..recipe import Recipe
from .classification_task import ClassificationTask
from .distillation_tasks import (
    DistilledClassificationTask,
    DistilledSceneGraphTask,
    teacher_of,
)
from .scene_tasks import DetectionTask, SceneGraphTask
from .self_distillation_task import SelfDistillationTask
from .training_task import TrainingTask


TASKS: dict[str, type[TrainingTask]] = {
    "detection": DetectionTask,
    "scene_graph": SceneGraphTask,
    "self_distillation": SelfDistillationTask,
    "classification": ClassificationTask,
}
# With a teacher.
DISTILLATION_TASKS: dict[str, type[TrainingTask]] = {
    "scene_graph": DistilledSceneGraphTask,
    "classification": DistilledClassificationTask,
}


def make_task(recipe: Recipe, accelerator: Accelerator) -> TrainingTask:
    """Open data and image processor of a recipe's task.

    Raises:
        ValueError: If the recipe does not fit the data.
    """
    if recipe.distillation.teacher is None:
        return TASKS[recipe.task](recipe, accelerator)
    return make_distillation_task(recipe, accelerator)


def make_distillation_task(recipe: Recipe, accelerator: Accelerator) -> TrainingTask:
    """Likewise, with a teacher.

    Raises:
        ValueError: If the recipe has none, or its task none to offer.
    """
    teacher = teacher_of(recipe)
    if recipe.task not in DISTILLATION_TASKS:
        raise ValueError(
            f"`distillation.teacher` must be null with `task: {recipe.task}`, got {teacher}; "
            f"{' and '.join(DISTILLATION_TASKS)} can be distilled."
        )
    return DISTILLATION_TASKS[recipe.task](recipe, accelerator)
