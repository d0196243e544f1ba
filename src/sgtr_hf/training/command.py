"""What the training scripts share: read a recipe, run it, report mistakes without a traceback."""

import argparse
import logging
import sys
from typing import Literal

from .loop import Trainer
from .recipe import load_recipe


def run_recipe(description: str | None, task: Literal["detection", "scene_graph"]) -> None:
    """Parse the command line, and train; exits with 2 after a mistake of the user."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file, see recipes/")
    parser.add_argument("overrides", nargs="*", help="entries to change: training.epochs=3")
    options = parser.parse_args()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if recipe.task != task:
            raise ValueError(
                f"`task` of {options.recipe} is {recipe.task!r}, this trains {task!r}."
            )
        Trainer(recipe).run()
    except (ValueError, ArithmeticError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interruption:
        sys.exit(str(interruption))
