"""Entities that the caller gives, instead of those that the detector finds.

Boxes alone make the task SGCls of the literature, boxes with classes PredCls.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..configuration.configuration_sgtr_detr import SgtrDetrConfig


# Probabilities of exactly 0 and 1 as logits, for all that a float16 can tell.
CERTAIN_LOGIT = 30.0


class GivenEntities(NamedTuple):
    """Entities of B images, padded to the most of one image."""

    boxes: Tensor
    """(B, N, 4) cxcywh relative to the image."""
    labels: Tensor | None
    """(B, N) classes from 0; None leaves them to the model."""
    valid: Tensor
    """(B, N) bool, False on padding."""


def pad_given_entities(
    config: SgtrDetrConfig,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor] | None,
    device: torch.device,
) -> GivenEntities:
    """Check given entities and pad them to a common number.

    Args:
        config: Of the detector, which needs anchor queries.
        boxes: For each image (E, 4) cxcywh relative to the image; E may be 0.
        labels: For each image (E,) classes from 0.
        device: Where the result lies.

    Raises:
        ValueError: If the detector's queries cannot take boxes, or shapes or values are wrong.
    """
    if config.query_type != "anchors":
        raise ValueError(
            "`entity_boxes` need a detector with anchor queries; the queries of this one are "
            'learned (`query_type="learned"`) and cannot be put on boxes.'
        )
    if not boxes or (labels is not None and len(labels) != len(boxes)):
        raise ValueError(
            "`entity_boxes` and `entity_labels` must have one entry for each image, got "
            f"{len(boxes)} and {'none' if labels is None else len(labels)}."
        )
    for image, entry in enumerate(boxes):
        _check_boxes(image, entry)
        if labels is not None:
            _check_labels(image, labels[image], len(entry), config.num_labels)
    counts = torch.tensor([len(entry) for entry in boxes], device=device)
    # An image without any still has a query, which is padding.
    most = max(int(counts.max()), 1)
    padded = pad_sequence(
        [
            *(entry.to(device, torch.float32) for entry in boxes),
            torch.zeros(most, 4, device=device),
        ],
        batch_first=True,
    )[:-1]
    padded_labels = None
    if labels is not None:
        rows = [entry.to(device, torch.int64) for entry in labels]
        rows.append(torch.zeros(most, dtype=torch.int64, device=device))
        padded_labels = pad_sequence(rows, batch_first=True)[:-1]
    valid = torch.arange(most, device=device) < counts[:, None]
    return GivenEntities(padded, padded_labels, valid)


def given_logits(config: SgtrDetrConfig, logits: Tensor, given: GivenEntities) -> Tensor:
    """Read class logits (B, N, C or C + 1) in the knowledge that a box holds an entity.

    Classes that are given are certain; else the probabilities of an entity's classes sum to 1, and
    none is left for no-object. Padding is no entity.
    """
    if given.labels is not None:
        certain = torch.full_like(logits, -CERTAIN_LOGIT)
        logits = certain.scatter(-1, given.labels[..., None], CERTAIN_LOGIT)
    elif config.classification == "softmax":
        logits = torch.cat(
            (logits[..., :-1], torch.full_like(logits[..., -1:], -CERTAIN_LOGIT)), dim=-1
        )
    else:
        log_probabilities = nn.functional.logsigmoid(logits).log_softmax(-1)
        # The logit of p is log p - log(1 - p), where 1 - p must not vanish.
        others = torch.log1p(-log_probabilities.exp().clamp(max=1 - math.exp(-CERTAIN_LOGIT / 2)))
        logits = log_probabilities - others
    nothing = torch.full_like(logits, -CERTAIN_LOGIT)
    if config.classification == "softmax":
        nothing[..., -1] = CERTAIN_LOGIT
    return torch.where(given.valid[..., None], logits, nothing)


def _check_boxes(image: int, boxes: Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4:  # noqa: PLR2004
        raise ValueError(
            f"`entity_boxes[{image}]` must have shape (num_entities, 4), got {tuple(boxes.shape)}."
        )
    centres, sizes = boxes[:, :2], boxes[:, 2:]
    is_right = (centres >= 0) & (centres <= 1) & (sizes > 0) & (sizes <= 1)
    if not is_right.all():
        row = int((~is_right.all(-1)).nonzero()[0])
        raise ValueError(
            f"`entity_boxes[{image}][{row}]` must be (cx, cy, w, h) relative to the image, with "
            f"sides above 0, got {boxes[row].tolist()}."
        )


def _check_labels(image: int, labels: Tensor, num_entities: int, num_classes: int) -> None:
    if labels.shape != (num_entities,):
        raise ValueError(
            f"`entity_labels[{image}]` must have a class for each of the {num_entities} boxes, got "
            f"shape {tuple(labels.shape)}."
        )
    if num_entities and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"`entity_labels[{image}]` must be classes from 0 to {num_classes - 1}, got "
            f"{labels.tolist()}."
        )
