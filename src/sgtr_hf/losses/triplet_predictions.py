"""What the predicate nodes predict, and what the annotated relations ask of them.

L levels, B images, N entity queries, Q predicate queries, R annotated relations (padded), C entity
classes, P predicates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..configuration.configuration_sgtr import SgtrConfig
from .detection_loss import gather_entries
from .hungarian_matching import PaddedAnnotations


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
    subject_log_correspondence: Tensor | None = None
    """(L, B, Q, N) log-probability of each entity to be the subject; unified assembling only."""
    object_log_correspondence: Tensor | None = None
    """Likewise of the object."""

    def levels(self, chosen: slice) -> "TripletPredictions":
        """Return some of the levels."""
        fields = {
            name: field[chosen] for name, field in self._asdict().items() if field is not None
        }
        return TripletPredictions(**fields)


class RelationTargets(NamedTuple):
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


def relation_targets(annotations: PaddedAnnotations) -> RelationTargets:
    """Look up class and box of the subject and the object of each relation."""
    subjects, objects, predicates = annotations.relations.unbind(-1)
    return RelationTargets(
        predicates=predicates,
        subject_labels=annotations.class_labels.gather(1, subjects),
        object_labels=annotations.class_labels.gather(1, objects),
        subject_boxes=gather_entries(annotations.boxes, subjects),
        object_boxes=gather_entries(annotations.boxes, objects),
    )


def repeat_relations(
    annotations: PaddedAnnotations, times: int, repetitions: Tensor | None = None
) -> PaddedAnnotations:
    """List every relation several times, so that as many queries can be assigned to it.

    Args:
        annotations: R relations an image.
        times: How often each stands.
        repetitions: (B,) how many of these are valid; all if None.
    """
    valid = annotations.relation_valid.repeat(1, times)
    if repetitions is not None:
        number = torch.arange(times, device=valid.device)
        number = number.repeat_interleave(annotations.relations.shape[1])
        valid = valid & (number < repetitions[:, None])
    counts = annotations.counts
    if counts is not None:
        of_all = counts.predicates * times
        repeated = of_all if repetitions is None else counts.repeated_predicates
        counts = counts._replace(predicates=repeated)
    return annotations._replace(
        relations=annotations.relations.repeat(1, times, 1), relation_valid=valid, counts=counts
    )


def count_repetitions(config: SgtrConfig, annotations: PaddedAnnotations) -> Tensor:
    """Say how often (B,) the earlier levels assign each relation of an image.

    `auxiliary_assignments` times, or as often as there are queries for it.
    """
    num_relations = annotations.relation_valid.sum(1).clamp(min=1)
    num_queries = config.num_predicate_queries
    if config.pair_queries:
        # There are no more queries than pairs.
        num_queries = min(num_queries, config.detector.num_queries**2)
    return (num_queries // num_relations).clamp(1, config.auxiliary_assignments)
