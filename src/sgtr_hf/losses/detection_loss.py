"""Losses of the detector, of all decoder levels at once, and the parts shared with scene graphs.

L decoder levels, B images, N entity queries, M denoising queries, T annotated entities (padded),
C entity classes. The last level is the prediction; the earlier ones are auxiliary.
"""

import torch
from torch import Tensor, distributed
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from .hungarian_matching import LossCounts, PaddedAnnotations


def detection_losses(
    config: SgtrDetrConfig,
    logits: Tensor,
    boxes: Tensor,
    annotations: PaddedAnnotations,
    matches: Tensor,
) -> dict[str, Tensor]:
    """Compute the weighted losses of classes and boxes.

    Args:
        config: Gives the weights, the kind of classification and the legacy switches.
        logits: (L, B, N, C + 1) for softmax with no-object last, or (L, B, N, C) for focal.
        boxes: (L, B, N, 4) cxcywh relative to the image.
        annotations: T annotated entities an image.
        matches: (L, B, T) query of each annotated entity, -1 for none.

    Returns:
        Scalars `loss_class`, `loss_box` and `loss_giou` of the last level, and the same with
        suffix `_0`, `_1`, ... of the earlier levels. Their sum is the loss.
    """
    counts = counts_of(annotations)
    num_boxes = counts.at_least_one(counts.entities)
    targets = scatter_to_queries(annotations.class_labels, matches, logits.shape[2], -1)
    divisor = entity_class_divisor(config, counts, counts.entities, logits.shape[2])
    class_loss = entity_class_loss(config, logits, targets, divisor)
    box_loss, giou_loss = box_losses(
        gather_queries(boxes, matches), annotations.boxes, matches >= 0, config.legacy_box_offset
    )
    return _weighted_losses(
        config, "loss_", class_loss, box_loss / num_boxes, giou_loss / num_boxes
    )


def denoising_losses(
    config: SgtrDetrConfig,
    logits: Tensor,
    boxes: Tensor,
    annotations: PaddedAnnotations,
    entity_indices: Tensor,
) -> dict[str, Tensor]:
    """Compute the weighted losses of denoising queries, whose annotations are known.

    Args:
        config: Gives the weights, the kind of classification and the legacy switches.
        logits: (L, B, M, C + 1) for softmax with no-object last, or (L, B, M, C) for focal.
        boxes: (L, B, M, 4) cxcywh relative to the image.
        annotations: T annotated entities an image.
        entity_indices: (B, M) annotation that each query must restore, -1 on padding.

    Returns:
        Scalars named as by `detection_losses`, with prefix `loss_denoising_`.

    Source:
        DN-DETR (Li et al. 2022): the losses of the detector over the number of noised entities.
        Softmax is ours: cross entropy of the noised entities alone, without no-object.
    """
    is_query = entity_indices >= 0
    counts = counts_of(annotations)
    # Every group restores every entity once.
    num_groups = entity_indices.shape[1] // max(annotations.valid.shape[1], 1)
    count = counts.at_least_one(counts.entities * num_groups)
    # Without entities in the whole batch there are no denoising queries either.
    targets = annotations.class_labels.gather(1, entity_indices.clamp(min=0))
    target_boxes = gather_entries(annotations.boxes, entity_indices)
    targets = targets.expand(logits.shape[:-1])
    if config.classification == "softmax":
        query_loss = cross_entropy(logits.float().movedim(-1, 1), targets, reduction="none")
    else:
        query_loss = focal_loss(
            logits.float(),
            one_hot(targets, logits.shape[-1]),
            config.focal_alpha,
            config.focal_gamma,
        ).sum(-1)
    class_loss = torch.where(is_query, query_loss, 0).sum((1, 2)) / count
    box_loss, giou_loss = box_losses(boxes, target_boxes, is_query, config.legacy_box_offset)
    return _weighted_losses(
        config, "loss_denoising_", class_loss, box_loss / count, giou_loss / count
    )


def count_annotations(
    annotations: PaddedAnnotations,
    num_predicates: int = 0,
    num_batches: int = 1,
    repetitions: Tensor | None = None,
) -> LossCounts:
    """Count what the losses of an update are divided by; every process must call it.

    Args:
        annotations: Of all images of this process in the update.
        num_predicates: P; 0 for a detector.
        num_batches: Batches of this process in the update, whose gradients are accumulated.
        repetitions: (B,) how often the earlier levels assign each relation; once if None.
    """
    is_relation = annotations.relation_valid.float()
    repeated = is_relation if repetitions is None else is_relation * repetitions[:, None]
    images = is_relation.new_tensor([len(annotations.valid)])
    totals = [images, annotations.valid.sum()[None].float()]
    if num_predicates > 0:
        predicates = annotations.relations[..., 2].flatten()
        totals += [
            weights.new_zeros(num_predicates).index_add_(0, predicates, weights.flatten())
            for weights in (is_relation, repeated)
        ]
    return _average_over_processes(torch.cat(totals), num_predicates, num_batches)


def _average_over_processes(totals: Tensor, num_predicates: int, num_batches: int) -> LossCounts:
    share = 1 / num_batches
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(totals)
        share /= distributed.get_world_size()
    averages = totals * share
    return LossCounts(
        images=averages[0],
        entities=averages[1],
        predicates=averages[2 : 2 + num_predicates],
        repeated_predicates=averages[2 + num_predicates :],
        least=averages.new_tensor(share),
    )


def counts_of(annotations: PaddedAnnotations, num_predicates: int = 0) -> LossCounts:
    """Return the counts of the update that the annotations belong to."""
    return annotations.counts or count_annotations(annotations, num_predicates)


def entity_class_divisor(
    config: SgtrDetrConfig, counts: LossCounts, num_positives: Tensor, num_queries: int
) -> Tensor:
    """Return what `entity_class_loss` is divided by, the same in all processes.

    Args:
        config: Gives the kind of classification and the no-object weight.
        counts: Of the update.
        num_positives: Scalar, queries with an entity, averaged like the counts.
        num_queries: N.
    """
    if config.classification == "focal":
        return counts.at_least_one(num_positives)
    # As in DETR, the mean over queries weighted by class.
    return num_positives + config.eos_coefficient * (counts.images * num_queries - num_positives)


def entity_class_loss(
    config: SgtrDetrConfig,
    logits: Tensor,
    targets: Tensor,
    divisor: Tensor | None,
    *,
    only_matched: bool = False,
) -> Tensor:
    """Classify queries as entities or no-object; unweighted.

    Args:
        config: Gives the kind of classification, and alpha and gamma or the no-object weight.
        logits: (L, B, N, C + 1) for softmax with no-object last, or (L, B, N, C) for focal.
        targets: (L, B, N) classes, -1 for no-object.
        divisor: Scalar by `entity_class_divisor`; None, for softmax alone, averages over the
            queries of this batch.
        only_matched: Leave queries without a class out instead of taking them for no-object.

    Returns:
        (L,) loss of each level.
    """
    if config.classification == "softmax":
        no_object = logits.shape[-1] - 1
        class_weights = logits.new_ones(no_object + 1, dtype=torch.float32)
        class_weights[no_object] = 0.0 if only_matched else config.eos_coefficient
        return weighted_cross_entropy(
            logits, torch.where(targets >= 0, targets, no_object), class_weights, divisor
        )
    if divisor is None:
        raise ValueError("The focal loss has no weights to average by; give `divisor`.")
    loss = focal_loss(
        logits.float(), one_hot_or_zeros(targets, logits), config.focal_alpha, config.focal_gamma
    )
    if only_matched:
        loss = torch.where((targets >= 0)[..., None], loss, 0)
    return loss.sum((1, 2, 3)) / divisor


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, class_weights: Tensor, divisor: Tensor | None
) -> Tensor:
    """Average cross entropy over the queries of a level, weighted by their classes.

    Args:
        logits: (L, B, N, C).
        targets: (L, B, N) classes from 0 to C - 1.
        class_weights: (C,) float32.
        divisor: Scalar, the average of the weights' sum over processes and batches; None takes
            the sum of this batch.

    Returns:
        (L,) loss of each level.
    """
    # (L, B, N, C) -> (L, C, B, N)
    loss = cross_entropy(
        logits.float().movedim(-1, 1), targets, weight=class_weights, reduction="none"
    )
    total = loss.sum((1, 2))
    return total / (class_weights[targets].sum((1, 2)) if divisor is None else divisor)


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Compute the sigmoid focal loss (Lin et al. 2017) of every logit.

    Args:
        logits: (..., C) float32.
        targets: (..., C) 1 for the right class, else 0.
        alpha: Weight of positives; negatives have 1 - alpha.
        gamma: Exponent that plays down easy logits.

    Returns:
        (..., C).
    """
    targets = targets.to(logits.dtype)
    loss = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probabilities = logits.sigmoid()
    error = probabilities + targets - 2 * probabilities * targets
    weights = alpha * targets + (1 - alpha) * (1 - targets)
    return weights * error**gamma * loss


def box_losses(
    boxes: Tensor, target_boxes: Tensor, is_matched: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Sum the L1 and the generalised IoU loss of box pairs.

    Args:
        boxes: (L, B, T, 4) cxcywh predictions of each annotation.
        target_boxes: (B, T, 4) cxcywh annotations.
        is_matched: (L, B, T) or (B, T) boolean, False for pairs that do not count.
        offset: `legacy_box_offset` of the configuration.

    Returns:
        Two tensors (L,): sums of |difference| over the four numbers, and of 1 - GIoU.
    """
    boxes = boxes.float()
    distance = (boxes - target_boxes).abs().sum(-1)
    giou = generalized_box_iou(
        box_cxcywh_to_xyxy(boxes, offset), box_cxcywh_to_xyxy(target_boxes, offset)
    )
    zero = distance.new_zeros(())
    return (
        torch.where(is_matched, distance, zero).sum((1, 2)),
        torch.where(is_matched, 1 - giou, zero).sum((1, 2)),
    )


def scatter_to_queries(values: Tensor, matches: Tensor, num_queries: int, fill: int) -> Tensor:
    """Hand the values (B, T) of annotations to their queries.

    Args:
        values: (B, T) int64.
        matches: (L, B, T) query of each annotation, -1 for none.
        num_queries: N.
        fill: Value of queries without an annotation.

    Returns:
        (L, B, N) int64.
    """
    levels, images, _ = matches.shape
    # Annotations without a query go to an extra one, which is cut off.
    targets = values.new_full((levels, images, num_queries + 1), fill)
    queries = torch.where(matches >= 0, matches, num_queries)
    targets.scatter_(2, queries, values.expand(levels, -1, -1))
    return targets[..., :num_queries]


def gather_queries(values: Tensor, matches: Tensor) -> Tensor:
    """Read (L, B, N, D) at the queries (L, B, T); -1 reads query 0. Returns (L, B, T, D)."""
    indices = matches.clamp(min=0)[..., None].expand(-1, -1, -1, values.shape[-1])
    return values.gather(2, indices)


def gather_entries(values: Tensor, indices: Tensor) -> Tensor:
    """Read (B, T, D) at the entries (B, M); -1 reads entry 0. Returns (B, M, D)."""
    return values.gather(1, indices.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))


def one_hot_or_zeros(targets: Tensor, logits: Tensor) -> Tensor:
    """Turn classes (...), -1 for none, into (..., C) ones and zeros like the logits (..., C)."""
    encoded = torch.zeros_like(logits, dtype=torch.float32)
    source = (targets >= 0).to(encoded.dtype)[..., None]
    return encoded.scatter_(-1, targets.clamp(min=0)[..., None], source)


def name_levels(
    name: str, losses: Tensor, weight: float, auxiliary_weight: float
) -> dict[str, Tensor]:
    """Split the losses (L,) of levels into weighted scalars.

    Args:
        name: Name of the last level's entry; the earlier ones are `name_0`, `name_1`, ...
        losses: (L,).
        weight: Factor of the last level.
        auxiliary_weight: Factor of the earlier levels.
    """
    *auxiliary, last = losses.unbind()
    entries = {name: last * weight}
    for level, loss in enumerate(auxiliary):
        entries[f"{name}_{level}"] = loss * auxiliary_weight
    return entries


def _weighted_losses(
    config: SgtrDetrConfig, prefix: str, class_loss: Tensor, box_loss: Tensor, giou_loss: Tensor
) -> dict[str, Tensor]:
    entries: dict[str, Tensor] = {}
    for name, losses, weight in (
        ("class", class_loss, config.class_loss_weight),
        ("box", box_loss, config.box_loss_weight),
        ("giou", giou_loss, config.giou_loss_weight),
    ):
        auxiliary_weight = 1.0 if config.legacy_unweighted_auxiliary_losses else weight
        entries |= name_levels(prefix + name, losses, weight, auxiliary_weight)
    return entries
