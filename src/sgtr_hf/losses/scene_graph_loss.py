"""Matching and losses of triplets, of all levels of the structural decoder at once.

L levels, B images, N entity queries, Q predicate queries, K entities kept a role and query,
T annotated entities and R annotated relations (padded), C entity classes, P predicates.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr import SgtrConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from .detection_loss import (
    box_losses,
    entity_class_loss,
    focal_loss,
    gather_entries,
    gather_queries,
    mean_over_processes,
    name_levels,
    one_hot_or_zeros,
    scatter_to_queries,
    weighted_cross_entropy,
)
from .hungarian_matching import (
    AssignmentProblem,
    PaddedAnnotations,
    assign_all,
    copy_to_host,
    solve,
)


# `MATCHING_RANGE` of the release.
LEGACY_MATCHING_RANGE = 4096


class TripletPredictions(NamedTuple):
    """What the predicate nodes say, for L levels; the last is the prediction."""

    predicate_logits: Tensor
    """(L, B, Q, P) for focal, or (L, B, Q, P + 1) for softmax with background first."""
    relation_vectors: Tensor
    """(L, B, Q, 4) centres of subject and object, relative to the image."""
    subject_logits: Tensor
    """(L, B, Q, C + 1) for softmax with no-object last, or (L, B, Q, C) for focal."""
    subject_boxes: Tensor
    """(L, B, Q, 4) cxcywh relative to the image."""
    object_logits: Tensor
    """Likewise of the object."""
    object_boxes: Tensor
    """Likewise of the object."""
    subject_scores: Tensor
    """(L, B, Q, N) how well each entity fits as the subject; larger is better."""
    object_scores: Tensor
    """(L, B, Q, N) how well each entity fits as the object."""


class _RelationTargets(NamedTuple):
    """Annotated relations with the entities they point to."""

    predicates: Tensor
    """(B, R) from 0."""
    subject_labels: Tensor
    """(B, R)."""
    object_labels: Tensor
    """(B, R)."""
    subject_boxes: Tensor
    """(B, R, 4) cxcywh."""
    object_boxes: Tensor
    """(B, R, 4) cxcywh."""

    @property
    def vectors(self) -> Tensor:
        """(B, R, 4) centres of subject and object."""
        return torch.cat((self.subject_boxes[..., :2], self.object_boxes[..., :2]), dim=-1)


class _EntityCosts(NamedTuple):
    """Costs (B, N, R) of taking an entity as the subject (or object) of an annotated relation."""

    class_factor: Tensor
    box_distance: Tensor
    overlap_factor: Tensor


def match_triplets(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> Tensor:
    """Give each annotated relation its own predicate query, level by level.

    Args:
        config: `legacy_triplet_matching` decides how.
        predictions: Of L levels.
        entity_logits: (B, N, C + 1) or (B, N, C), of the detector's last level.
        entity_boxes: (B, N, 4) cxcywh relative to the image.
        annotations: R annotated relations an image.

    Returns:
        (L, B, R) int64 query of each relation, -1 on padding (and, in the legacy matching, for a
        relation that lost its query to another).

    Raises:
        ValueError: If outputs are not finite or an image has more relations than queries.
    """
    if config.legacy_triplet_matching:
        return legacy_triplet_matching(
            config, predictions, entity_logits, entity_boxes, annotations
        )
    costs = triplet_matching_costs(config, predictions, entity_logits, entity_boxes, annotations)
    problem = AssignmentProblem(costs, annotations.relation_valid, "num_predicate_queries")
    return assign_all(problem)[0]


@torch.no_grad()
def triplet_matching_costs(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> Tensor:
    """Compute the cost of giving each predicate query each annotated relation.

    A query stands for its K assembled triplets and costs as much as the cheapest of them.

    Args:
        config: Gives the weights, K (`training_assembling_top_k`) and the kinds of classification.
        predictions: Of L levels.
        entity_logits: (B, N, C + 1) or (B, N, C), of the detector's last level.
        entity_boxes: (B, N, 4) cxcywh relative to the image.
        annotations: R annotated relations an image.

    Returns:
        (L, B, Q, R). Columns of padding have no meaning.

    Source:
        SGTR (Li et al. 2022), section 3.5. The release matches the Q * K triplets themselves, so
        that one query may win several relations and lose them again; see `legacy_triplet_matching`.
    """
    rows = _assembled_costs(config, predictions, entity_logits, entity_boxes, annotations)
    return torch.stack([level.amin(2) for level in rows])


@torch.no_grad()
def legacy_triplet_matching(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> Tensor:
    """Match as the release does: assembled triplets first, then one relation a query.

    Arguments, result and errors are those of `match_triplets`.

    Source:
        `rel_detr_losses.py:119-600` of the release.
    """
    rows = _assembled_costs(config, predictions, entity_logits, entity_boxes, annotations)
    costs = torch.stack(rows)
    top_k = costs.shape[3]
    # (L, B, Q, K, R) -> (L, B, Q * K, R)
    host_costs, host_valid = copy_to_host(costs.flatten(2, 3), annotations.relation_valid)
    levels, images, _, num_relations = host_costs.shape
    matches = np.full((levels, images, num_relations), -1, dtype=np.int64)
    for level, image in np.ndindex(levels, images):
        is_valid = host_valid[image] > 0
        if is_valid.any():
            image_costs = host_costs[level, image][:, is_valid]
            matches[level, image, is_valid] = _match_rows(image_costs, top_k)
    return torch.from_numpy(matches).to(entity_boxes.device)


def scene_graph_losses(
    config: SgtrConfig,
    predictions: TripletPredictions,
    annotations: PaddedAnnotations,
    matches: Tensor,
) -> dict[str, Tensor]:
    """Compute the weighted losses of predicates, relation vectors and indicators.

    Args:
        config: Gives the weights, the kinds of classification and the legacy switches.
        predictions: Of L levels.
        annotations: R annotated relations an image.
        matches: (L, B, R) query of each relation, -1 for none.

    Returns:
        Scalars `loss_predicate`, `loss_relation_vector`, `loss_subject_box`, `loss_subject_giou`,
        `loss_subject_class` and the same of the object for the last level, and with suffix `_0`,
        `_1`, ... for the earlier levels. Their sum is the loss.
    """
    targets = _relation_targets(annotations)
    count = mean_over_processes(annotations.relation_valid.sum())
    auxiliary = config.auxiliary_relation_loss_weight
    vectors = gather_queries(predictions.relation_vectors, matches).float()
    distance = (vectors - targets.vectors).abs().sum(-1)
    vector_loss = torch.where(matches >= 0, distance, 0).sum((1, 2)) / count
    weight = config.relation_vector_loss_weight
    return {
        **_predicate_losses(config, predictions.predicate_logits, annotations, matches),
        **name_levels("loss_relation_vector", vector_loss, weight, weight * auxiliary),
        **_indicator_losses(
            config,
            "loss_subject",
            (predictions.subject_logits, predictions.subject_boxes),
            (targets.subject_labels, targets.subject_boxes),
            matches,
            count,
        ),
        **_indicator_losses(
            config,
            "loss_object",
            (predictions.object_logits, predictions.object_boxes),
            (targets.object_labels, targets.object_boxes),
            matches,
            count,
        ),
    }


def _predicate_losses(
    config: SgtrConfig, logits: Tensor, annotations: PaddedAnnotations, matches: Tensor
) -> dict[str, Tensor]:
    """Classification of all queries; those without a relation are background."""
    weight = config.predicate_loss_weight
    auxiliary_weight = weight * config.auxiliary_relation_loss_weight
    predicates, num_queries = annotations.relations[..., 2], logits.shape[2]
    if config.predicate_classification == "softmax":
        class_weights = logits.new_ones(logits.shape[-1], dtype=torch.float32)
        class_weights[0] = config.predicate_background_weight
        targets = scatter_to_queries(predicates + 1, matches, num_queries, 0)
        losses = weighted_cross_entropy(logits, targets, class_weights)
        return name_levels("loss_predicate", losses, weight, auxiliary_weight)
    targets = scatter_to_queries(predicates, matches, num_queries, -1)
    encoded = one_hot_or_zeros(targets, logits)
    sums = focal_loss(logits.float(), encoded, config.focal_alpha, config.focal_gamma)
    losses = sums.sum((1, 2, 3))
    count = annotations.relation_valid.sum()
    if config.legacy_focal_normalization:
        # The release averages over predicates, counts the relations of this process alone
        # (rel_detr_losses.py:857) and knows no weight for the auxiliary levels.
        losses = losses * num_queries / logits.shape[-1] / count.clamp(min=1)
        return name_levels("loss_predicate", losses, weight, weight)
    losses = losses / mean_over_processes(count)
    return name_levels("loss_predicate", losses, weight, auxiliary_weight)


def _indicator_losses(
    config: SgtrConfig,
    name: str,
    indicators: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    matches: Tensor,
    count: Tensor,
) -> dict[str, Tensor]:
    """Losses of one role: class and box that its queries expect of the entity."""
    detector_config = _detector_config(config)
    logits, boxes = indicators
    labels, target_boxes = targets
    query_labels = scatter_to_queries(labels, matches, logits.shape[2], -1)
    class_loss = entity_class_loss(detector_config, logits, query_labels, count)
    box_loss, giou_loss = box_losses(
        gather_queries(boxes, matches),
        target_boxes,
        matches >= 0,
        detector_config.legacy_box_offset,
    )
    entries: dict[str, Tensor] = {}
    for part, losses, weight in (
        ("box", box_loss / count, config.indicator_box_loss_weight),
        ("giou", giou_loss / count, config.indicator_giou_loss_weight),
        ("class", class_loss, config.indicator_class_loss_weight),
    ):
        auxiliary_weight = weight * config.auxiliary_relation_loss_weight
        entries |= name_levels(f"{name}_{part}", losses, weight, auxiliary_weight)
    return entries


def _detector_config(config: SgtrConfig) -> SgtrDetrConfig:
    detector_config = config.detector_config
    if not isinstance(detector_config, SgtrDetrConfig):
        raise TypeError(
            f"`detector_config` must be a SgtrDetrConfig, got {type(detector_config).__name__}."
        )
    return detector_config


def _relation_targets(annotations: PaddedAnnotations) -> _RelationTargets:
    subjects, objects, predicates = annotations.relations.unbind(-1)
    return _RelationTargets(
        predicates=predicates,
        subject_labels=annotations.class_labels.gather(1, subjects),
        object_labels=annotations.class_labels.gather(1, objects),
        subject_boxes=gather_entries(annotations.boxes, subjects),
        object_boxes=gather_entries(annotations.boxes, objects),
    )


def _assembled_costs(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> list[Tensor]:
    """Costs (B, Q, K, R) of the assembled triplets of each level.

    The k-th subject goes with the k-th object. Levels are separate: all at once are large.
    """
    targets = _relation_targets(annotations)
    detector_config = _detector_config(config)
    if detector_config.classification == "softmax":
        probabilities = entity_logits.float().softmax(-1)
    else:
        probabilities = entity_logits.float().sigmoid()
    entities = (probabilities, entity_boxes.float())
    subject_costs = _entity_costs(config, entities, targets.subject_labels, targets.subject_boxes)
    object_costs = _entity_costs(config, entities, targets.object_labels, targets.object_boxes)
    top_k = min(config.training_assembling_top_k, entity_boxes.shape[1])
    query_costs = _query_costs(config, predictions, targets)
    subject_scores, subjects = predictions.subject_scores.float().topk(top_k)
    object_scores, objects = predictions.object_scores.float().topk(top_k)
    score_costs = config.assembling_cost_weight * (1 - (subject_scores + object_scores) / 2)
    return [
        query_cost[:, :, None]
        + score_cost[..., None]
        + _pair_costs(config, (subject_costs, subject), (object_costs, object_))
        for query_cost, score_cost, subject, object_ in zip(
            query_costs, score_costs, subjects, objects, strict=True
        )
    ]


def _query_costs(
    config: SgtrConfig, predictions: TripletPredictions, targets: _RelationTargets
) -> Tensor:
    """Costs (L, B, Q, R) of predicate and relation vector, the same for all K triplets."""
    logits = predictions.predicate_logits.float()
    has_background = config.predicate_classification == "softmax"
    # The release takes a softmax even of the logits of a sigmoid head.
    if has_background or config.legacy_triplet_matching:
        probabilities = logits.softmax(-1)
    else:
        probabilities = logits.sigmoid()
    columns = (targets.predicates + has_background)[:, None].expand(*logits.shape[:-1], -1)
    vectors = predictions.relation_vectors.float()
    distance = (vectors[..., None, :] - targets.vectors[:, None]).abs().sum(-1)
    return (
        config.predicate_cost_weight * _probability_costs(config, probabilities.gather(-1, columns))
        + config.relation_vector_cost_weight * distance
    )


def _entity_costs(
    config: SgtrConfig,
    entities: tuple[Tensor, Tensor],
    target_labels: Tensor,
    target_boxes: Tensor,
) -> _EntityCosts:
    """Costs of the entities (B, N, C'), (B, N, 4) for the targets (B, R), (B, R, 4) of one role."""
    probabilities, boxes = entities
    columns = target_labels[:, None].expand(-1, boxes.shape[1], -1)
    boxes, target_boxes = boxes[:, :, None], target_boxes[:, None]
    offset = _detector_config(config).legacy_box_offset
    overlap = generalized_box_iou(
        box_cxcywh_to_xyxy(boxes, offset), box_cxcywh_to_xyxy(target_boxes, offset)
    ).clamp(min=0)
    return _EntityCosts(
        class_factor=_probability_costs(config, probabilities.gather(-1, columns)),
        box_distance=(boxes - target_boxes).abs().sum(-1),
        overlap_factor=_probability_costs(config, overlap),
    )


def _pair_costs(
    config: SgtrConfig,
    subject: tuple[_EntityCosts, Tensor],
    object_: tuple[_EntityCosts, Tensor],
) -> Tensor:
    """Costs (B, Q, K, R) of the entities at the indices (B, Q, K) of both roles."""
    of_subject = _EntityCosts(*(_gather_entities(table, subject[1]) for table in subject[0]))
    of_object = _EntityCosts(*(_gather_entities(table, object_[1]) for table in object_[0]))
    # b ** -(p_subject + p_object) is the product of the factors of the roles.
    class_cost = of_subject.class_factor * of_object.class_factor
    overlap_cost = of_subject.overlap_factor * of_object.overlap_factor
    box_cost = (of_subject.box_distance + of_object.box_distance) / 2
    return (
        config.entity_class_cost_weight * class_cost
        + config.entity_box_cost_weight * box_cost
        + config.entity_giou_cost_weight * overlap_cost
    )


def _gather_entities(table: Tensor, indices: Tensor) -> Tensor:
    """Read (B, N, R) at the entities (B, Q, K), which gives (B, Q, K, R)."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, table.shape[-1])
    return table.gather(1, flat).unflatten(1, indices.shape[1:])


def _probability_costs(config: SgtrConfig, probabilities: Tensor) -> Tensor:
    """Fall from 1 at probability 0 to 1 / `matching_base` at probability 1."""
    return config.matching_base ** (-probabilities)


def _match_rows(costs: np.ndarray, top_k: int) -> np.ndarray:
    """Match the rows (Q * K, R) of one image; return the query of each relation, -1 for none."""
    kept = np.argsort(costs.min(1), kind="stable")[:LEGACY_MATCHING_RANGE]
    ranks = solve(costs[kept])
    queries = kept[ranks] // top_k
    matches = np.full(costs.shape[1], -1, dtype=np.int64)
    for query in np.unique(queries):
        rivals = np.flatnonzero(queries == query)
        rivals = rivals[np.argsort(ranks[rivals])]
        # The release means to compare the matched rows but reads the row whose number is the
        # query's (rel_detr_losses.py:573); at equal costs the better ranked row wins.
        matches[rivals[costs[query, rivals].argmin()]] = query
    return matches
