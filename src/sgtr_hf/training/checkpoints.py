"""Checkpoints that survive an interruption and go on exactly where they stopped."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

# Names the files of a checkpoint and their sizes; written last.
_MANIFEST = "checkpoint.json"


class Progress:
    """How far a run has come; saved with every checkpoint.

    Attributes:
        epoch: Epochs done.
        batches: Batches done of the running epoch, a process.
        updates: Updates done.
        seconds: Wall time.
        best: Best figure of the validation split so far.
        best_record: Update and all figures of that evaluation.
        evaluations_since_best: Evaluations after that one.
        layout: What decides which images a batch holds, by its key in the recipe.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batches = 0
        self.updates = 0
        self.seconds = 0.0
        self.best: float | None = None
        self.best_record: dict[str, Any] | None = None
        self.evaluations_since_best = 0
        self.layout: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the numbers of a checkpoint."""
        vars(self).update(state)


def save_checkpoint(accelerator: Accelerator, folder: Path, updates: int, keep: int) -> Path:
    """Save the state of everything prepared, and delete old checkpoints.

    The checkpoint is complete, and on the disk, as soon as its name exists.

    Args:
        accelerator: Knows model, optimizer, schedule and what was registered.
        folder: Holds the run's checkpoints; all processes see the same.
        updates: Made so far; names the checkpoint.
        keep: How many stay.

    Raises:
        OSError: If the disk is full, say. Earlier checkpoints stay as they are.
    """
    target = folder / f"checkpoint-{updates:08d}"
    if target.exists() and find_damage(target) is None:
        # Of the same update, hence the same.
        return target
    unfinished = folder / "checkpoint.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    with _explained_errors(unfinished, f"The checkpoint of update {updates}"):
        accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with _explained_errors(unfinished, f"The checkpoint of update {updates}"):
            _seal(unfinished)
            shutil.rmtree(target, ignore_errors=True)
            _rename(unfinished, target)
        _delete_old(folder, keep)
    accelerator.wait_for_everyone()
    return target


def save_model(
    model: PreTrainedModel,
    image_processor: Any,
    folder: Path,
    state: dict[str, Tensor] | None = None,
) -> None:
    """Save a model with its image processor; a former one stays until the new one is complete.

    Args:
        model: Its configuration and, without a state, its weights are saved.
        image_processor: Saved beside it.
        folder: Where to.
        state: Weights that were gathered from several processes.

    Raises:
        OSError: If the disk is full, say.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    former = folder.with_name(f"{folder.name}.former")
    shutil.rmtree(unfinished, ignore_errors=True)
    with _explained_errors(unfinished, f"The model {folder.name}"):
        model.save_pretrained(unfinished, **({} if state is None else {"state_dict": state}))
        image_processor.save_pretrained(unfinished)
        _sync_all(unfinished)
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.rename(former)
    _rename(unfinished, folder)
    shutil.rmtree(former, ignore_errors=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-" + 8 * "[0-9]"))


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """Resolve the recipe's `training.resume`.

    A damaged checkpoint is passed over for an older one, which the log says.

    Raises:
        ValueError: If a path was given that is no checkpoint, a new run would mix with another, or
            there are checkpoints and all are damaged.
    """
    found = list_checkpoints(folder)
    if resume is None:
        if found:
            raise ValueError(
                f"`training.output_dir` {folder} holds checkpoints of another run; name a new "
                "folder, or go on with `training.resume=auto`."
            )
        return None
    if resume != "auto":
        _check_named(folder, Path(resume), found)
        return Path(resume)
    for path in reversed(found):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("The checkpoint %s is passed over: %s.", path, damage)
    if found:
        raise ValueError(
            f"All checkpoints in {folder} are damaged; delete them to begin the run anew."
        )
    return None


def _check_named(folder: Path, checkpoint: Path, found: list[Path]) -> None:
    """Reject a checkpoint to go on from that is damaged, or not the newest of its run."""
    damage = find_damage(checkpoint)
    if damage is not None:
        raise ValueError(
            f"`training.resume` {checkpoint} is not a complete checkpoint of a run: {damage}. Name "
            'a folder checkpoint-..., or use "auto".'
        )
    newer = [path for path in found if path.name > checkpoint.name and not find_damage(path)]
    if newer and checkpoint.resolve().parent == folder.resolve():
        raise ValueError(
            f"`training.resume` {checkpoint} is older than {newer[-1].name} beside it, which would "
            "mix with what comes now; name a new `training.output_dir`, or delete the newer ones."
        )


def find_damage(checkpoint: Path) -> str | None:
    """Say which file of a checkpoint is missing or cut off; None if all are complete."""
    try:
        sizes = json.loads((checkpoint / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{_MANIFEST} is missing or cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


@contextmanager
def _explained_errors(unfinished: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors have errors of their own for a disk that is full.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"{what} could not be written to {unfinished.parent}: "
            f"{error}. Free some space; the same command goes on from the newest complete one."
        ) from error


def _seal(folder: Path) -> None:
    """Write down what is complete, and bring it to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / _MANIFEST).write_text(json.dumps({"files": sizes}, indent=2) + "\n")
    _sync_all(folder)


def _delete_old(folder: Path, keep: int) -> None:
    found = list_checkpoints(folder)
    complete = [path for path in found if find_damage(path) is None]
    for path in found:
        if path not in complete[-keep:]:
            shutil.rmtree(path)


def _rename(source: Path, target: Path) -> None:
    source.rename(target)
    # Or a power failure could undo it.
    _sync(target.parent)


def _sync_all(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        # Windows opens no folders.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
