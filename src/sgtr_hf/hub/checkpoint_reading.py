"""Reads what a conversion starts from: checkpoint files, and names of classes and predicates."""

import argparse
import json
import pickle
import struct
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


# What files that were damaged at random make torch, pickle and safetensors raise.
_READING_ERRORS = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)


class Vocabulary(NamedTuple):
    """Names of classes and of predicates, from 0 and without background; None if not known."""

    labels: Sequence[str] | None = None
    predicates: Sequence[str] | None = None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a .pth or .safetensors file without executing anything in it.

    Args:
        path: A file of tensors and plain settings; of classes only `argparse.Namespace` is
            allowed, in which the originals keep the settings of a training.

    Raises:
        ValueError: If it is missing, broken, or holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _READING_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} cannot be read as a checkpoint (truncated, or not one): {reason}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(content).__name__}.")
    return content


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read names from JSON: {"labels": [...], "predicates": [...]}, or Open Images' {"obj", "rel"}.

    Raises:
        ValueError: If the file has neither.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"The vocabulary {path} cannot be read: {error}") from error
    names = entries if isinstance(entries, dict) else {}
    vocabulary = Vocabulary(
        names.get("labels", names.get("obj")), names.get("predicates", names.get("rel"))
    )
    if vocabulary == Vocabulary():
        raise ValueError(f'The vocabulary {path} must hold "labels" and "predicates" as lists.')
    return vocabulary


def public_vocabulary(name: str, num_labels: int, num_predicates: int | None = None) -> Vocabulary:
    """Names of a public data set, each list only if the checkpoint has as many.

    Args:
        name: "coco", "vg150" or "open_images".
        num_labels: Classes of the checkpoint.
        num_predicates: Its predicates; None for a detector.
    """
    file = resources.files("sgtr_hf") / "assets" / "vocabularies" / f"{name}.json"
    entries: Mapping[str, Sequence[str]] = json.loads(file.read_text())
    labels, predicates = entries["labels"], entries.get("predicates", ())
    return Vocabulary(
        labels if len(labels) == num_labels else None,
        predicates if len(predicates) == num_predicates else None,
    )


def number_names(entry: str, names: Sequence[str] | None, count: int) -> dict[int, str]:
    """Number names from 0, or make some up.

    Args:
        entry: "labels" or "predicates".
        names: None if they are not known.
        count: How many the checkpoint has.

    Raises:
        ValueError: If there are more or fewer names.
    """
    if names is None:
        word = entry.removesuffix("s").upper()
        return {index: f"{word}_{index}" for index in range(count)}
    if len(names) != count:
        raise ValueError(
            f"`{entry}` of the vocabulary has {len(names)} names, but the checkpoint has {count}."
        )
    return dict(enumerate(map(str, names)))
