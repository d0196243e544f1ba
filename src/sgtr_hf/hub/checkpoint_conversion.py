"""Brings checkpoints of the original implementations into this package's layout.

A conversion never loses a weight in silence: every tensor of the file is used, or known to have no
use, and every tensor of the model is filled, or the conversion fails and names what is wrong.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint_filling import ConversionReport
from .checkpoint_models import (
    FORMATS,
    ConversionOptions,
    ConvertedCheckpoint,
    Network,
    training_setting,
)
from .checkpoint_reading import Vocabulary, read_checkpoint, read_vocabulary


def convert_checkpoint(
    entries: Mapping[str, Any],
    checkpoint_format: str,
    *,
    vocabulary: Vocabulary | None = None,
    network: Network = "teacher",
    backbone: Mapping[str, Any] | None = None,
    dilated: bool | None = None,
) -> ConvertedCheckpoint:
    """Convert the content of a checkpoint file.

    Args:
        entries: Its content, see `read_checkpoint`.
        checkpoint_format: A key of `FORMATS`.
        vocabulary: Names of classes and predicates; None for those of the data set, where they
            are known.
        network: Which network of a full DINO checkpoint; "both" makes a `DinoVitForPreTraining`
            with both heads and the centre.
        backbone: Content of the backbone's file, for the weights of a DINO classifier alone.
        dilated: Whether the last stage of DETR's backbone is dilated (DC5), which the shapes do
            not show. None takes what the settings in a full checkpoint say, else False.

    Raises:
        ValueError: If the content is not of this format, or a tensor is unknown, missing or of
            another shape.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(
            f"`format` must be one of {', '.join(FORMATS)}, got {checkpoint_format!r}."
        )
    options = ConversionOptions(vocabulary, network, backbone, dilated)
    _check_options(checkpoint_format, options)
    return FORMATS[checkpoint_format](entries, options)


def convert_file(  # noqa: PLR0913 - a keyword for each option of the command
    checkpoint: str | Path,
    output: str | Path,
    checkpoint_format: str,
    *,
    dtype: torch.dtype = torch.float32,
    vocabulary: str | Path | None = None,
    network: Network = "teacher",
    backbone: str | Path | None = None,
    dilated: bool | None = None,
) -> ConversionReport:
    """Convert a file into a folder that `AutoModel.from_pretrained` reads.

    Args:
        checkpoint: A .pth or .safetensors file.
        output: A folder that does not exist yet; it is written whole or not at all.
        checkpoint_format: A key of `FORMATS`.
        dtype: Of the stored weights.
        vocabulary: JSON file with names, see `read_vocabulary`.
        network: Which network of a full DINO checkpoint.
        backbone: The backbone's file, for the weights of a DINO classifier alone.
        dilated: Whether the last stage of DETR's backbone is dilated (DC5).

    Raises:
        ValueError: If the file does not convert, or the folder is there already.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.exists():
        raise ValueError(f"The output folder {output} exists already; name a new one.")
    entries = read_checkpoint(checkpoint)
    if checkpoint_format == "detr" and dilated is None:
        _require_dilation(checkpoint, entries)
    converted = convert_checkpoint(
        entries,
        checkpoint_format,
        vocabulary=None if vocabulary is None else read_vocabulary(vocabulary),
        network=network,
        backbone=None if backbone is None else read_checkpoint(backbone),
        dilated=dilated,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        converted.model.to(dtype).save_pretrained(unfinished)
        converted.image_processor.save_pretrained(unfinished)
        # Made for its owner alone, as temporary folders are.
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return converted.report


def _check_options(checkpoint_format: str, options: ConversionOptions) -> None:
    """Reject options that would have no effect."""
    if options.dilated is not None and checkpoint_format != "detr":
        raise ValueError(f"`dilated` (`--dc5`) is of `detr`, not of `{checkpoint_format}`.")
    if checkpoint_format != "dino" and (options.network != "teacher" or options.backbone):
        raise ValueError(f"`network` and `backbone` are of `dino`, not of `{checkpoint_format}`.")


def _require_dilation(checkpoint: Path, entries: Mapping[str, Any]) -> None:
    """Ask for what neither tensors nor settings tell, if the file's name raises the question."""
    if "dc5" in checkpoint.stem.lower() and training_setting(entries, "dilation") is None:
        raise ValueError(
            f"{checkpoint.name} is named like a DETR with a dilated backbone (DC5), which its "
            "tensors cannot show: say `--dc5` or `--no-dc5`."
        )
