"""What lies between images and the detector's transformer: checks, backbone, projections."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, PreTrainedModel

from ..configuration.configuration_dino_vit import DinoVitConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from .backbone_freezing import supported_attention
from .modeling_dino_vit import DinoVitBackbone


def check_images(pixel_values: Any, pixel_mask: Tensor | None) -> None:
    """Reject images or a mask of another kind or shape than `SgtrDetrModel` takes.

    Raises:
        TypeError: If `pixel_values` is no tensor of floats.
        ValueError: If it, or the mask, has another shape.
    """
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        kind = getattr(pixel_values, "dtype", type(pixel_values).__name__)
        raise TypeError(
            f"`pixel_values` must be a tensor of floats, got {kind}; an image processor makes it."
        )
    if pixel_values.ndim != 4:  # noqa: PLR2004 - the dimensions of a batch of images
        raise ValueError(
            "`pixel_values` must have shape (batch, 3, height, width), got "
            f"{tuple(pixel_values.shape)}."
        )
    expected = (len(pixel_values), *pixel_values.shape[-2:])
    if pixel_mask is not None and tuple(pixel_mask.shape) != expected:
        raise ValueError(
            f"`pixel_mask` must have shape {expected}, as `pixel_values` have, got "
            f"{tuple(pixel_mask.shape)}."
        )


def make_backbone(config: SgtrDetrConfig) -> PreTrainedModel:
    """Make the backbone; ours by its class, since `AutoBackbone` knows it only as registered.

    Remote code of a configuration and of a model are loaded apart, so classes cannot be compared.
    """
    # `dtype` of `from_pretrained` reaches configurations one level deep; without it a backbone
    # would keep what its own configuration was saved with.
    dtype = torch.get_default_dtype()
    backbone_config: Any = config.backbone_config
    if getattr(backbone_config, "model_type", None) == DinoVitConfig.model_type:
        return DinoVitBackbone._from_config(backbone_config, dtype=dtype)
    asked = backbone_config._attn_implementation
    if asked is not None and type(backbone_config) in MODEL_FOR_BACKBONE_MAPPING:
        # transformers hands a backend on to all, but convolutions support none.
        backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(backbone_config)]
        backbone_config._attn_implementation = supported_attention(backbone_class, asked)
    return AutoBackbone.from_config(backbone_config, dtype=dtype)


def input_projection(channels: int, config: SgtrDetrConfig) -> nn.Module:
    """Make what maps a level of the backbone, (B, channels, H, W), to the transformer's width."""
    projection = nn.Conv2d(channels, config.d_model, kernel_size=1)
    if not config.normalize_input_projection:
        return projection
    return nn.Sequential(projection, nn.GroupNorm(config.num_attention_heads, config.d_model))
