"""Where the class token looks: attention of the last layer, and the part that holds most of it.

B images, H heads, h x w patches.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ..modeling.modeling_dino_vit import DinoVitModel
from ..modeling.transformer_layers import EncoderLayer


@torch.inference_mode()
def class_attention(model: DinoVitModel, pixel_values: Tensor) -> Tensor:
    """Compute the attention of the last layer's class token to the patches.

    Only this row of the weights is computed, so that any attention backend will do and large
    images need no memory for the other rows.

    Args:
        model: In evaluation mode.
        pixel_values: (B, 3, H, W).

    Returns:
        (B, heads, h, w); what is missing to a sum of 1 went to the class token and registers.
    """
    last = cast(EncoderLayer, model.layers[-1])
    attention = last.self_attention
    inputs: list[Tensor] = []

    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0])

    hook = last.self_attention_norm.register_forward_pre_hook(note)
    try:
        model(pixel_values)
    finally:
        hook.remove()
    tokens = last.self_attention_norm(inputs[0])
    query = attention.split_heads(attention.query_projection(tokens[:, :1])).transpose(1, 2)
    key = attention.split_heads(attention.key_projection(tokens)).transpose(1, 2)
    # (B, heads, 1, tokens) -> (B, heads, tokens)
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
    height, width = (side // model.config.patch_size for side in pixel_values.shape[-2:])
    return weights[..., 1 + model.config.num_registers :].unflatten(-1, (height, width))


def most_attended(attention: Tensor, mass: float) -> Tensor:
    """Mark the fewest patches that hold a share of the attention.

    Args:
        attention: (..., h, w), not negative.
        mass: Share in [0, 1] of the attention on patches that the marked ones hold, at least.

    Returns:
        Boolean (..., h, w).

    Raises:
        ValueError: If `mass` is out of range.

    Source:
        DINO's `visualize_attention.py`: patches are added up from the smallest, and those stay
        whose sum exceeds 1 - mass.
    """
    if not 0 <= mass <= 1:
        raise ValueError(f"`mass` must be between 0 and 1, got {mass}.")
    flat = attention.flatten(-2).double()
    values, order = flat.sort(dim=-1, stable=True)
    shares = values / values.sum(-1, keepdim=True)
    is_kept = shares.cumsum(-1) > 1 - mass
    marked = torch.zeros_like(is_kept).scatter_(-1, order, is_kept)
    return marked.unflatten(-1, attention.shape[-2:])


def attention_jaccard(
    marked: Tensor, objects: Tensor, valid: Tensor | None = None
) -> Tensor | None:
    """Compare the marked patches with the objects of an image.

    Args:
        marked: Boolean (heads, height, width), in the resolution of the masks.
        objects: Boolean (objects, height, width).
        valid: Boolean (height, width), False where the annotation says nothing.

    Returns:
        Scalar: the mean over objects of the overlap (intersection over union) with the head that
        fits each best. None for an image without objects.

    Source:
        The protocol of DINO's figures on PASCAL VOC 2012: best head of each object; the mean over
        objects, then over images.
    """
    if not len(objects):
        return None
    if valid is not None:
        marked, objects = marked & valid, objects & valid
    heads, masks = (values.flatten(1).float() for values in (marked, objects))
    intersections = masks @ heads.T
    unions = masks.sum(1)[:, None] + heads.sum(1) - intersections
    return (intersections / unions.clamp(min=1)).amax(1).mean()


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Repeat the patches of (heads, h, w) to a size in pixels (height, width)."""
    resized = nn.functional.interpolate(maps[None].float(), size=size, mode="nearest")[0]
    return resized.to(maps.dtype)
