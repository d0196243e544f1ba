"""Builds a model of the right sizes for each original format, and fills it with the weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    TimmBackboneConfig,
)

from ..configuration.configuration_dino_vit import DinoVitConfig
from ..configuration.configuration_sgtr import SgtrConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from ..image_processing.image_processing_dino_vit import DinoVitImageProcessor
from ..image_processing.image_processing_sgtr import SgtrImageProcessor
from ..modeling.modeling_dino_pretraining import DinoVitForPreTraining
from ..modeling.modeling_dino_vit import DinoVitForImageClassification, DinoVitModel
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection
from . import checkpoint_formats as formats
from .checkpoint_filling import (
    ConversionReport,
    RenamedWeights,
    Weights,
    fill,
    rename,
    unwrap,
)
from .checkpoint_reading import Vocabulary, number_names, public_vocabulary
from .checkpoint_recognition import check_format


# Settings in which the release's two configurations differ.
_SGTR_SETTINGS: dict[str, dict[str, Any]] = {
    "sgtr-vg150": {
        "vocabulary": "vg150",
        "num_predicates": 50,
        "predicate_classification": "focal",
        "entity_weights": {"box_loss_weight": 1.0, "giou_loss_weight": 1.0},
        "relation_settings": {
            "legacy_softmax_cost": True,
            "legacy_focal_normalization": True,
            "legacy_unweighted_auxiliary_predicates": True,
        },
        "size": {"shortest_edge": 600, "longest_edge": 1000},
    },
    "sgtr-openimages": {
        "vocabulary": "open_images",
        "num_predicates": 30,
        "predicate_classification": "softmax",
        "entity_weights": {},
        "relation_settings": {
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
_RESNETS = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}

Network = Literal["teacher", "student", "both"]


class ConvertedCheckpoint(NamedTuple):
    """A model with the weights of the file, and the image processor that goes with it."""

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    report: ConversionReport


class ConversionOptions(NamedTuple):
    """What a file does not say of itself; `convert_checkpoint` documents each."""

    vocabulary: Vocabulary | None = None
    network: Network = "teacher"
    backbone: Mapping[str, Any] | None = None
    dilated: bool | None = None


def _convert_detr(entries: Mapping[str, Any], options: ConversionOptions) -> ConvertedCheckpoint:
    weights = unwrap(entries, "model")
    check_format(weights, "detr")
    num_labels = _num_classes(weights)
    names = options.vocabulary or public_vocabulary("coco", num_labels)
    dilated = options.dilated
    if dilated is None:
        dilated = bool(training_setting(entries, "dilation"))
    backbone: PreTrainedConfig = _resnet_config(
        weights, r"^backbone\.0\.body\.layer(\d)\.(\d+)\.conv1", 1
    )
    if dilated:
        backbone = _dilated(backbone)
    config = SgtrDetrConfig(
        backbone_config=backbone,
        **_detector_sizes(weights),
        id2label=number_names("labels", names.labels, num_labels),
    )
    model = SgtrDetrForObjectDetection(config)
    renamed = rename(weights, formats.DETR_DC5 if dilated else formats.DETR)
    return ConvertedCheckpoint(
        model, SgtrImageProcessor(legacy_open_border=True), fill(model, renamed)
    )


def _convert_sgtr(
    entries: Mapping[str, Any], options: ConversionOptions, name: str
) -> ConvertedCheckpoint:
    weights = unwrap(entries, "model")
    check_format(weights, name)
    settings = _SGTR_SETTINGS[name]
    renamed = rename(weights, formats.SGTR)
    detector_alone = "relation_decoder.rel_query_embed.weight" not in weights
    is_softmax = settings["predicate_classification"] == "softmax"
    num_predicates = settings["num_predicates"]
    if not detector_alone:
        num_predicates = weights["rel_class_embed.weight"].shape[0] - is_softmax
    names = options.vocabulary or public_vocabulary(
        settings["vocabulary"], _num_classes(weights), num_predicates
    )
    config = SgtrConfig(
        detector_config=_sgtr_detector_config(weights, names, settings),
        id2predicate=number_names("predicates", names.predicates, num_predicates),
        **({} if detector_alone else _relation_sizes(weights)),
        predicate_classification=settings["predicate_classification"],
        entity_box_embedding=False,
        legacy_pixel_distance=True,
        legacy_triplet_matching=True,
        legacy_conflict_row=True,
        **settings["relation_settings"],
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
        legacy_open_border=True,
        legacy_self_overlap=True,
        legacy_duplicate_ranking=True,
        legacy_round_sides=True,
        legacy_single_predicate=is_softmax,
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
        id2label=number_names("labels", names.labels, _num_classes(weights)),
    )


def _relation_sizes(weights: Weights) -> dict[str, Any]:
    return {
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


def _convert_dino(entries: Mapping[str, Any], options: ConversionOptions) -> ConvertedCheckpoint:
    classifier = unwrap(entries, "state_dict")
    if "linear.weight" in classifier:
        return _convert_dino_classifier(classifier, options)
    if options.network == "both":
        return _convert_dino_pretraining(entries)
    weights = _dino_backbone(entries, options.network)
    model = DinoVitModel(_dino_config(weights))
    report = fill(model, rename(weights, formats.DINO))
    return ConvertedCheckpoint(model, DinoVitImageProcessor(), report)


def _convert_dino_pretraining(entries: Mapping[str, Any]) -> ConvertedCheckpoint:
    """Take all that a training goes on from but the state of its optimizer."""
    networks = {name: _dino_backbone(entries, name) for name in ("teacher", "student")}
    teacher, student = networks["teacher"], networks["student"]
    for name, weights in networks.items():
        if "head.last_layer.weight_g" not in weights:
            raise ValueError(
                f"The {name} has no projection head (`head.last_layer.weight_g`), without which "
                "training cannot go on; convert one network: `--network teacher`."
            )
    config = _dino_config(teacher)
    config.update(_dino_head_sizes(teacher))
    config.drop_path = float(training_setting(entries, "drop_path_rate") or 0.0)
    is_fixed = training_setting(entries, "norm_last_layer")
    if is_fixed is None:
        lengths = student["head.last_layer.weight_g"]
        is_fixed = lengths.equal(torch.ones_like(lengths))
    config.fixed_prototype_length = bool(is_fixed)
    tensors: Weights = {}
    used = 0
    for weights, prefix in ((teacher, ""), (student, "student.")):
        renamed = rename(weights, formats.DINO_PRETRAINING)
        used += renamed.used
        for name, tensor in renamed.tensors.items():
            tensors[prefix + (name if name.startswith("head.") else f"model.{name}")] = tensor
    # Files of other trainings, converted to this layout, may lack the state of the loss.
    loss = unwrap(entries["dino_loss"], "state_dict") if "dino_loss" in entries else {}
    if set(loss) - {"center"}:
        raise ValueError(f"`dino_loss` holds more than its `center`: {', '.join(loss)}.")
    if loss:
        tensors["center"] = loss["center"].flatten()
    both = RenamedWeights(tensors, used + len(loss), 0)
    model = DinoVitForPreTraining(config)
    report = fill(model, both, is_new=re.compile(r"^center$"))
    return ConvertedCheckpoint(model, DinoVitImageProcessor(), report)


def _dino_head_sizes(weights: Weights) -> dict[str, int]:
    num_prototypes, bottleneck = _shape(weights, "head.last_layer.weight_v")
    return {
        "num_prototypes": num_prototypes,
        "head_layers": sum(
            name.startswith("head.mlp.") and name.endswith(".weight") for name in weights
        ),
        "head_hidden_dim": _shape(weights, "head.mlp.0.weight")[0],
        "head_bottleneck_dim": bottleneck,
    }


def _convert_dino_classifier(
    classifier: Weights, options: ConversionOptions
) -> ConvertedCheckpoint:
    if options.backbone is None:
        raise ValueError(
            "The file holds the weights of a linear classifier alone; give the file of its "
            "backbone with `--backbone`."
        )
    if options.network == "both":
        raise ValueError("A classifier stands on one network: `network` cannot be `both`.")
    weights = _dino_backbone(options.backbone, options.network)
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
    names = options.vocabulary or Vocabulary()
    config.id2label = number_names("labels", names.labels, rows)
    config.label2id = {name: index for index, name in config.id2label.items()}
    model = DinoVitForImageClassification(config)
    renamed = rename(weights, formats.DINO)
    linear = rename(classifier, formats.DINO_CLASSIFIER)
    tensors = {f"model.{name}": tensor for name, tensor in renamed.tensors.items()}
    both = RenamedWeights(
        tensors | linear.tensors, renamed.used + linear.used, renamed.unused + linear.unused
    )
    return ConvertedCheckpoint(model, DinoVitImageProcessor(), fill(model, both))


def _dino_backbone(entries: Mapping[str, Any], network: Network) -> Weights:
    if network == "student" and network not in entries:
        raise ValueError("The file holds one network alone, not a teacher and a `student`.")
    weights = unwrap(entries, network)
    weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    check_format(weights, "dino")
    return weights


def _dino_config(weights: Weights) -> DinoVitConfig:
    width, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    side = round((_shape(weights, "pos_embed")[1] - 1) ** 0.5)
    return DinoVitConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        num_channels=channels,
        d_model=width,
        num_hidden_layers=_count(weights, r"^blocks\.(\d+)\."),
        # Of 64 numbers in all released models.
        num_attention_heads=width // 64,
        feed_forward_dim=_shape(weights, "blocks.0.mlp.fc1.weight")[0],
    )


def training_setting(entries: Mapping[str, Any], name: str) -> Any:
    """A setting of the training that wrote a full checkpoint; None if it is not there."""
    return getattr(entries.get("args"), name, None)


def _count(weights: Weights, pattern: str) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if not found:
        raise ValueError(
            f"The checkpoint is damaged or of another model: nothing like `{pattern}`."
        )
    return max(found) + 1


def _shape(weights: Weights, name: str) -> torch.Size:
    if name not in weights:
        raise ValueError(f"The checkpoint is damaged or of another model: it lacks `{name}`.")
    return weights[name].shape


def _num_classes(weights: Weights) -> int:
    # The last row is no-object.
    return _shape(weights, "class_embed.weight")[0] - 1


def _resnet_config(weights: Weights, block_pattern: str, first_stage: int) -> ResNetConfig:
    blocks = [match.groups() for name in weights if (match := re.match(block_pattern, name))]
    if not blocks:
        raise ValueError("The checkpoint has no ResNet backbone; only those can be converted.")
    depths = [0, 0, 0, 0]
    for stage, block in blocks:
        index = int(stage) - first_stage
        depths[index] = max(depths[index], int(block) + 1)
    return ResNetConfig(depths=depths, layer_type="bottleneck", out_features=["stage4"])


def _dilated(config: ResNetConfig) -> TimmBackboneConfig:
    """The same network with stride 16; the ResNet of transformers knows no dilation."""
    name = _RESNETS.get(tuple(config.depths))
    if name is None:
        raise ValueError(
            f"A dilated backbone must be a {' or '.join(_RESNETS.values())}, got one of "
            f"{config.depths} blocks."
        )
    return TimmBackboneConfig(backbone=name, out_indices=[4], output_stride=16)


def _detector_sizes(weights: Weights) -> dict[str, Any]:
    return {
        "d_model": _shape(weights, "query_embed.weight")[1],
        "num_queries": _shape(weights, "query_embed.weight")[0],
        "encoder_layers": _count(weights, r"^transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(weights, r"^transformer\.decoder\.layers\.(\d+)\."),
        "feed_forward_dim": _shape(weights, "transformer.encoder.layers.0.linear1.weight")[0],
    }


FORMATS: dict[str, Callable[[Mapping[str, Any], ConversionOptions], ConvertedCheckpoint]] = {
    "detr": _convert_detr,
    "dino": _convert_dino,
    "sgtr-vg150": lambda entries, options: _convert_sgtr(entries, options, "sgtr-vg150"),
    "sgtr-openimages": lambda entries, options: _convert_sgtr(entries, options, "sgtr-openimages"),
}
