"""Brings checkpoints of the original implementations into this package's layout.

A key table is a list of (pattern, replacement) pairs on names. Packed attention weights are split,
aliases of one tensor are checked against each other, and every leftover is an error: a conversion
never loses a weight in silence.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ResNetConfig

from ..configuration.configuration_sgtr import SgtrConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig


Rules = Sequence[tuple[str, str]]

_ATTENTION_RULES: Rules = (
    (r"(self_attn|multihead_attn)\.out_proj\.", r"\1.output_projection."),
    (r"(self_attn|multihead_attn)\.(query|key|value)\.", r"\1.\2_projection."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.multihead_attn\.", ".cross_attention."),
    (r"\.linear1\.", ".feed_forward.expansion."),
    (r"\.linear2\.", ".feed_forward.contraction."),
)
# The number of a norm says its role, which differs between encoder and decoder layers.
_ENCODER_NORM_RULES: Rules = (
    (r"\.norm1\.", ".self_attention_norm."),
    (r"\.norm2\.", ".feed_forward_norm."),
)
_DECODER_NORM_RULES: Rules = (
    (r"\.norm1\.", ".self_attention_norm."),
    (r"\.norm2\.", ".cross_attention_norm."),
    (r"\.norm3\.", ".feed_forward_norm."),
)
_DETECTOR_RULES: Rules = (
    (r"^transformer\.encoder\.layers\.", "model.encoder_layers."),
    (r"^transformer\.decoder\.layers\.", "model.decoder.layers."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.norm."),
    (r"^input_proj\.", "model.input_projections.0."),
    (r"^query_embed\.", "model.query_embedding."),
    (r"^class_embed\.", "class_head."),
    (r"^bbox_embed\.", "model.decoder.box_head."),
)
_TORCHVISION_RESNET_RULES: Rules = (
    (r"^backbone\.0\.body\.conv1\.", "model.backbone.embedder.embedder.convolution."),
    (r"^backbone\.0\.body\.bn1\.", "model.backbone.embedder.embedder.normalization."),
    (r"^backbone\.0\.body\.layer(\d)\.(\d+)\.", r"model.backbone.encoder.stages.<\1>.layers.\2."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"(layers\.\d+)\.conv(\d)\.", r"\1.layer.<\2>.convolution."),
    (r"(layers\.\d+)\.bn(\d)\.", r"\1.layer.<\2>.normalization."),
)
_CVPODS_RESNET_RULES: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "model.backbone.embedder.embedder.normalization."),
    (r"^backbone\.stem\.conv1\.", "model.backbone.embedder.embedder.convolution."),
    (r"^backbone\.res(\d)\.(\d+)\.", r"model.backbone.encoder.stages.<<\1>>.layers.\2."),
    (r"\.shortcut\.norm\.", ".shortcut.normalization."),
    (r"\.shortcut\.(weight)", r".shortcut.convolution.\1"),
    (r"(layers\.\d+)\.conv(\d)\.norm\.", r"\1.layer.<\2>.normalization."),
    (r"(layers\.\d+)\.conv(\d)\.(weight)", r"\1.layer.<\2>.convolution.\3"),
)
_RELATION_RULES: Rules = (
    (r"^relation_decoder\.encoder\.", "generator.encoder."),
    (r"^relation_decoder\.predicate_decoder\.layers\.", "generator.decoder.predicate_layers."),
    (r"^relation_decoder\.entities_aware_decoder\.layers\.", "generator.decoder.object_layers."),
    (r"^relation_decoder\.rel_ent_crs_decoder_layers_sub\.", "generator.decoder.subject_layers."),
    (r"^relation_decoder\.rel_decoder_norm\.", "generator.decoder.predicate_norm."),
    (r"^relation_decoder\.rel_ent_crs_decoder_norm\.", "generator.decoder.indicator_norm."),
    (r"^relation_decoder\.ent_rel_fuse_fc_sub\.0\.", "generator.decoder.subject_fusion."),
    (r"^relation_decoder\.ent_rel_fuse_fc_obj\.0\.", "generator.decoder.object_fusion."),
    (r"^relation_decoder\.rel_query_embed\.", "generator.predicate_query_embedding."),
    (r"^relation_decoder\.rel_query_embed_sub\.", "generator.subject_query_embedding."),
    (r"^relation_decoder\.rel_query_embed_obj\.", "generator.object_query_embedding."),
    (r"^relation_decoder\.rel_q_gen\.layers\.0\.", "generator.compositional_queries.layer."),
    (r"^relation_decoder\.rel_q_gen\.norm\.", "generator.compositional_queries.norm."),
    (
        r"^relation_decoder\.ent_pos_sine_proj\.",
        "generator.compositional_queries.position_projection.",
    ),
    (r"^relation_decoder\.split_query\.1\.", "generator.compositional_queries.split."),
    (r"^generator\.", "model.predicate_node_generator."),
    (r"^rel_class_embed\.", "predicate_head."),
    (r"^rel_vector_embed\.", "relation_vector_head."),
    (r"^sub_class_embed\.0\.", "subject_class_head."),
    (r"^obj_class_embed\.0\.", "object_class_head."),
    (r"^sub_bbox_embed\.0\.", "subject_box_head."),
    (r"^obj_bbox_embed\.0\.", "object_box_head."),
)
# Names of one tensor in a released SGTR checkpoint: (alias, name that the tables know).
_SGTR_ALIASES: Rules = (
    (r"^relation_decoder\.(sub|obj)_(class|bbox)_embed\.", r"\1_\2_embed.0."),
    (r"^(sub|obj)_(class|bbox)_embed\.\d+\.", r"\1_\2_embed.0."),
    (
        r"^relation_decoder\.predicate_sub_decoder_layers\.",
        "relation_decoder.predicate_decoder.layers.",
    ),
    (
        r"^relation_decoder\.rel_ent_crs_decoder_layers_obj\.",
        "relation_decoder.entities_aware_decoder.layers.",
    ),
)
# Parameters that never got a gradient, and buffers that follow from the configuration.
_SGTR_UNUSED = re.compile(
    r"^rel_query_embed\.|^rel_query_pos_embed\.|^rel_input_proj\.|empty_weight$"
    r"|^relation_decoder\.(predicate_decoder\.norm|entities_aware_decoder\.norm"
    r"|coord_points_embed|logits_embed|ent_pred_fuse_lyrnorm)\."
)
_DETR_UNUSED = re.compile(r"empty_weight$")


class ConvertedCheckpoint(NamedTuple):
    """A configuration and the weights that fit it."""

    config: SgtrDetrConfig | SgtrConfig
    state_dict: dict[str, Tensor]


def convert_detr_checkpoint(
    state_dict: Mapping[str, Any], id2label: dict[int, str] | None = None
) -> ConvertedCheckpoint:
    """Convert a DETR checkpoint of facebookresearch/detr (ResNet, no dilation, no masks).

    Args:
        state_dict: Its weights by name, or the file's dictionary with a "model" entry.
        id2label: Names of the classes; numbered ones if None.

    Raises:
        ValueError: If a name is not known, or the sizes do not belong to a DETR.
    """
    weights = _prepare(state_dict, aliases=(), unused=_DETR_UNUSED)
    config = SgtrDetrConfig(
        backbone_config=_resnet_config(weights, r"^backbone\.0\.body\.layer(\d)\.(\d+)\.conv1", 1),
        **_detector_sizes(weights),
        **_label_names(weights, id2label),
    )
    rules = (*_TORCHVISION_RESNET_RULES, *_DETECTOR_RULES)
    return ConvertedCheckpoint(config, _rename_all(weights, rules))


def convert_sgtr_checkpoint(
    state_dict: Mapping[str, Any],
    id2label: dict[int, str] | None = None,
    id2predicate: dict[int, str] | None = None,
) -> ConvertedCheckpoint:
    """Convert a released SGTR checkpoint for Visual Genome; its quirks are switched on.

    Args:
        state_dict: Its weights by name, or the file's dictionary with a "model" entry.
        id2label: Names of the entity classes; numbered ones if None.
        id2predicate: Names of the predicates, without background; numbered ones if None.

    Raises:
        ValueError: If a name is not known, aliases of one tensor differ, or the sizes do not
            belong to an SGTR.
    """
    weights = _prepare(state_dict, aliases=_SGTR_ALIASES, unused=_SGTR_UNUSED)
    backbone = _resnet_config(weights, r"^backbone\.res(\d)\.(\d+)\.conv1\.weight", 2)
    # The MSRA ResNets stride in the first 1x1 convolution of a block.
    backbone.downsample_in_bottleneck = True
    detector = SgtrDetrConfig(
        backbone_config=backbone,
        legacy_box_offset=1e-3,
        legacy_unweighted_auxiliary_losses=True,
        box_loss_weight=1.0,
        giou_loss_weight=1.0,
        **_detector_sizes(weights),
        **_label_names(weights, id2label),
    )
    num_predicates = weights["rel_class_embed.weight"].shape[0]
    config = SgtrConfig(
        detector_config=detector,
        id2predicate=id2predicate or {i: f"PREDICATE_{i}" for i in range(num_predicates)},
        num_predicate_queries=weights["relation_decoder.rel_query_embed.weight"].shape[0],
        predicate_encoder_layers=_count(weights, r"^relation_decoder\.encoder\.layers\.(\d+)\."),
        predicate_decoder_layers=_count(
            weights, r"^relation_decoder\.predicate_decoder\.layers\.(\d+)\."
        ),
        feed_forward_dim=weights["relation_decoder.encoder.layers.0.linear1.weight"].shape[0],
        entity_box_embedding=False,
        legacy_pixel_distance=True,
        legacy_triplet_matching=True,
        legacy_focal_normalization=True,
    )
    rules = (*_CVPODS_RESNET_RULES, *_DETECTOR_RULES)
    is_relation = re.compile(r"^(relation_decoder\.|rel_|(sub|obj)_(class|bbox)_embed\.)")
    detector_weights = {k: v for k, v in weights.items() if not is_relation.match(k)}
    relation_weights = {k: v for k, v in weights.items() if is_relation.match(k)}
    converted = {
        f"model.detector.{name}": tensor
        for name, tensor in _rename_all(detector_weights, rules).items()
    }
    converted |= _rename_all(relation_weights, _RELATION_RULES)
    return ConvertedCheckpoint(config, converted)


def _prepare(
    state_dict: Mapping[str, Any], aliases: Rules, unused: re.Pattern[str]
) -> dict[str, Tensor]:
    """Unwrap the file, merge aliases, drop what has no use."""
    entries = state_dict.get("model", state_dict)
    weights: dict[str, Tensor] = {}
    for original, tensor in entries.items():
        name = _rename(original.removeprefix("module."), aliases)
        if unused.search(name):
            continue
        if name in weights and not torch.equal(weights[name], tensor):
            raise ValueError(
                f"`{original}` should be the same tensor as `{name}` but differs; "
                "the checkpoint was not written by the released code."
            )
        weights[name] = tensor
    return weights


def _rename_all(weights: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for original, tensor in weights.items():
        for name, part in _split_attention(original, tensor):
            norms = _DECODER_NORM_RULES if "decoder" in name else _ENCODER_NORM_RULES
            if ".encoder.layers." in name:
                norms = _ENCODER_NORM_RULES
            elif "rel_q_gen" in name:
                norms = _DECODER_NORM_RULES
            in_transformer = re.search(r"\.layers\.\d+\.|layers_(sub|obj)\.\d+\.", name)
            is_backbone = name.startswith("backbone.")
            layer_rules = (*norms, *_ATTENTION_RULES) if in_transformer and not is_backbone else ()
            renamed = _rename(name, (*layer_rules, *rules))
            if renamed == original:
                raise ValueError(f"`{original}` is not a weight of this kind of checkpoint.")
            converted[_shift_indices(renamed)] = part
    counters = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in converted
        if name.endswith("running_mean")
    }
    return converted | counters


def _rename(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _shift_indices(name: str) -> str:
    """Resolve <n> to n - 1 and <<n>> to n - 2: originals count stages from 1 or 2."""
    name = re.sub(r"<<(\d+)>>", lambda found: str(int(found[1]) - 2), name)
    return re.sub(r"<(\d+)>", lambda found: str(int(found[1]) - 1), name)


def _split_attention(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Cut packed query, key and value projections, in this order, apart."""
    if "in_proj_" not in name:
        return [(name, tensor)]
    return [
        (name.replace("in_proj_", f"{role}."), part.clone())
        for role, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    ]


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    found = {int(match[1]) for name in weights if (match := re.match(pattern, name))}
    if not found:
        raise ValueError(f"The checkpoint has no weight like `{pattern}`; is it of this kind?")
    return max(found) + 1


def _resnet_config(
    weights: Mapping[str, Tensor], block_pattern: str, first_stage: int
) -> ResNetConfig:
    blocks = [match.groups() for name in weights if (match := re.match(block_pattern, name))]
    if not blocks:
        raise ValueError("The checkpoint has no ResNet backbone; only those can be converted.")
    depths = [0, 0, 0, 0]
    for stage, block in blocks:
        index = int(stage) - first_stage
        depths[index] = max(depths[index], int(block) + 1)
    return ResNetConfig(depths=depths, layer_type="bottleneck", out_features=["stage4"])


def _detector_sizes(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        "d_model": weights["query_embed.weight"].shape[1],
        "num_queries": weights["query_embed.weight"].shape[0],
        "encoder_layers": _count(weights, r"^transformer\.encoder\.layers\.(\d+)\."),
        "decoder_layers": _count(weights, r"^transformer\.decoder\.layers\.(\d+)\."),
        "feed_forward_dim": weights["transformer.encoder.layers.0.linear1.weight"].shape[0],
    }


def _label_names(weights: Mapping[str, Tensor], id2label: dict[int, str] | None) -> dict[str, Any]:
    # The last class of the original head is no-object.
    num_labels = weights["class_embed.weight"].shape[0] - 1
    if id2label is not None and len(id2label) != num_labels:
        raise ValueError(
            f"`id2label` names {len(id2label)} classes, but the checkpoint has {num_labels}."
        )
    return {"id2label": id2label or {index: f"LABEL_{index}" for index in range(num_labels)}}
