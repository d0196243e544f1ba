"""Matching of predictions with annotations by the Hungarian method, as in DETR.

B images, T annotated entities (padded), R annotated relations (padded), L decoder levels, N entity
queries, Q queries of any kind, C entity classes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.import_utils import is_scipy_available

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig


if is_scipy_available():
    from scipy.optimize import linear_sum_assignment


BOX_SIZE = 4
RELATION_SIZE = 3
# Normalised boxes may stick out a little after a crop; pixels are far beyond this.
NORMALIZED_BOX_LIMIT = 2.0


class LossCounts(NamedTuple):
    """What losses are divided by: averages over the processes and the batches of an update.

    Gradients are averaged over processes and batches too; a sum over such a count is therefore the
    same whichever of them an image falls to.
    """

    images: Tensor
    """Scalar float32."""
    entities: Tensor
    """Scalar, of annotated entities."""
    predicates: Tensor
    """(P,) annotated relations of each predicate; empty for a detector."""
    repeated_predicates: Tensor
    """(P,) the same, as often as the earlier levels assign each relation."""
    least: Tensor
    """Scalar: one in the whole update, which is the least to divide by."""

    def at_least_one(self, count: Tensor) -> Tensor:
        """Keep the losses of an update without annotations finite."""
        return torch.maximum(count, self.least)


class PaddedAnnotations(NamedTuple):
    """Annotations of B images, padded to the most entities and relations of one image."""

    class_labels: Tensor
    """(B, T) int64 classes from 0; 0 on padding."""
    boxes: Tensor
    """(B, T, 4) cxcywh relative to the image; 0 on padding."""
    valid: Tensor
    """(B, T) boolean, False on padding."""
    relations: Tensor
    """(B, R, 3) int64 subject, object (indices of entities) and predicate from 0."""
    relation_valid: Tensor
    """(B, R) boolean, False on padding."""
    noise_seeds: Tensor | None = None
    """(B,) int64 seed of each image's noise; None if the noise may be any."""
    counts: LossCounts | None = None
    """Of the update that the images belong to; None if these images are all of it."""


class AssignmentProblem(NamedTuple):
    """Costs of giving each query each annotation, for L levels of B images."""

    costs: Tensor
    """(L, B, Q, T) float."""
    valid: Tensor
    """(B, T) boolean, False on padding."""
    queries_field: str = "num_queries"
    """Setting that says how many queries there are; named in errors."""


def pad_annotations(
    labels: Sequence[dict[str, Tensor]],
    device: torch.device | str,
    *,
    num_classes: int,
    num_predicates: int | None = None,
) -> PaddedAnnotations:
    """Check the annotations of a batch and pad them to common sizes.

    Args:
        labels: One dict an image: class_labels (T,), boxes (T, 4) and, if `num_predicates` is
            given, relations (R, 3). A whole number noise_seed, if each has one, decides how the
            annotations of the image are noised for denoising queries.
        device: Where the result lies.
        num_classes: Number of entity classes.
        num_predicates: Number of predicates; None ignores relations (then R is 0).

    Raises:
        TypeError: If there is no list of dicts.
        ValueError: If an entry is missing, has a wrong shape or a value out of range.
    """
    if not isinstance(labels, (list, tuple)) or not all(isinstance(one, dict) for one in labels):
        raise TypeError(
            f"`labels` must be a list with one dict an image, got {type(labels).__name__}."
        )
    if not labels:
        raise ValueError("`labels` must hold one dict an image, got none.")
    for image, label in enumerate(labels):
        _check_entry(image, label, "class_labels", ())
        _check_entry(image, label, "boxes", (BOX_SIZE,))
        _check_lengths(image, label)
        if num_predicates is not None:
            _check_entry(image, label, "relations", (RELATION_SIZE,))
    classes = [label["class_labels"].to(device, torch.int64) for label in labels]
    boxes = [label["boxes"].to(device, torch.float32) for label in labels]
    if num_predicates is None:
        relations = [torch.zeros((0, RELATION_SIZE), dtype=torch.int64, device=device)] * len(
            labels
        )
    else:
        relations = [label["relations"].to(device, torch.int64) for label in labels]
    seeds = [label["noise_seed"] for label in labels if "noise_seed" in label]
    annotations = PaddedAnnotations(
        class_labels=pad_sequence(classes, batch_first=True),
        boxes=pad_sequence(boxes, batch_first=True),
        valid=_valid_prefix([len(entry) for entry in classes], device),
        relations=pad_sequence(relations, batch_first=True),
        relation_valid=_valid_prefix([len(entry) for entry in relations], device),
        noise_seeds=torch.stack(seeds).to(device) if len(seeds) == len(labels) else None,
    )
    _check_values(annotations, num_classes, num_predicates or 0)
    return annotations


@torch.no_grad()
def entity_matching_costs(
    config: SgtrDetrConfig, logits: Tensor, boxes: Tensor, annotations: PaddedAnnotations
) -> Tensor:
    """Compute the cost of giving each entity query each annotated entity.

    Args:
        config: Gives the weights, the kind of classification and the legacy box offset.
        logits: (L, B, N, C + 1) for softmax with no-object last, or (L, B, N, C) for focal.
        boxes: (L, B, N, 4) cxcywh relative to the image.
        annotations: T annotated entities an image.

    Returns:
        (L, B, N, T). Columns of padding have no meaning.
    """
    labels = annotations.class_labels[None, :, None].expand(*logits.shape[:-1], -1)
    class_cost = _class_costs(config, logits.float()).gather(-1, labels)
    boxes, targets = boxes.float()[..., :, None, :], annotations.boxes[:, None]
    box_cost = (boxes - targets).abs().sum(-1)
    giou = generalized_box_iou(
        box_cxcywh_to_xyxy(boxes, config.legacy_box_offset),
        box_cxcywh_to_xyxy(targets, config.legacy_box_offset),
    )
    return (
        config.class_cost_weight * class_cost
        + config.box_cost_weight * box_cost
        - config.giou_cost_weight * giou
    )


def assign(costs: Tensor, valid: Tensor) -> Tensor:
    """Give each annotation its own query at the lowest total cost, level by level.

    Args:
        costs: (L, B, Q, T) float.
        valid: (B, T) boolean, False on padding.

    Returns:
        (L, B, T) int64 query of each annotation, -1 on padding.

    Raises:
        ValueError: If costs are not finite or an image has more annotations than queries.
        ImportError: If scipy is not installed.
    """
    return assign_all(AssignmentProblem(costs, valid))[0]


# Of numpy and scipy, which `torch.compile` must not look into.
@torch.compiler.disable
def assign_all(*problems: AssignmentProblem) -> tuple[Tensor, ...]:
    """Solve several problems after a single copy to the host; see `assign`.

    Args:
        *problems: Their tensors lie on one device.

    Returns:
        For each problem (L, B, T) int64 query of each annotation, -1 on padding.

    Raises:
        ValueError: If costs are not finite or an image has more annotations than queries.
        ImportError: If scipy is not installed.
    """
    tensors = [tensor for problem in problems for tensor in (problem.costs, problem.valid)]
    host = copy_to_host(*tensors)
    solutions = []
    for problem in problems:
        costs, valid = next(host), next(host) > 0
        levels, images, num_queries, num_annotations = costs.shape
        _check_counts(valid, num_queries, problem.queries_field)
        matches = np.full((levels, images, num_annotations), -1, dtype=np.int64)
        for level, image in np.ndindex(levels, images):
            matches[level, image, valid[image]] = solve(costs[level, image][:, valid[image]])
        solutions.append(torch.from_numpy(matches).to(problem.costs.device))
    return tuple(solutions)


def copy_to_host(*tensors: Tensor) -> Iterator[np.ndarray]:
    """Copy tensors of one device to the host at once, as float arrays of the same shapes."""
    wide = [
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]
    flat = torch.cat([tensor.flatten() for tensor in wide]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(flat, ends[:-1])
    return (part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))


def solve(costs: np.ndarray) -> np.ndarray:
    """Return the row (T,) of each column of costs (Q, T), where Q is at least T.

    Raises:
        ValueError: If costs are not finite.
        ImportError: If scipy is not installed.
    """
    if not is_scipy_available():
        raise ImportError("Matching needs scipy, which is not installed: `pip install scipy`.")
    if not np.isfinite(costs).all():
        raise ValueError(
            "Matching costs must be finite, got NaN or infinity: the model's outputs are not "
            "finite. Likely causes are a learning rate that is too high, float16 without loss "
            "scaling, missing gradient clipping, or images that hold NaN."
        )
    rows, columns = linear_sum_assignment(costs)
    return rows[np.argsort(columns)]


def _class_costs(config: SgtrDetrConfig, logits: Tensor) -> Tensor:
    """Cost of each class, of the shape of the logits."""
    if config.classification == "softmax":
        return -logits.softmax(-1)
    probabilities = logits.sigmoid()
    positive = -config.focal_alpha * (1 - probabilities) ** config.focal_gamma * logsigmoid(logits)
    negative = -(1 - config.focal_alpha) * probabilities**config.focal_gamma * logsigmoid(-logits)
    return positive - negative


def _valid_prefix(lengths: list[int], device: torch.device | str) -> Tensor:
    positions = torch.arange(max(lengths), device=device)
    return positions < torch.tensor(lengths, device=device)[:, None]


def _check_entry(
    image: int, label: dict[str, Tensor], field: str, entry_shape: tuple[int, ...]
) -> None:
    """Reject a missing field and a shape that is not (any number, *entry_shape)."""
    if field not in label:
        raise ValueError(
            f"`labels[{image}]` must have `{field}`, got {sorted(label)}. The image processor "
            "makes it from the annotations."
        )
    shape = tuple(label[field].shape)
    if len(shape) != 1 + len(entry_shape) or shape[1:] != entry_shape:
        expected = ", ".join(["n", *map(str, entry_shape)]) + ("" if entry_shape else ",")
        raise ValueError(
            f"`labels[{image}]['{field}']` must have shape ({expected}), got {shape}. An image "
            "without any has n = 0."
        )


def _check_lengths(image: int, label: dict[str, Tensor]) -> None:
    num_labels, num_boxes = len(label["class_labels"]), len(label["boxes"])
    if num_labels != num_boxes:
        raise ValueError(
            f"`labels[{image}]` must have a class for each box, got {num_labels} `class_labels` "
            f"and {num_boxes} `boxes`."
        )


def _check_values(annotations: PaddedAnnotations, num_classes: int, num_predicates: int) -> None:
    """Reject values out of range; one synchronisation with the device if all is well."""
    classes, boxes, valid, relations, relation_valid = annotations[:5]
    num_entities = valid.sum(1)[:, None]
    ends, predicates = relations[..., :2], relations[..., 2]
    checks: list[tuple[str, Tensor, Tensor, str]] = [
        (
            "class_labels",
            classes,
            valid & ~_in_range(classes, num_classes),
            f"from 0 to {num_classes - 1}; labels start at 0 and have no background class",
        ),
        (
            "boxes",
            boxes,
            valid & ~(boxes.abs() <= NORMALIZED_BOX_LIMIT).all(-1),
            "finite and relative to the image size (cx, cy, w, h), not pixels",
        ),
        (
            "boxes",
            boxes,
            valid & (boxes[..., 2:] < 0).any(-1),
            "(cx, cy, w, h) with a width and height of at least 0",
        ),
        (
            "relations",
            relations,
            relation_valid & ~_in_range(ends, num_entities[..., None]).all(-1),
            "(subject, object, predicate) with subject and object below the number of entities of "
            "the image",
        ),
        (
            "relations",
            relations,
            relation_valid & ~_in_range(predicates, num_predicates),
            f"(subject, object, predicate) with a predicate from 0 to {num_predicates - 1}; "
            "predicates start at 0 and have no background class",
        ),
    ]
    if not torch.stack([is_wrong.any() for _, _, is_wrong, _ in checks]).any():
        return
    field, values, is_wrong, accepted = next(check for check in checks if check[2].any())
    image, entry = is_wrong.nonzero()[0].tolist()
    raise ValueError(
        f"`labels[{image}]['{field}'][{entry}]` must be {accepted}, got "
        f"{values[image, entry].tolist()}."
    )


def _in_range(values: Tensor, end: Tensor | int) -> Tensor:
    return (values >= 0) & (values < end)


def _check_counts(valid: np.ndarray, num_queries: int, field: str) -> None:
    counts = valid.sum(1)
    most = int(counts.max(initial=0))
    if most > num_queries:
        raise ValueError(
            f"`{field}` must be at least the most annotations of an image, got {num_queries} for "
            f"the {most} of image {int(counts.argmax())}. Raise `{field}` or drop annotations."
        )
