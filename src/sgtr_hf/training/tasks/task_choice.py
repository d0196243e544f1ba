"""Which task a recipe asks for."""

from accelerate import Accelerator

from ..recipe import Recipe
from .scene_tasks import DetectionTask, SceneGraphTask
from .training_task import TrainingTask


TASKS: dict[str, type[TrainingTask]] = {
    "detection": DetectionTask,
    "scene_graph": SceneGraphTask,
}


def make_task(recipe: Recipe, accelerator: Accelerator) -> TrainingTask:
    """Open data and image processor of a recipe's task.

    Raises:
        ValueError: If the recipe does not fit the data.
    """
    return TASKS[recipe.task](recipe, accelerator)
