"""What the training scripts share: read a recipe, run it, report mistakes without a traceback."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable

from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError

from ..data.reading_processes import reason_of
from .image_recipe import IMAGE_RECIPES
from .interruption import TrainingStopped
from .loop import Trainer
from .recipe import Recipe, load_recipe
from .tasks.task_choice import make_task
from .tasks.training_task import TrainingTask


logger = logging.getLogger(__name__)


def run_recipe(
    description: str | None,
    task: str | None,
    open_task: Callable[[Recipe, Accelerator], TrainingTask] = make_task,
) -> None:
    """Parse the command line, and train; a mistake of the user ends it with a line that says so.

    SIGTERM saves a checkpoint and ends with exit code 0, Ctrl-C likewise with 130.

    Args:
        description: Of the script.
        task: That the recipe must have; None leaves it to `open_task`.
        open_task: As for `Trainer`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", help="entries to change: training.epochs=3")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe, options.overrides, IMAGE_RECIPES)
        if task is not None and recipe.task != task:
            raise ValueError(
                f"`task` of {options.recipe} is {recipe.task!r}, this trains {task!r}."
            )
        Trainer(recipe, open_task).run()
    except (ValueError, ArithmeticError, OSError, ImportError, StrictDataclassError) as error:
        sys.exit(f"error: {reason_of(error)}")
    except TrainingStopped as stop:
        logger.info("%s", stop)
        # A scheduler that takes the machine away sees a run that ended well, a shell sees Ctrl-C.
        sys.exit(0 if stop.signal == signal.SIGTERM else 128 + stop.signal)
