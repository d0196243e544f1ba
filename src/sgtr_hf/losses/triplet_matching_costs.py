"""Matching of annotated relations with predicate queries, of all levels at once.

L levels, B images, N entity queries, Q predicate queries, K entities kept a role and query,
T annotated entities and R annotated relations (padded), C entity classes, P predicates.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr import SgtrConfig
from .hungarian_matching import (
    PaddedAnnotations,
    copy_to_host,
    solve,
)
from .triplet_predictions import (
    RelationTargets,
    TripletPredictions,
    relation_targets,
)


# `MATCHING_RANGE` of the release.
LEGACY_MATCHING_RANGE = 4096


class _EntityCosts(NamedTuple):
    """Costs (B, N, R) of taking an entity as the subject (or object) of an annotated relation."""

    class_factor: Tensor
    box_distance: Tensor
    overlap_factor: Tensor


@torch.no_grad()
def triplet_matching_costs(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> Tensor:
    """Compute the cost of giving each predicate query each annotated relation.

    With unified assembling, a query is one triplet: the box and class that its correspondence sums
    up. With the rule, it stands for its K assembled triplets and costs as much as the cheapest.

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
    if config.graph_assembling == "unified":
        return _unified_costs(config, predictions, entity_logits, entity_boxes, annotations)
    rows = _assembled_costs(config, predictions, entity_logits, entity_boxes, annotations)
    return torch.stack([level.amin(2) for level in rows])


@torch.no_grad()
# As for `assign_all`.
@torch.compiler.disable
def legacy_triplet_matching(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> Tensor:
    """Match as the release does: assembled triplets first, then one relation a query.

    Arguments are those of `triplet_matching_costs`.

    Returns:
        (L, B, R) int64 query of each relation, -1 on padding and for a relation that lost its
        query to another.

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
            matches[level, image, is_valid] = _match_rows(
                image_costs, top_k, legacy_conflict_row=config.legacy_conflict_row
            )
    return torch.from_numpy(matches).to(entity_boxes.device)


def _unified_costs(
    config: SgtrConfig,
    predictions: TripletPredictions,
    entity_logits: Tensor,
    entity_boxes: Tensor,
    annotations: PaddedAnnotations,
) -> Tensor:
    """Costs (L, B, Q, R) of the triplets that unified assembling sums up."""
    targets = relation_targets(annotations)
    probabilities, boxes = _entity_probabilities(config, entity_logits), entity_boxes.float()
    levels, queries = predictions.predicate_logits.shape[0], predictions.predicate_logits.shape[2]
    roles = []
    for correspondence, labels, target_boxes in (
        (
            predictions.subject_log_correspondence,
            targets.subject_labels,
            targets.subject_boxes,
        ),
        (predictions.object_log_correspondence, targets.object_labels, targets.object_boxes),
    ):
        if correspondence is None:
            raise ValueError("Unified assembling needs the correspondence of both roles.")
        # (L, B, Q, N) -> (B, L * Q, N): levels are queries of the same images.
        links = correspondence.exp().transpose(0, 1).flatten(1, 2)
        assembled = (torch.matmul(links, probabilities), torch.matmul(links, boxes))
        roles.append(_entity_costs(config, assembled, labels, target_boxes))
    # (B, L * Q, R) -> (L, B, Q, R)
    costs = _sum_of_roles(config, *roles).unflatten(1, (levels, queries)).transpose(0, 1)
    return costs + _query_costs(config, predictions, targets)


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
    targets = relation_targets(annotations)
    entities = (_entity_probabilities(config, entity_logits), entity_boxes.float())
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


def _entity_probabilities(config: SgtrConfig, logits: Tensor) -> Tensor:
    """Class probabilities (B, N, C), with no-object last for a softmax head."""
    if config.detector.classification == "softmax":
        return logits.float().softmax(-1)
    return logits.float().sigmoid()


def _query_costs(
    config: SgtrConfig, predictions: TripletPredictions, targets: RelationTargets
) -> Tensor:
    """Costs (L, B, Q, R) of predicate and relation vector, the same for all K triplets."""
    logits = predictions.predicate_logits.float()
    has_background = config.predicate_classification == "softmax"
    if has_background or config.legacy_softmax_cost:
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
    offset = config.detector.legacy_box_offset
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
    return _sum_of_roles(config, of_subject, of_object)


def _sum_of_roles(config: SgtrConfig, of_subject: _EntityCosts, of_object: _EntityCosts) -> Tensor:
    """Weigh and add the costs of both roles, which are all of one shape."""
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


def _match_rows(costs: np.ndarray, top_k: int, *, legacy_conflict_row: bool) -> np.ndarray:
    """Match the rows (Q * K, R) of one image; return the query of each relation, -1 for none."""
    kept = np.argsort(costs.min(1), kind="stable")[:LEGACY_MATCHING_RANGE]
    if len(kept) < costs.shape[1]:
        raise ValueError(
            f"Legacy matching has {len(kept)} assembled triplets for {costs.shape[1]} relations of "
            "an image; raise `num_predicate_queries` or `training_assembling_top_k`."
        )
    ranks = solve(costs[kept])
    rows = kept[ranks]
    queries = rows // top_k
    matches = np.full(costs.shape[1], -1, dtype=np.int64)
    for query in np.unique(queries):
        rivals = np.flatnonzero(queries == query)
        # At equal costs the better ranked row wins.
        rivals = rivals[np.argsort(ranks[rivals])]
        compared = query if legacy_conflict_row else rows[rivals]
        matches[rivals[costs[compared, rivals].argmin()]] = query
    return matches
