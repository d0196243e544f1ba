"""Box formats and overlaps; the only place where (cx, cy, w, h) meets (x1, y1, x2, y2).

All functions work on tensors of shape (..., 4) and keep dtype and device.
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor, offset: float = 0.0) -> Tensor:
    """Turn centre and size into corners.

    Args:
        boxes: (..., 4) as (cx, cy, w, h).
        offset: Added to x2 and y2; `legacy_box_offset` of the configuration.

    Returns:
        (..., 4) as (x1, y1, x2, y2).
    """
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half + offset), dim=-1)


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn corners into centre and size: (..., 4) to (..., 4)."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def scale_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Multiply normalised boxes by image sizes.

    Args:
        boxes: (B, N, 4) in either format, normalised to [0, 1].
        sizes: (B, 2) height and width in pixels.

    Returns:
        (B, N, 4) in pixels.
    """
    height, width = sizes.to(boxes).unbind(-1)
    return boxes * torch.stack((width, height, width, height), dim=-1)[:, None]


def box_area(boxes: Tensor) -> Tensor:
    """Areas of (..., 4) corners as (...); zero where a box is turned inside out."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of boxes that broadcast against each other.

    Args:
        boxes1: (..., 4) corners. For all pairs pass `a[..., :, None, :]` and `b[..., None, :, :]`.
        boxes2: (..., 4) corners.

    Returns:
        (...) in [0, 1]; 0 where both boxes are empty.
    """
    intersection, union = _intersection_and_union(boxes1, boxes2)
    return _safe_ratio(intersection, union)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised intersection over union (Rezatofighi et al. 2019) of broadcasting boxes.

    Args:
        boxes1: (..., 4) corners. For all pairs pass `a[..., :, None, :]` and `b[..., None, :, :]`.
        boxes2: (..., 4) corners.

    Returns:
        (...) in [-1, 1].
    """
    intersection, union = _intersection_and_union(boxes1, boxes2)
    hull_size = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(
        boxes1[..., :2], boxes2[..., :2]
    )
    hull = hull_size.clamp(min=0).prod(-1)
    return _safe_ratio(intersection, union) - _safe_ratio(hull - union, hull)


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(
        boxes1[..., :2], boxes2[..., :2]
    )
    intersection = overlap.clamp(min=0).prod(-1)
    return intersection, box_area(boxes1) + box_area(boxes2) - intersection


def _safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # A box without area gives 0 / 0; the ratio is then 0 and has no gradient.
    return numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
