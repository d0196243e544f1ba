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


def pair_geometry(subject_boxes: Tensor, object_boxes: Tensor) -> Tensor:
    """Describe how the box of an object lies to the box of a subject.

    Args:
        subject_boxes: (..., 4) cxcywh relative to the image.
        object_boxes: (..., 4) that broadcast against them.

    Returns:
        (..., 12): offset of the centres, relative to the image and to the mean size; offsets of
        top and bottom edges to the mean height; logarithms of the ratios of the sizes; shares of
        subject and object inside the other; IoU; logarithm of the ratio of the areas.
    """
    subject, object_ = (
        box_cxcywh_to_xyxy(boxes) for boxes in torch.broadcast_tensors(subject_boxes, object_boxes)
    )
    # A box of less than a thousandth of the image has no size worth a ratio.
    subject_size, object_size = (
        boxes[..., 2:].clamp(min=1e-3).expand_as(subject[..., 2:])
        for boxes in (subject_boxes, object_boxes)
    )
    mean_size = (subject_size + object_size) / 2
    shift = (object_boxes[..., :2] - subject_boxes[..., :2]).expand_as(mean_size)
    edges = (object_[..., 1::2] - subject[..., 1::2]) / mean_size[..., 1:]
    ratio = (object_size / subject_size).log()
    intersection, union = _intersection_and_union(subject, object_)
    parts = [
        intersection / subject_size.prod(-1),
        intersection / object_size.prod(-1),
        _safe_ratio(intersection, union),
        ratio.sum(-1),
    ]
    return torch.cat((shift, shift / mean_size, edges, ratio, torch.stack(parts, -1)), dim=-1)


PAIR_GEOMETRY_SIZE = 12


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(
        boxes1[..., :2], boxes2[..., :2]
    )
    intersection = overlap.clamp(min=0).prod(-1)
    return intersection, box_area(boxes1) + box_area(boxes2) - intersection


def _safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    # A box without area gives 0 / 0; the ratio is then 0 and has no gradient.
    return numerator / denominator.clamp(min=torch.finfo(denominator.dtype).tiny)
