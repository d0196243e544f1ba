"""Annotations in the style of COCO, with relations, become tensors for training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from ..boxes import box_xyxy_to_cxcywh


_COUNT_LIMIT = 2**31

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
        ValueError: If an entry is missing, holds something else than numbers or points to nothing.
    """
    image_id = annotation.get("image_id")
    entries = annotation.get("annotations")
    if entries is None:
        raise ValueError(f"The annotation of image {image_id} lacks `annotations`.")
    _check_entries(entries, image_id)
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


def _check_entries(entries: Any, image_id: Any) -> None:
    if isinstance(entries, (str, Mapping)) or not isinstance(entries, Sequence):
        raise ValueError(
            f"Image {image_id}: `annotations` must be a list with a dictionary for each entity, "
            f"got {_shown(entries)}."
        )
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"Image {image_id}: `annotations[{number}]` must be a dictionary with `bbox` and "
                f"`category_id`, got {_shown(entry)}."
            )


def _boxes(entries: Sequence[Mapping[str, Any]], image_id: Any) -> np.ndarray:
    """Return (T, 4) x, y, width, height, checked all at once: this runs for every image."""
    rows = [entry.get("bbox") for entry in entries]
    boxes = _numbers(rows) if rows else np.zeros((0, 4))
    if boxes is not None and boxes.shape == (len(rows), 4) and np.isfinite(boxes).all():
        return boxes.astype(np.float64)
    for number, row in enumerate(rows):
        box = _numbers(row)
        if box is None or box.shape != (4,) or not np.isfinite(box).all():
            raise ValueError(
                f"Image {image_id}: `bbox` of `annotations[{number}]` must be four finite numbers "
                f"x, y, width, height, got {_shown(row)}."
            )
    return np.array([_numbers(row) for row in rows], dtype=np.float64)


def _class(entry: Mapping[str, Any], image_id: Any) -> int:
    label = entry.get("category_id")
    number = None if isinstance(label, (bool, str)) else _numbers(label)
    if number is None or number.shape != () or not _are_counts(number):
        raise ValueError(
            f"Image {image_id}: `category_id` must be a whole number and count from 0, got "
            f"{_shown(label)}."
        )
    return int(number)


def _relations(annotation: Mapping[str, Any], num_entities: int, image_id: Any) -> np.ndarray:
    rows = annotation.get("relations")
    # Another number of columns must not pass for triplets by being reshaped.
    table = _numbers([] if rows is None else rows)
    if table is not None and len(table.shape) and len(table) == 0:
        return np.zeros((0, 3), dtype=np.int64)
    if table is None or table.ndim != 2 or table.shape[1] != 3:  # noqa: PLR2004
        raise ValueError(
            f"Image {image_id}: `relations` must be rows of three whole numbers (subject, object, "
            f"predicate), got {_shown(rows)}."
        )
    is_right = np.stack([_are_counts(column) for column in table.T], axis=1)
    is_right[:, :2] &= table[:, :2] < num_entities
    if not is_right.all():
        row = table[~is_right.all(axis=1)][0].tolist()
        raise ValueError(
            f"Image {image_id}: the relation {row} (subject, object, predicate) of `relations` "
            "is not of whole numbers, or points to a missing entity or a negative predicate; "
            f"there are {num_entities} entities from 0."
        )
    return table.astype(np.int64)


def _numbers(values: Any) -> np.ndarray | None:
    """Make an array of lists, arrays or tensors; None if they hold something else than numbers."""
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    except (TypeError, ValueError):
        return None
    return array if array.dtype.kind in "iuf" else None


def _are_counts(numbers: np.ndarray) -> np.ndarray:
    """Which numbers are whole, not negative, and small enough for tensors."""
    return np.asarray((numbers >= 0) & (numbers < _COUNT_LIMIT) & (numbers == np.floor(numbers)))


def _shown(value: Any) -> str:
    """A value as it was given, cut off where it would fill the screen."""
    return f"{value!r:.100}"


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
