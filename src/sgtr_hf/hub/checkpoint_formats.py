"""Key tables: the names of each original checkpoint format, and ours.

A table is read from top to bottom, each rule on what the rule before left. `<n>` in a replacement
counts one less and `<<n>>` two less than the original, whose stages begin at 1 or 2.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


Rules = Sequence[tuple[str, str]]


class KeyTable(NamedTuple):
    """How the names of one format become ours.

    Args:
        rules: Pattern and replacement.
        aliases: Pattern and replacement on names of one tensor that the file holds several times;
            all must be equal.
        unused: Names that have no use here.
        packed: Names of query, key and value in one tensor, in this order, up to the part that
            becomes `query`, `key` or `value`.
    """

    rules: Rules
    unused: re.Pattern[str]
    aliases: Rules = ()
    packed: re.Pattern[str] = re.compile(r"in_proj_")


# The number of a norm says its role, which differs between encoder and decoder layers.
_LAYERS: Rules = (
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attention_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.feed_forward_norm."),
    (r"(layers(?:_sub|_obj)?\.\d+)\.norm1\.", r"\1.self_attention_norm."),
    (r"(layers(?:_sub|_obj)?\.\d+)\.norm2\.", r"\1.cross_attention_norm."),
    (r"(layers(?:_sub|_obj)?\.\d+)\.norm3\.", r"\1.feed_forward_norm."),
    (r"\.(self_attn|multihead_attn)\.out_proj\.", r".\1.output_projection."),
    (r"\.(self_attn|multihead_attn)\.(query|key|value)\.", r".\1.\2_projection."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.multihead_attn\.", ".cross_attention."),
    (r"\.linear1\.", ".feed_forward.expansion."),
    (r"\.linear2\.", ".feed_forward.contraction."),
)
_DETECTOR: Rules = (
    (r"^transformer\.encoder\.layers\.", "model.encoder_layers."),
    (r"^transformer\.decoder\.layers\.", "model.decoder.layers."),
    (r"^transformer\.decoder\.norm\.", "model.decoder.norm."),
    (r"^input_proj\.", "model.input_projections.0."),
    (r"^query_embed\.", "model.query_embedding."),
    (r"^class_embed\.", "class_head."),
    (r"^bbox_embed\.", "model.decoder.box_head."),
)
_TORCHVISION_RESNET: Rules = (
    (r"^backbone\.0\.body\.conv1\.", "model.backbone.embedder.embedder.convolution."),
    (r"^backbone\.0\.body\.bn1\.", "model.backbone.embedder.embedder.normalization."),
    (r"^backbone\.0\.body\.layer(\d)\.(\d+)\.", r"model.backbone.encoder.stages.<\1>.layers.\2."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"(layers\.\d+)\.conv(\d)\.", r"\1.layer.<\2>.convolution."),
    (r"(layers\.\d+)\.bn(\d)\.", r"\1.layer.<\2>.normalization."),
)
_CVPODS_RESNET: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "model.backbone.embedder.embedder.normalization."),
    (r"^backbone\.stem\.conv1\.", "model.backbone.embedder.embedder.convolution."),
    (r"^backbone\.res(\d)\.(\d+)\.", r"model.backbone.encoder.stages.<<\1>>.layers.\2."),
    (r"\.shortcut\.norm\.", ".shortcut.normalization."),
    (r"\.shortcut\.(weight)", r".shortcut.convolution.\1"),
    (r"(layers\.\d+)\.conv(\d)\.norm\.", r"\1.layer.<\2>.normalization."),
    (r"(layers\.\d+)\.conv(\d)\.(weight)", r"\1.layer.<\2>.convolution.\3"),
)
_RELATIONS: Rules = (
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

DETR = KeyTable(
    rules=(*_LAYERS, *_TORCHVISION_RESNET, *_DETECTOR),
    unused=re.compile(r"empty_weight$|num_batches_tracked$"),
)
# A dilated backbone is timm's, whose names are those of torchvision.
DETR_DC5 = DETR._replace(
    rules=(*_LAYERS, (r"^backbone\.0\.body\.", "model.backbone._backbone."), *_DETECTOR)
)
_DETECTOR_OF_SGTR = (*_CVPODS_RESNET, *_DETECTOR)
SGTR = KeyTable(
    rules=(
        *_LAYERS,
        *_DETECTOR_OF_SGTR,
        # What became of the detector is a part of the whole.
        (r"^model\.", "model.detector.model."),
        (r"^class_head\.", "model.detector.class_head."),
        *_RELATIONS,
    ),
    # Parameters that never got a gradient, and buffers that follow from the configuration.
    unused=re.compile(
        r"^rel_query_embed\.|^rel_query_pos_embed\.|^rel_input_proj\.|empty_weight$"
        r"|^relation_decoder\.(predicate_decoder\.norm|entities_aware_decoder\.norm"
        r"|coord_points_embed|logits_embed|ent_pred_fuse_lyrnorm)\."
    ),
    aliases=(
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
    ),
)
DINO = KeyTable(
    rules=(
        (r"^cls_token$", "embedding.class_token"),
        (r"^pos_embed$", "embedding.position"),
        (r"^patch_embed\.proj\.", "embedding.projection."),
        (r"^blocks\.(\d+)\.", r"layers.\1."),
        (r"\.norm1\.", ".self_attention_norm."),
        (r"\.norm2\.", ".feed_forward_norm."),
        (r"\.attn\.(query|key|value)\.", r".self_attention.\1_projection."),
        (r"\.attn\.proj\.", ".self_attention.output_projection."),
        (r"\.mlp\.fc1\.", ".feed_forward.expansion."),
        (r"\.mlp\.fc2\.", ".feed_forward.contraction."),
    ),
    # The projection head serves training alone.
    unused=re.compile(r"^head\."),
    packed=re.compile(r"qkv\."),
)
DINO_PRETRAINING = DINO._replace(
    rules=(
        *DINO.rules,
        (r"^head\.mlp\.", "head.projection."),
        (r"^head\.last_layer\.weight_g$", "head.prototypes.length"),
        (r"^head\.last_layer\.weight_v$", "head.prototypes.direction"),
    ),
    unused=re.compile(r"(?!)"),
)
DINO_CLASSIFIER = KeyTable(rules=((r"^linear\.", "classifier."),), unused=re.compile(r"(?!)"))
