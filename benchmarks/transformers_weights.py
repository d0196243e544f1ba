"""Weights of classes of transformers under the names of this package, for comparisons."""

import re
from collections.abc import Sequence

from torch import nn


Rules = Sequence[tuple[str, str]]

_LAYER_RULES: Rules = (
    (r"\.self_attn\.", ".self_attention."),
    (r"\.encoder_attn\.", ".cross_attention."),
    (r"\.self_attn_layer_norm\.", ".self_attention_norm."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attention_norm."),
    (r"\.final_layer_norm\.", ".feed_forward_norm."),
    (r"\.q_proj\.", ".query_projection."),
    (r"\.k_proj\.", ".key_projection."),
    (r"\.v_proj\.", ".value_projection."),
    (r"\.o_proj\.", ".output_projection."),
    (r"\.mlp\.fc1\.", ".feed_forward.expansion."),
    (r"\.mlp\.fc2\.", ".feed_forward.contraction."),
)
# `DetrForObjectDetection` with a backbone of transformers, as `SgtrDetrForObjectDetection`.
DETR_RULES: Rules = (
    (r"^model\.backbone\.model\.", "model.backbone."),
    (r"^model\.query_position_embeddings\.", "model.query_embedding."),
    (r"^model\.input_projection\.", "model.input_projections.0."),
    (r"^model\.encoder\.layers\.", "model.encoder_layers."),
    (r"^model\.decoder\.layernorm\.", "model.decoder.norm."),
    (r"^class_labels_classifier\.", "class_head."),
    (r"^bbox_predictor\.", "model.decoder.box_head."),
)
# `ViTModel` without its pooler, as `DinoVitModel`.
VIT_RULES: Rules = (
    (r"^embeddings\.cls_token", "embedding.class_token"),
    (r"^embeddings\.position_embeddings", "embedding.position"),
    (r"^embeddings\.patch_embeddings\.", "embedding."),
    (r"\.attention\.", ".self_attention."),
    (r"\.layernorm_before\.", ".self_attention_norm."),
    (r"\.layernorm_after\.", ".feed_forward_norm."),
    (r"^layernorm\.", "norm."),
)


def copy_weights(source: nn.Module, target: nn.Module, rules: Rules) -> None:
    """Copy all weights of a model of transformers.

    Raises:
        ValueError: If one of them has no place, or a place stays empty.
    """
    renamed = {}
    for original, tensor in source.state_dict().items():
        name = original
        for pattern, replacement in (*rules, *_LAYER_RULES):
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    result = target.load_state_dict(renamed, strict=False)
    # Counters of batch norms, which frozen ones do not have.
    missing = [name for name in result.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        raise ValueError(f"Without a source: {missing}; without a place: {result.unexpected_keys}.")
