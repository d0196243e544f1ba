"""What the commands of `sgtr-hf dino` share: model, device, features, reports."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_arguments import model_folder, not_negative, positive


if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from .modeling.modeling_dino_vit import DinoVitModel
    from .self_supervision.feature_extraction import FeatureFunction, Features
    from .self_supervision.image_preparation import Preparation


def add_model_options(
    parser: argparse.ArgumentParser, batch_size: int = 64, *, is_required: bool = True
) -> None:
    """Add what every command with a model has."""
    parser.add_argument(
        "--model",
        required=is_required,
        help="folder or Hub id of a DinoVit checkpoint",
    )
    parser.add_argument(
        "--device", default="cpu", help="where to compute, as in cuda (default: cpu)"
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=batch_size,
        help=f"pictures at a time (default: {batch_size})",
    )
    parser.add_argument(
        "--workers", type=not_negative, default=0, help="processes that read pictures (default: 0)"
    )


def load_model(
    options: argparse.Namespace, *, untrained: bool = False
) -> "tuple[DinoVitModel, BaseImageProcessor]":
    """Load the model of `--model` onto `--device`."""
    from .self_supervision.vit_loading import load_vision_transformer

    model, image_processor = load_vision_transformer(
        model_folder(options.model), untrained=untrained
    )
    try:
        model.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` {options.device} cannot be used: {error}") from error
    return model, image_processor


def compute_features(
    options: argparse.Namespace, pictures: Any, prepare: "Preparation", compute: "FeatureFunction"
) -> "Features":
    """Compute features with the options' batches, workers and device, under a progress bar."""
    from .self_supervision.feature_extraction import collect_features, extract_features

    batches = extract_features(
        pictures,
        prepare,
        compute,
        batch_size=options.batch_size,
        num_workers=options.workers,
        device=options.device,
    )
    total = len(pictures) if hasattr(pictures, "__len__") else None
    return collect_features(batches, pictures.label_names, total)


def write_report(path: Path | None, figures: dict[str, Any]) -> None:
    """Write figures as JSON, if a file is named."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n")
