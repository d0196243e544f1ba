"""Annotations in the style of COCO, with relations, become tensors for training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..boxes import box_xyxy_to_cxcywh


logger = logging.get_logger(__name__)


def make_labels(
    annotation: Mapping[str, Any], original_size: tuple[int, ...], size: tuple[int, ...]
) -> dict[str, Any]:
    """Turn the annotation of one image into the labels that the models take.

    Crowds and boxes without area inside the image go, with the relations that touch them; the
    relations that stay point to the right entities.

    Args:
        annotation: COCO style with "relations"; see `SgtrImageProcessorPil.preprocess`.
        original_size: Height and width that the boxes refer to.
        size: Height and width after resizing.

    Raises:
        ValueError: If an entry is missing or points to nothing.
    """
    image_id = annotation.get("image_id")
    entries = annotation.get("annotations")
    if entries is None:
        raise ValueError(f"The annotation of image {image_id} lacks `annotations`.")
    height, width = original_size
    limits = np.array([width, height, width, height], dtype=np.float64)
    boxes = _boxes(entries, image_id)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.minimum(np.maximum(boxes, 0.0), limits)
    classes = np.array([_class(entry, image_id) for entry in entries], dtype=np.int64)
    is_crowd = np.array([bool(entry.get("iscrowd", 0)) for entry in entries], dtype=np.bool_)
    is_kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & ~is_crowd
    relations = _remap(_relations(annotation, len(entries), image_id), is_kept, image_id)
    normalized = torch.from_numpy(boxes[is_kept] / limits)
    return {
        "class_labels": torch.from_numpy(classes[is_kept]),
        "boxes": box_xyxy_to_cxcywh(normalized).float(),
        "relations": torch.from_numpy(relations),
        "image_id": image_id,
        "orig_size": torch.tensor([height, width]),
        "size": torch.tensor(list(size)),
    }


def _boxes(entries: Sequence[Mapping[str, Any]], image_id: Any) -> np.ndarray:
    """Return (T, 4) x, y, width, height, checked all at once: this runs for every image."""
    rows = [entry.get("bbox") for entry in entries]
    try:
        boxes = np.array(rows, dtype=np.float64).reshape(len(rows), 4)
    except (TypeError, ValueError):
        boxes = np.full((len(rows), 4), np.nan)
    if np.isfinite(boxes).all():
        return boxes
    for row in rows:
        if row is None or len(row) != 4 or not np.isfinite(row).all():  # noqa: PLR2004
            raise ValueError(
                f"Image {image_id}: `bbox` must be four finite numbers x, y, width, height, got "
                f"{row}."
            )
    raise ValueError(f"Image {image_id}: each `bbox` must be four numbers, got {rows}.")


def _class(entry: Mapping[str, Any], image_id: Any) -> int:
    label = entry.get("category_id")
    if label is None or int(label) < 0:
        raise ValueError(f"Image {image_id}: `category_id` must count from 0, got {label}.")
    return int(label)


def _relations(annotation: Mapping[str, Any], num_entities: int, image_id: Any) -> np.ndarray:
    relations = np.array(annotation.get("relations") or [], dtype=np.int64).reshape(-1, 3)
    is_outside = (relations[:, :2] < 0) | (relations[:, :2] >= num_entities)
    if is_outside.any() or (relations[:, 2] < 0).any():
        row = relations[(is_outside.any(1)) | (relations[:, 2] < 0)][0].tolist()
        raise ValueError(
            f"Image {image_id}: the relation {row} (subject, object, predicate) points to a "
            f"missing entity or a negative predicate; there are {num_entities} entities from 0."
        )
    return relations


def _remap(relations: np.ndarray, is_kept: np.ndarray, image_id: Any) -> np.ndarray:
    """Number the entities that stay anew, and drop relations of those that go."""
    if is_kept.all():
        return relations
    stays = is_kept[relations[:, :2]].all(axis=1)
    logger.warning(
        "Image %s: dropped %d crowds or boxes without area inside the image, and %d relations of "
        "theirs.",
        image_id,
        int((~is_kept).sum()),
        int((~stays).sum()),
    )
    new_index = np.cumsum(is_kept) - 1
    kept = relations[stays].copy()
    kept[:, :2] = new_index[kept[:, :2]]
    return kept
