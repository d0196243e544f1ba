"""Checkpoints that survive an interruption and go on exactly where they stopped."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel


class Progress:
    """How far a run has come; saved with every checkpoint.

    Attributes:
        epoch: Epochs done.
        batches: Batches done of the running epoch, a process.
        updates: Updates done.
        seconds: Wall time.
        best: Best figure of the validation split so far.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches = 0
        self.updates = 0
        self.seconds = 0.0
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the numbers of a checkpoint."""
        vars(self).update(state)


def save_checkpoint(accelerator: Accelerator, folder: Path, updates: int, keep: int) -> Path:
    """Save the state of everything prepared, and delete old checkpoints.

    The checkpoint is complete as soon as its name exists.

    Args:
        accelerator: Knows model, optimizer, schedule and what was registered.
        folder: Holds the run's checkpoints.
        updates: Made so far; names the checkpoint.
        keep: How many stay.
    """
    target = folder / f"checkpoint-{updates:08d}"
    if target.exists():
        # Of the same update, hence the same.
        return target
    unfinished = folder / "checkpoint.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(target)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return target


def save_model(model: PreTrainedModel, image_processor: Any, folder: Path) -> None:
    """Save a model with its image processor; a former one stays until the new one is complete."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    image_processor.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-????????"))


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Resolve the recipe's `training.resume`.

    Raises:
        ValueError: If a path was given that is no checkpoint, or a new run would mix with another.
    """
    if resume is None:
        if list_checkpoints(folder):
            raise ValueError(
                f"`training.output_dir` {folder} holds checkpoints of another run; name a new "
                "folder, or go on with `training.resume=auto`."
            )
        return None
    if resume == "auto":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if not (path / "optimizer.bin").is_file():
        raise ValueError(
            f"`training.resume` {resume} is not a checkpoint of a run; name a folder "
            'checkpoint-..., or use "auto".'
        )
    return path
