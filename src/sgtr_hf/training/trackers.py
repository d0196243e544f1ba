"""Services that show runs: TensorBoard, Weights & Biases, Trackio."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from .recipe import Recipe


_PROJECT = "sgtr-hf"


def check_trackers(names: Sequence[str]) -> None:
    """Reject what is not installed, which accelerate would leave out without a word.

    Raises:
        ImportError: If a tracker is not installed.
    """
    available = {str(tracker.value) for tracker in get_available_trackers()}
    for name in names:
        if name not in available:
            raise ImportError(
                f"`training.trackers` names {name}, which is not installed: `pip install {name}`."
            )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Open a run with the recipe's entries; later calls of `accelerator.log` go there."""
    if recipe.training.trackers:
        accelerator.init_trackers(_PROJECT, config=dict(_flatten(dataclasses.asdict(recipe))))


def _flatten(entries: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield entries as trackers take them: dotted names with numbers, truth values and texts."""
    for name, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", str(value)
