"""Brings checkpoints of the original implementations into this package's layout.

A conversion never loses a weight in silence: every tensor of the file is used, or known to have no
use, and every tensor of the model is filled, or the conversion fails and names what is wrong.
"""

import argparse
import json
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BaseImageProcessor, PreTrainedModel, ResNetConfig

from ..configuration.configuration_dino_vit import DinoVitConfig
from ..configuration.configuration_sgtr import SgtrConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from ..image_processing.image_processing_dino_vit import DinoVitImageProcessor
from ..image_processing.image_processing_sgtr import SgtrImageProcessor
from ..modeling.modeling_dino_vit import DinoVitForImageClassification, DinoVitModel
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection
from . import checkpoint_formats as formats
from .checkpoint_filling import (
    ConversionReport,
    RenamedWeights,
    Weights,
    fill,
    list_names,
    rename,
    unwrap,
)


# Settings in which the release's two configurations differ.
_SGTR_SETTINGS: dict[str, dict[str, Any]] = {
    "sgtr-vg150": {
        "vocabulary": "vg150",
        "num_predicates": 50,
        "predicate_classification": "focal",
        "entity_weights": {"box_loss_weight": 1.0, "giou_loss_weight": 1.0},
        "relation_weights": {},
        "size": {"shortest_edge": 600, "longest_edge": 1000},
    },
    "sgtr-openimages": {
        # The order of its names is in the data set's own categories_dict.json.
        "vocabulary": None,
        "num_predicates": 30,
        "predicate_classification": "softmax",
        "entity_weights": {},
        "relation_weights": {
            "training_assembling_top_k": 40,
            "relation_vector_cost_weight": 1.0,
            "entity_giou_cost_weight": 1.25,
            "assembling_cost_weight": 0.0,
            "indicator_box_loss_weight": 0.3,
            "indicator_giou_loss_weight": 0.3,
        },
        "size": {"shortest_edge": 720, "longest_edge": 1000},
    },
}


class ConvertedCheckpoint(NamedTuple):
    """A model with the weights of the file, and the image processor that goes with it."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    report: ConversionReport


class Vocabulary(NamedTuple):
    """Names of classes and of predicates, from 0 and without background; None if not known."""

    labels: Sequence[str] | None = None
    predicates: Sequence[str] | None = None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a .pth or .safetensors file without executing anything in it.

    Raises:
        ValueError: If it is missing, broken, or holds more than tensors and plain settings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # Full checkpoints hold the settings of their training as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
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


def convert_checkpoint(
    entries: Mapping[str, Any],
    checkpoint_format: str,
    *,
    vocabulary: Vocabulary | None = None,
    network: Literal["teacher", "student"] = "teacher",
    backbone: Mapping[str, Any] | None = None,
) -> ConvertedCheckpoint:
    """Convert the content of a checkpoint file.

    Args:
        entries: Its content, see `read_checkpoint`.
        checkpoint_format: A key of `FORMATS`.
        vocabulary: Names of classes and predicates; those of the data set where they are known.
        network: Which network of a full DINO checkpoint.
        backbone: Content of the backbone's file, for the weights of a DINO classifier alone.

    Raises:
        ValueError: If the content is not of this format, or a tensor is unknown, missing or of
            another shape.
    """
    if checkpoint_format not in FORMATS:
        raise ValueError(
            f"`format` must be one of {', '.join(FORMATS)}, got {checkpoint_format!r}."
        )
    if checkpoint_format == "dino":
        return _convert_dino(entries, vocabulary or Vocabulary(), network, backbone)
    weights = unwrap(entries, "model")
    _check_format(weights, checkpoint_format)
    return FORMATS[checkpoint_format](weights, vocabulary)


def convert_file(
    checkpoint: str | Path,
    output: str | Path,
    checkpoint_format: str,
    *,
    dtype: torch.dtype = torch.float32,
    vocabulary: str | Path | None = None,
    network: Literal["teacher", "student"] = "teacher",
    backbone: str | Path | None = None,
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

    Raises:
        ValueError: If the file does not convert, or the folder is there already.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"The output folder {output} exists already; name a new one.")
    converted = convert_checkpoint(
        read_checkpoint(checkpoint),
        checkpoint_format,
        vocabulary=None if vocabulary is None else read_vocabulary(vocabulary),
        network=network,
        backbone=None if backbone is None else read_checkpoint(backbone),
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


def _convert_detr(weights: Weights, vocabulary: Vocabulary | None) -> ConvertedCheckpoint:
    names = vocabulary or _known_vocabulary("coco", weights["class_embed.weight"].shape[0] - 1)
    config = SgtrDetrConfig(
        backbone_config=_resnet_config(weights, r"^backbone\.0\.body\.layer(\d)\.(\d+)\.conv1", 1),
        **_detector_sizes(weights),
        id2label=_number("labels", names.labels, weights["class_embed.weight"].shape[0] - 1),
    )
    model = SgtrDetrForObjectDetection(config)
    return ConvertedCheckpoint(
        model, SgtrImageProcessor(), fill(model, rename(weights, formats.DETR))
    )


def _convert_sgtr(
    name: str, weights: Weights, vocabulary: Vocabulary | None
) -> ConvertedCheckpoint:
    settings = _SGTR_SETTINGS[name]
    renamed = rename(weights, formats.SGTR)
    names = vocabulary or _known_vocabulary(
        settings["vocabulary"], weights["class_embed.weight"].shape[0] - 1
    )
    detector_alone = "relation_decoder.rel_query_embed.weight" not in weights
    config = SgtrConfig(
        detector_config=_sgtr_detector_config(weights, names, settings),
        **(
            {"id2predicate": _number("predicates", names.predicates, settings["num_predicates"])}
            if detector_alone
            else _relation_sizes(weights, names, settings["predicate_classification"])
        ),
        predicate_classification=settings["predicate_classification"],
        entity_box_embedding=False,
        legacy_pixel_distance=True,
        legacy_triplet_matching=True,
        legacy_focal_normalization=True,
        **settings["relation_weights"],
    )
    model = SgtrForSceneGraphGeneration(config)
    if detector_alone:
        renamed.tensors.update(_indicator_heads(renamed.tensors))
    image_processor = SgtrImageProcessor(
        size=settings["size"],
        channel_order="bgr",
        do_rescale=False,
        image_mean=[103.53, 116.28, 123.675],
        image_std=[1.0, 1.0, 1.0],
        legacy_box_offset=1e-3,
        legacy_self_overlap=True,
        legacy_duplicate_ranking=True,
        legacy_round_sides=True,
        legacy_single_predicate=settings["predicate_classification"] == "softmax",
    )
    is_new = re.compile(r"predicate|relation_vector") if detector_alone else None
    return ConvertedCheckpoint(model, image_processor, fill(model, renamed, is_new))


def _sgtr_detector_config(
    weights: Weights, names: Vocabulary, settings: Mapping[str, Any]
) -> SgtrDetrConfig:
    backbone = _resnet_config(weights, r"^backbone\.res(\d)\.(\d+)\.conv1\.weight", 2)
    # The MSRA ResNets stride in the first 1x1 convolution of a block.
    backbone.downsample_in_bottleneck = True
    return SgtrDetrConfig(
        backbone_config=backbone,
        legacy_box_offset=1e-3,
        legacy_unweighted_auxiliary_losses=True,
        **settings["entity_weights"],
        **_detector_sizes(weights),
        id2label=_number("labels", names.labels, weights["class_embed.weight"].shape[0] - 1),
    )


def _relation_sizes(weights: Weights, names: Vocabulary, classification: str) -> dict[str, Any]:
    rows = weights["rel_class_embed.weight"].shape[0]
    num_predicates = rows - (classification == "softmax")
    return {
        "id2predicate": _number("predicates", names.predicates, num_predicates),
        "num_predicate_queries": weights["relation_decoder.rel_query_embed.weight"].shape[0],
        "predicate_encoder_layers": _count(weights, r"^relation_decoder\.encoder\.layers\.(\d+)\."),
        "predicate_decoder_layers": _count(
            weights, r"^relation_decoder\.rel_ent_crs_decoder_layers_sub\.(\d+)\."
        ),
        "feed_forward_dim": weights["relation_decoder.encoder.layers.0.linear1.weight"].shape[0],
    }


def _indicator_heads(detector: Weights) -> Weights:
    """Start both indicators as copies of the detector's heads, as the release does."""
    heads = {
        "model.detector.class_head.": "class_head.",
        "model.detector.model.decoder.box_head.": "box_head.",
    }
    return {
        f"{role}_{target}{name.removeprefix(source)}": tensor
        for source, target in heads.items()
        for name, tensor in detector.items()
        if name.startswith(source)
        for role in ("subject", "object")
    }


def _convert_dino(
    entries: Mapping[str, Any],
    vocabulary: Vocabulary,
    network: str,
    backbone: Mapping[str, Any] | None,
) -> ConvertedCheckpoint:
    classifier = unwrap(entries, "state_dict")
    if "linear.weight" in classifier:
        return _convert_dino_classifier(classifier, vocabulary, network, backbone)
    weights = _dino_backbone(entries, network)
    model = DinoVitModel(_dino_config(weights))
    report = fill(model, rename(weights, formats.DINO))
    return ConvertedCheckpoint(model, DinoVitImageProcessor(), report)


def _convert_dino_classifier(
    classifier: Weights,
    vocabulary: Vocabulary,
    network: str,
    backbone: Mapping[str, Any] | None,
) -> ConvertedCheckpoint:
    if backbone is None:
        raise ValueError(
            "The file holds the weights of a linear classifier alone; give the file of its "
            "backbone with `--backbone`."
        )
    weights = _dino_backbone(backbone, network)
    config = _dino_config(weights)
    rows, columns = classifier["linear.weight"].shape
    num_vectors, remainder = divmod(columns, config.d_model)
    if remainder or not num_vectors:
        raise ValueError(
            f"`linear.weight` has {columns} columns, which a backbone of width {config.d_model} "
            "cannot fill; is it the backbone of another model?"
        )
    # Base models show it class token and mean patch, small ones the class tokens of four layers.
    config.classify_patch_mean = num_vectors == 2  # noqa: PLR2004
    config.num_classification_layers = 1 if config.classify_patch_mean else num_vectors
    config.id2label = _number("labels", vocabulary.labels, rows)
    config.label2id = {name: index for index, name in config.id2label.items()}
    model = DinoVitForImageClassification(config)
    renamed = rename(weights, formats.DINO)
    linear = rename(classifier, formats.DINO_CLASSIFIER)
    tensors = {f"model.{name}": tensor for name, tensor in renamed.tensors.items()}
    both = RenamedWeights(
        tensors | linear.tensors, renamed.used + linear.used, renamed.unused + linear.unused
    )
    return ConvertedCheckpoint(model, DinoVitImageProcessor(), fill(model, both))


def _dino_backbone(entries: Mapping[str, Any], network: str) -> Weights:
    weights = unwrap(entries, network)
    weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    _check_format(weights, "dino")
    return weights


def _dino_config(weights: Weights) -> DinoVitConfig:
    width, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    side = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return DinoVitConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        num_channels=channels,
        d_model=width,
        num_hidden_layers=_count(weights, r"^blocks\.(\d+)\."),
        # Of 64 numbers in all released models.
        num_attention_heads=width // 64,
        feed_forward_dim=weights["blocks.0.mlp.fc1.weight"].shape[0],
    )


# A name that only files of a format have.
_SIGNATURES = {
    "detr": re.compile(r"^backbone\.0\.body\."),
    "dino": re.compile(r"^patch_embed\.proj\."),
    "sgtr": re.compile(r"^backbone\.(stem|res\d)\."),
}
FORMATS: dict[str, Callable[[Weights, Vocabulary | None], ConvertedCheckpoint]] = {
    "detr": _convert_detr,
    "dino": lambda weights, names: _convert_dino(weights, names or Vocabulary(), "teacher", None),
    "sgtr-vg150": lambda weights, names: _convert_sgtr("sgtr-vg150", weights, names),
    "sgtr-openimages": lambda weights, names: _convert_sgtr("sgtr-openimages", weights, names),
}


def _check_format(weights: Weights, checkpoint_format: str) -> None:
    """Say what the file seems to be if it is something else."""
    family = checkpoint_format.partition("-")[0]
    found = _likely_format(weights)
    if found is None or found.partition("-")[0] != family:
        likely = f"it looks like `{found}`" if found else "it looks like none of the known formats"
        raise ValueError(
            f"The file is not of the format `{checkpoint_format}`: {likely}. Its first names are "
            f"{list_names(list(weights))}."
        )
    if "-" in found and found != checkpoint_format:
        raise ValueError(
            f"The file is not of the format `{checkpoint_format}`: its predicate head has "
            f"{'a' if found == 'sgtr-openimages' else 'no'} background, as `{found}` has."
        )


def _likely_format(weights: Weights) -> str | None:
    families = (
        family
        for family, pattern in _SIGNATURES.items()
        if any(pattern.match(name) for name in weights)
    )
    family = next(families, None)
    background = weights.get("rel_criterion.empty_weight")
    if family != "sgtr" or background is None or "rel_class_embed.weight" not in weights:
        return family
    # One weight a predicate and one for background.
    has_background = len(background) == len(weights["rel_class_embed.weight"])
    return "sgtr-openimages" if has_background else "sgtr-vg150"


def _count(weights: Weights, pattern: str) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if not found:
        raise ValueError(
            f"The checkpoint is damaged or of another model: nothing like `{pattern}`."
        )
    return max(found) + 1


def _resnet_config(weights: Weights, block_pattern: str, first_stage: int) -> ResNetConfig:
    blocks = [match.groups() for name in weights if (match := re.match(block_pattern, name))]
    if not blocks:
        raise ValueError("The checkpoint has no ResNet backbone; only those can be converted.")
    depths = [0, 0, 0, 0]
    for stage, block in blocks:
        index = int(stage) - first_stage
        depths[index] = max(depths[index], int(block) + 1)
    return ResNetConfig(depths=depths, layer_type="bottleneck", out_features=["stage4"])


def _detector_sizes(weights: Weights) -> dict[str, Any]:
    return {
        "d_model": weights["query_embed.weight"].shape[1],
        "num_queries": weights["query_embed.weight"].shape[0],
        "encoder_layers": _count(weights, r"^transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(weights, r"^transformer\.decoder\.layers\.(\d+)\."),
        "feed_forward_dim": weights["transformer.encoder.layers.0.linear1.weight"].shape[0],
    }


def _known_vocabulary(name: str | None, num_labels: int) -> Vocabulary:
    """Names of a public data set, if the checkpoint has as many classes."""
    if name is None:
        return Vocabulary()
    file = resources.files("sgtr_hf") / "assets" / "vocabularies" / f"{name}.json"
    vocabulary = Vocabulary(**json.loads(file.read_text()))
    return vocabulary if len(vocabulary.labels or ()) == num_labels else Vocabulary()


def _number(entry: str, names: Sequence[str] | None, count: int) -> dict[int, str]:
    if names is None:
        word = entry.removesuffix("s").upper()
        return {index: f"{word}_{index}" for index in range(count)}
    if len(names) != count:
        raise ValueError(
            f"`{entry}` of the vocabulary has {len(names)} names, but the checkpoint has {count}."
        )
    return dict(enumerate(map(str, names)))
