"""Copies a model's weights as safetensors, cut into shards when they are large."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"


def copy_weights(source: Path, target: Path, max_shard_bytes: int) -> list[Path]:
    """Copy the weights of a model, without ever holding more than a shard of them.

    Args:
        source: Folder of the model.
        target: Folder that has none yet.
        max_shard_bytes: A file that is larger is cut into shards.

    Returns:
        The files written.

    Raises:
        ValueError: If the source has no whole safetensors, or weights in another format alone.
    """
    files = weight_files(source)
    if max(file.stat().st_size for file in files) <= max_shard_bytes:
        if len(files) > 1:
            shutil.copyfile(source / _INDEX, target / _INDEX)
        for file in files:
            shutil.copyfile(file, target / file.name)
        return [target / file.name for file in files]
    return _write_shards(files, target, max_shard_bytes)


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors of a model, whose headers are read.

    Raises:
        ValueError: If there are none, or one of them is missing or broken.
    """
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        files = [_inside(folder, name) for name in sorted(set(index["weight_map"].values()))]
    else:
        files = [folder / _SINGLE]
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"{file} is missing; weights must be safetensors, as `save_pretrained` writes them."
            )
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is no whole safetensors file: {error}") from error
    return files


def _inside(folder: Path, name: str) -> Path:
    """A file that an index names, which must lie in the folder itself."""
    if Path(name).name != name:
        raise ValueError(f"{folder / _INDEX} names {name!r}, which is not in its folder.")
    return folder / name


def _write_shards(files: list[Path], target: Path, max_shard_bytes: int) -> list[Path]:
    # Shapes and types are enough to divide tensors among shards.
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in _tensors(files)}
    plan = split_torch_state_dict_into_shards(
        shapes, filename_pattern=_PATTERN, max_shard_size=max_shard_bytes
    )
    written = []
    for file_name, names in plan.filename_to_tensors.items():
        shard = dict(_tensors(files, set(names)))
        save_file(shard, target / file_name, metadata={"format": "pt"})
        written.append(target / file_name)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (target / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return written


def _tensors(files: list[Path], wanted: set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 - no dictionary
                if wanted is None or name in wanted:
                    yield name, content.get_tensor(name)
