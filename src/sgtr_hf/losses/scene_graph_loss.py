"""Losses of triplets, of all levels of the predicate decoder at once.

L levels, B images, N entity queries, Q predicate queries, T annotated entities and R annotated
relations (padded), C entity classes, P predicates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..configuration.configuration_sgtr import SgtrConfig
from .detection_loss import (
    box_losses,
    counts_of,
    entity_class_divisor,
    entity_class_loss,
    focal_loss,
    gather_queries,
    name_levels,
    one_hot_or_zeros,
    scatter_to_queries,
    weighted_cross_entropy,
)
from .hungarian_matching import LossCounts, PaddedAnnotations
from .triplet_predictions import (
    RelationTargets,
    TripletPredictions,
    relation_targets,
)


class MatchedEntities(NamedTuple):
    """The entity nodes, and which of them the detector's matching gave to which annotation."""

    boxes: Tensor
    """(B, N, 4) cxcywh."""
    probabilities: Tensor
    """(B, N, C)."""
    matches: Tensor
    """(B, T) node of each annotated entity, -1 on padding."""


class TripletAssignment(NamedTuple):
    """Which query must say which relation."""

    annotations: PaddedAnnotations
    """R relations an image."""
    matches: Tensor
    """(L, B, R) query of each relation, -1 for none."""
    only_matched: bool = False
    """Queries without a relation are padding and count for nothing, instead of for background."""


def scene_graph_losses(
    config: SgtrConfig,
    predictions: TripletPredictions,
    *assignments: TripletAssignment,
    entities: MatchedEntities | None = None,
) -> dict[str, Tensor]:
    """Compute the weighted losses of the heads of triplets and, if unified, of their assembling.

    Args:
        config: Gives the weights, the kinds of classification and the legacy switches.
        predictions: Of L levels.
        *assignments: One for all levels; or one for the earlier levels, where a relation may
            stand several times, and one for the last.
        entities: Needed by unified assembling.

    Returns:
        Scalars `loss_predicate`, `loss_relation_vector` (only without anchors),
        `loss_subject_box`, `loss_subject_giou`, `loss_subject_class` and the same of the object,
        with unified assembling also `loss_subject_assembled_box`, `..._giou`, `..._class` and
        `loss_subject_correspondence`, for the last level, and with suffix `_0`, `_1`, ... for the
        earlier levels. Their sum is the loss.
    """
    parts: list[dict[str, Tensor]] = []
    first = 0
    for assignment in assignments:
        end = first + len(assignment.matches)
        levels = predictions.levels(slice(first, end))
        parts.append(_level_losses(config, levels, assignment, entities))
        first = end
    losses: dict[str, Tensor] = {}
    for name in parts[0]:
        of_levels = torch.cat([part[name] for part in parts])
        auxiliary = config.auxiliary_relation_loss_weight
        if name == "loss_predicate" and config.legacy_unweighted_auxiliary_predicates:
            auxiliary = 1.0
        losses |= name_levels(name, of_levels, 1.0, auxiliary)
    return losses


def relatedness_loss(
    config: SgtrConfig, logits: Tensor, annotations: PaddedAnnotations, entity_matches: Tensor
) -> Tensor:
    """Compute the weighted focal loss of the scores of all pairs.

    Args:
        config: Gives alpha, gamma and the weight.
        logits: (B, N, N), subjects in rows.
        annotations: R annotated relations an image.
        entity_matches: (B, T) node of each annotated entity.

    Returns:
        A scalar: the sum over all pairs, over the number of annotated relations.
    """
    batch_size, num_entities, _ = logits.shape
    subjects, objects, _ = annotations.relations.unbind(-1)
    pairs = entity_matches.gather(1, subjects) * num_entities + entity_matches.gather(1, objects)
    # Padding goes to an extra pair, which is cut off.
    pairs = torch.where(annotations.relation_valid, pairs, num_entities**2)
    targets = logits.new_zeros((batch_size, num_entities**2 + 1), dtype=torch.float32)
    targets = targets.scatter_(1, pairs, 1.0)[:, :-1]
    loss = focal_loss(logits.float().flatten(1), targets, config.focal_alpha, config.focal_gamma)
    counts = counts_of(annotations, config.num_predicates)
    num_relations = counts.at_least_one(counts.predicates.sum())
    return config.relatedness_loss_weight * loss.sum() / num_relations


def _level_losses(
    config: SgtrConfig,
    predictions: TripletPredictions,
    assignment: TripletAssignment,
    entities: MatchedEntities | None,
) -> dict[str, Tensor]:
    """Losses (L,) by name, with the weight of the last level."""
    annotations, matches, _ = assignment
    targets = relation_targets(annotations)
    counts = counts_of(annotations, config.num_predicates)
    count = counts.at_least_one(counts.predicates.sum())
    losses = {"loss_predicate": _predicate_losses(config, predictions, assignment, counts)}
    if config.predicate_node_generator == "structural":
        vectors = gather_queries(predictions.relation_vectors, matches).float()
        distance = (vectors - targets.vectors).abs().sum(-1)
        vector_loss = torch.where(matches >= 0, distance, 0).sum((1, 2)) / count
        losses["loss_relation_vector"] = config.relation_vector_loss_weight * vector_loss
    for role, indicators in (
        ("subject", (predictions.subject_logits, predictions.subject_boxes)),
        ("object", (predictions.object_logits, predictions.object_boxes)),
    ):
        found = _indicator_losses(config, indicators, _of_role(targets, role), assignment, counts)
        losses |= {f"loss_{role}_{part}": loss for part, loss in found.items()}
    if entities is not None:
        losses |= _assembling_losses(config, predictions, entities, assignment, count)
    return losses


def _predicate_losses(
    config: SgtrConfig,
    predictions: TripletPredictions,
    assignment: TripletAssignment,
    counts: LossCounts,
) -> Tensor:
    """Classification (L,) of all queries; those without a relation are background or padding."""
    annotations, matches, only_matched = assignment
    logits = predictions.predicate_logits
    weight = config.predicate_loss_weight
    predicates, num_queries = annotations.relations[..., 2], logits.shape[2]
    adjustment, positive_weights = _long_tail_terms(config, logits)
    if config.predicate_classification == "softmax":
        background_weight = 0.0 if only_matched else config.predicate_background_weight
        class_weights = torch.cat(
            (positive_weights.new_tensor([background_weight]), positive_weights)
        )
        adjusted = torch.cat((logits[..., :1], logits[..., 1:] + adjustment), dim=-1)
        targets = scatter_to_queries(predicates + 1, matches, num_queries, 0)
        positives = counts.predicates.sum()
        background = counts.images * num_queries - positives
        divisor = (counts.predicates * positive_weights).sum() + background_weight * background
        # Without relations in the whole update there is nothing to divide.
        divisor = divisor.clamp(min=torch.finfo(divisor.dtype).tiny)
        return weight * weighted_cross_entropy(
            # The release averages over the queries of this process alone, and may leave relations
            # without a query.
            adjusted,
            targets,
            class_weights,
            None if config.legacy_triplet_matching else divisor,
        )
    targets = scatter_to_queries(predicates, matches, num_queries, -1)
    encoded = one_hot_or_zeros(targets, logits)
    values = focal_loss(
        logits.float() + adjustment, encoded, config.focal_alpha, config.focal_gamma
    )
    if only_matched:
        values = torch.where((targets >= 0)[..., None], values, 0)
    losses = (values * (1 + encoded * (positive_weights - 1))).sum((1, 2, 3))
    if config.legacy_focal_normalization:
        # The release averages over predicates and counts the relations of this process alone
        # (rel_detr_losses.py:857).
        count = annotations.relation_valid.sum().clamp(min=1)
        return weight * losses * num_queries / logits.shape[-1] / count
    return weight * losses / counts.at_least_one(counts.predicates.sum())


def _long_tail_terms(config: SgtrConfig, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the logits (P,), and the weights (P,) of positives."""
    num_predicates = config.num_predicates
    if config.predicate_frequencies is None:
        return (
            logits.new_zeros(num_predicates, dtype=torch.float32),
            logits.new_ones(num_predicates, dtype=torch.float32),
        )
    counts = torch.tensor(config.predicate_frequencies, device=logits.device)
    # A predicate that was never seen counts as a tenth of the rarest one that was.
    seen = counts[counts > 0]
    counts = torch.where(counts > 0, counts, seen.min() / 10 if len(seen) else 1.0).float()
    adjustment = config.logit_adjustment * (counts / counts.max()).log()
    return adjustment, (counts.median() / counts) ** config.predicate_reweighting


def _of_role(targets: RelationTargets, role: str) -> tuple[Tensor, Tensor]:
    """Labels (B, R) and boxes (B, R, 4) of the subjects or the objects."""
    if role == "subject":
        return targets.subject_labels, targets.subject_boxes
    return targets.object_labels, targets.object_boxes


def _indicator_losses(
    config: SgtrConfig,
    indicators: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    assignment: TripletAssignment,
    counts: LossCounts,
) -> dict[str, Tensor]:
    """Losses (L,) of one role: class and box that its queries expect of the entity."""
    detector_config = config.detector
    _, matches, only_matched = assignment
    logits, boxes = indicators
    labels, target_boxes = targets
    query_labels = scatter_to_queries(labels, matches, logits.shape[2], -1)
    positives = counts.predicates.sum()
    count = counts.at_least_one(positives)
    divisor: Tensor | None = (
        count
        if only_matched
        else entity_class_divisor(detector_config, counts, positives, logits.shape[2])
    )
    if config.legacy_triplet_matching and detector_config.classification == "softmax":
        divisor = None
    class_loss = entity_class_loss(
        detector_config, logits, query_labels, divisor, only_matched=only_matched
    )
    box_loss, giou_loss = box_losses(
        gather_queries(boxes, matches),
        target_boxes,
        matches >= 0,
        detector_config.legacy_box_offset,
    )
    return {
        "box": config.indicator_box_loss_weight * box_loss / count,
        "giou": config.indicator_giou_loss_weight * giou_loss / count,
        "class": config.indicator_class_loss_weight * class_loss,
    }


def _assembling_losses(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entities: MatchedEntities,
    assignment: TripletAssignment,
    count: Tensor,
) -> dict[str, Tensor]:
    """Losses (L,) of the soft correspondence, and of the boxes and classes it sums up."""
    annotations, matches, _ = assignment
    targets = relation_targets(annotations)
    losses: dict[str, Tensor] = {}
    for role, correspondence, index in (
        ("subject", predictions.subject_log_correspondence, 0),
        ("object", predictions.object_log_correspondence, 1),
    ):
        if correspondence is None:
            raise ValueError("Unified assembling needs the correspondence of both roles.")
        found = _role_assembling_losses(
            gather_queries(correspondence, matches),
            entities,
            entities.matches.gather(1, annotations.relations[..., index]),
            _of_role(targets, role),
            matches >= 0,
        )
        for part, weight in (
            ("assembled_box", config.assembled_box_loss_weight),
            ("assembled_giou", config.assembled_giou_loss_weight),
            ("assembled_class", config.assembled_class_loss_weight),
            ("correspondence", config.correspondence_loss_weight),
        ):
            losses[f"loss_{role}_{part}"] = weight * found[part] / count
    return losses


def _role_assembling_losses(
    log_correspondence: Tensor,
    entities: MatchedEntities,
    right_nodes: Tensor,
    targets: tuple[Tensor, Tensor],
    is_matched: Tensor,
) -> dict[str, Tensor]:
    """Sums (L,) over the matched queries.

    Args:
        log_correspondence: (L, B, R, N) of the query of each relation.
        entities: The nodes.
        right_nodes: (B, R) node that is the subject (object) of each relation.
        targets: Its label (B, R) and box (B, R, 4).
        is_matched: (L, B, R).
    """
    labels, target_boxes = targets
    correspondence = log_correspondence.exp()
    boxes = torch.matmul(correspondence, entities.boxes.float())
    probabilities = torch.matmul(correspondence, entities.probabilities.float())
    box_loss, giou_loss = box_losses(boxes, target_boxes, is_matched, 0.0)
    levels = len(log_correspondence)
    right_class = probabilities.gather(-1, labels.expand(levels, -1, -1)[..., None])[..., 0]
    nodes = right_nodes.clamp(min=0).expand(levels, -1, -1)[..., None]
    right_link = log_correspondence.gather(-1, nodes)[..., 0]
    zero = right_link.new_zeros(())
    return {
        "assembled_box": box_loss,
        "assembled_giou": giou_loss,
        # Below a millionth a class is as good as unseen.
        "assembled_class": torch.where(is_matched, -right_class.clamp(min=1e-6).log(), zero).sum(
            (1, 2)
        ),
        "correspondence": torch.where(is_matched, -right_link, zero).sum((1, 2)),
    }
