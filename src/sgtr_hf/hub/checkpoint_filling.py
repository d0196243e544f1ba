"""Applies key tables to the tensors of a file, and puts them into a model, losing nothing."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint_formats import KeyTable, Rules


Weights = dict[str, Tensor]
# Most names that an error lists.
_NAMES_SHOWN = 5


class ConversionReport(NamedTuple):
    """What became of the tensors.

    Args:
        used: Tensors of the file that the model holds, aliases included.
        unused: Tensors of the file that are known to have no use.
        filled: Tensors of the model that came from the file.
        new: Names of tensors that the file does not have and that start anew.
    """

    used: int
    unused: int
    filled: int
    new: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Say the three counts, and what is new."""
        text = (
            f"{self.used} tensors of the file used, {self.unused} known to have no use, "
            f"{self.filled} tensors of the model filled"
        )
        return f"{text}, {len(self.new)} start anew" if self.new else text


class RenamedWeights(NamedTuple):
    """Tensors under our names, and how many of the file they are."""

    tensors: Weights
    used: int
    unused: int


def unwrap(entries: Mapping[str, Any], entry: str) -> Weights:
    """Find the tensors in a file's dictionary, and take the prefix of parallel training off.

    Args:
        entries: Content of the file.
        entry: Where the tensors are, unless the file holds nothing else.

    Raises:
        ValueError: If the entry holds something else.
    """
    inner = entries.get(entry, entries)
    if not isinstance(inner, Mapping):
        raise ValueError(f"`{entry}` of the file must hold tensors, got {type(inner).__name__}.")
    return {
        str(name).removeprefix("module."): tensor
        for name, tensor in inner.items()
        if isinstance(tensor, Tensor)
    }


def rename(weights: Weights, table: KeyTable) -> RenamedWeights:
    """Apply a table: merge aliases, drop what has no use, split what is packed.

    Raises:
        ValueError: If aliases of one tensor differ, or two tensors get one name.
    """
    merged: Weights = {}
    unused = 0
    for original, tensor in weights.items():
        name = _apply(original, table.aliases)
        if table.unused.search(name):
            unused += 1
            continue
        if name in merged and not torch.equal(merged[name], tensor):
            raise ValueError(
                f"`{original}` should be the same tensor as `{name}` but differs; "
                "the checkpoint was not written by the released code."
            )
        merged[name] = tensor
    converted: Weights = {}
    for original, tensor in merged.items():
        for name, part in _split_packed(original, tensor, table.packed):
            renamed = _shift_indices(_apply(name, table.rules))
            if renamed in converted:
                raise ValueError(f"`{original}` and another tensor would both be `{renamed}`.")
            converted[renamed] = part
    return RenamedWeights(converted, len(weights) - unused, unused)


def fill(
    model: PreTrainedModel, renamed: RenamedWeights, is_new: re.Pattern[str] | None = None
) -> ConversionReport:
    """Put the tensors into the model; each must have its place, and each place its tensor.

    Args:
        model: Of which all other tensors keep their initial values.
        renamed: The tensors.
        is_new: Names that the file may lack.

    Raises:
        ValueError: If a tensor is missing, not known, or has another shape.
    """
    expected = model.state_dict()
    tensors = dict(renamed.tensors)
    # Counters of batch norms, which the originals do not have, and which nothing here reads.
    counters = {name for name in expected if name.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in tensors and name not in counters]
    new = [name for name in missing if is_new is not None and is_new.search(name)]
    missing = [name for name in missing if name not in set(new)]
    unknown = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(expected[name].shape)}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    problems = [
        f"{len(names)} {what}: {list_names(names)}"
        for what, names in (
            ("tensors are missing", missing),
            ("are not known", unknown),
            ("have another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(f"The checkpoint is damaged or of another model; {'; '.join(problems)}.")
    model.load_state_dict(tensors, strict=False)
    return ConversionReport(renamed.used, renamed.unused, len(tensors), tuple(new))


def _apply(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _shift_indices(name: str) -> str:
    name = re.sub(r"<<(\d+)>>", lambda found: str(int(found[1]) - 2), name)
    return re.sub(r"<(\d+)>", lambda found: str(int(found[1]) - 1), name)


def _split_packed(name: str, tensor: Tensor, packed: re.Pattern[str]) -> list[tuple[str, Tensor]]:
    if not packed.search(name):
        return [(name, tensor)]
    return [
        (packed.sub(f"{role}.", name), part)
        for role, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    ]


def list_names(names: Sequence[str]) -> str:
    """Quote the first names."""
    shown = ", ".join(f"`{name}`" for name in names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown}, ..."
