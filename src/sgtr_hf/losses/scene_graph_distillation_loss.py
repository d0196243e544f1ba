"""Distils a scene graph model: its nodes are matched to those of a larger one, and learn from them.

B images, N entity nodes and Q predicate nodes of the student, M nodes of the teacher that it is
sure of (padded), C entity classes, P predicates. Ours: Hinton et al. 2015 know no nodes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr import SgtrConfig
from .detection_loss import gather_entries
from .hungarian_matching import AssignmentProblem, assign_all
from .knowledge_distillation_loss import soft_sigmoid_loss, soft_target_loss


class GraphPredictions(NamedTuple):
    """What a scene graph model says at its last level."""

    logits: Tensor
    """(B, N, C + 1) for softmax with no-object last, or (B, N, C) for focal."""
    pred_boxes: Tensor
    """(B, N, 4) cxcywh relative to the image."""
    predicate_logits: Tensor
    """(B, Q, P) for focal, or (B, Q, P + 1) for softmax with background first."""
    subject_logits: Tensor
    """(B, Q, C + 1) or (B, Q, C) classes that the subject should have."""
    subject_boxes: Tensor
    """(B, Q, 4) box that it should have."""
    object_logits: Tensor
    """Likewise of the object."""
    object_boxes: Tensor
    """Likewise of the object."""

    @classmethod
    def of(cls, output: Any) -> "GraphPredictions":
        """Read them off the output of a scene graph model."""
        return cls(*(getattr(output, name) for name in cls._fields))


class GraphDistillation(NamedTuple):
    """How much a student learns of what."""

    temperature: float = 2.0
    entity_confidence: float = 0.5
    """Least probability of an entity of the teacher that is learnt from, box included."""
    predicate_confidence: float = 0.2
    """Least probability of a predicate of the teacher that is learnt from."""


class _SureNodes(NamedTuple):
    """Nodes of the teacher, the surest first."""

    indices: Tensor
    """(B, M)."""
    valid: Tensor
    """(B, M) False on padding."""

    def mean(self, values: Tensor) -> Tensor:
        """Average (B, M) over the nodes of an image, then over images.

        Batches of processes are of one size, so that the mean over processes is the mean over all
        images.
        """
        totals = torch.where(self.valid, values, 0).sum(1)
        return (totals / self.valid.sum(1).clamp(min=1)).mean()


def check_teacher(student: SgtrConfig, teacher: SgtrConfig) -> None:
    """Reject a teacher whose distributions the student cannot have.

    Raises:
        ValueError: If classes, predicates or the kinds of classification differ.
    """
    for name, mine, other in (
        ("id2label", student.id2label, teacher.id2label),
        ("id2predicate", student.id2predicate, teacher.id2predicate),
        (
            "predicate_classification",
            student.predicate_classification,
            teacher.predicate_classification,
        ),
        (
            "detector_config.classification",
            student.detector.classification,
            teacher.detector.classification,
        ),
    ):
        if mine != other:
            raise ValueError(
                f"Student and teacher must have the same `{name}`, got {mine} and {other}."
            )


def scene_graph_distillation_losses(
    config: SgtrConfig,
    student: GraphPredictions,
    teacher: GraphPredictions,
    settings: GraphDistillation,
) -> dict[str, Tensor]:
    """Compute the losses of the student's nodes against those of the teacher.

    The nodes of the teacher that are sure of a class (predicate) are each matched with a node of
    the student by the Hungarian method: entities by class and box, predicate nodes by predicate
    and by the class and box of both ends.

    Args:
        config: Of the student; gives the kinds of classification and the weights of boxes.
        student: With gradients.
        teacher: Of the same images; no gradient flows into it.
        settings: Temperature, and how sure is sure.

    Returns:
        Scalars `loss_distilled_entity`, `loss_distilled_box`, `loss_distilled_giou`,
        `loss_distilled_predicate`, `loss_distilled_subject` and `loss_distilled_object`: means
        over the nodes of an image that are learnt from (0 if there are none), then over images.
    """
    teacher = GraphPredictions(*(field.detach().float() for field in teacher))
    detector = config.detector
    entities = _sure_nodes(
        _scores(teacher.logits, detector.classification, background=-1),
        settings.entity_confidence,
        student.logits.shape[1],
    )
    predicates = _sure_nodes(
        _scores(teacher.predicate_logits, config.predicate_classification, background=0),
        settings.predicate_confidence,
        student.predicate_logits.shape[1],
    )
    entity_matches, predicate_matches = (
        matches[0]
        for matches in assign_all(
            AssignmentProblem(
                _entity_costs(config, student, teacher, entities)[None], entities.valid
            ),
            AssignmentProblem(
                _predicate_costs(config, student, teacher, predicates)[None],
                predicates.valid,
                "num_predicate_queries",
            ),
        )
    )
    boxes = gather_entries(student.pred_boxes, entity_matches).float()
    targets = gather_entries(teacher.pred_boxes, entities.indices)
    distance, giou = _box_distance(config, boxes, targets)
    losses = {
        "loss_distilled_box": detector.box_loss_weight * entities.mean(distance),
        "loss_distilled_giou": detector.giou_loss_weight * entities.mean(1 - giou),
    }
    for name, nodes, matches, kind, logits in (
        ("entity", entities, entity_matches, detector.classification, "logits"),
        (
            "predicate",
            predicates,
            predicate_matches,
            config.predicate_classification,
            "predicate_logits",
        ),
        ("subject", predicates, predicate_matches, detector.classification, "subject_logits"),
        ("object", predicates, predicate_matches, detector.classification, "object_logits"),
    ):
        compare = soft_target_loss if kind == "softmax" else soft_sigmoid_loss
        values = compare(
            gather_entries(getattr(student, logits), matches),
            gather_entries(getattr(teacher, logits), nodes.indices),
            settings.temperature,
        )
        losses[f"loss_distilled_{name}"] = nodes.mean(values)
    return losses


def _probabilities(logits: Tensor, classification: str) -> Tensor:
    """Of all columns, background included."""
    return logits.softmax(-1) if classification == "softmax" else logits.sigmoid()


def _scores(logits: Tensor, classification: str, background: int) -> Tensor:
    """Largest probability (B, nodes) of what is not background."""
    probabilities = _probabilities(logits, classification)
    if classification == "softmax":
        probabilities = probabilities[..., 1:] if background == 0 else probabilities[..., :-1]
    return probabilities.amax(-1)


def _sure_nodes(scores: Tensor, threshold: float, most: int) -> _SureNodes:
    """Choose the nodes above a threshold, at most as many as the student has."""
    counts = (scores >= threshold).sum(1).clamp(max=most)
    ordered = scores.argsort(dim=1, descending=True)[:, : int(counts.max())]
    places = torch.arange(ordered.shape[1], device=scores.device)
    return _SureNodes(ordered, places < counts[:, None])


@torch.no_grad()
def _entity_costs(
    config: SgtrConfig, student: GraphPredictions, teacher: GraphPredictions, sure: _SureNodes
) -> Tensor:
    """(B, N, M)."""
    return _node_costs(
        config,
        (student.logits, student.pred_boxes),
        (
            gather_entries(teacher.logits, sure.indices),
            gather_entries(teacher.pred_boxes, sure.indices),
        ),
    )


@torch.no_grad()
def _predicate_costs(
    config: SgtrConfig, student: GraphPredictions, teacher: GraphPredictions, sure: _SureNodes
) -> Tensor:
    """(B, Q, M): of the predicate and of both ends."""
    costs = -_agreement(
        student.predicate_logits,
        gather_entries(teacher.predicate_logits, sure.indices),
        config.predicate_classification,
    )
    for role in ("subject", "object"):
        logits, boxes = f"{role}_logits", f"{role}_boxes"
        costs = costs + _node_costs(
            config,
            (getattr(student, logits), getattr(student, boxes)),
            (
                gather_entries(getattr(teacher, logits), sure.indices),
                gather_entries(getattr(teacher, boxes), sure.indices),
            ),
        )
    return costs


def _node_costs(
    config: SgtrConfig, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> Tensor:
    """Cost (B, N, M) of logits and boxes, with the weights of the detector's matching."""
    detector = config.detector
    distance, giou = _box_distance(config, student[1].float()[:, :, None], teacher[1][:, None])
    return (
        -detector.class_cost_weight * _agreement(student[0], teacher[0], detector.classification)
        + detector.box_cost_weight * distance
        - detector.giou_cost_weight * giou
    )


def _box_distance(config: SgtrConfig, boxes: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance and generalised IoU of boxes (..., 4) cxcywh."""
    offset = config.detector.legacy_box_offset
    giou = generalized_box_iou(
        box_cxcywh_to_xyxy(boxes, offset), box_cxcywh_to_xyxy(targets, offset)
    )
    return (boxes - targets).abs().sum(-1), giou


def _agreement(student_logits: Tensor, teacher_logits: Tensor, classification: str) -> Tensor:
    """Cosine (B, N, M) of probabilities: 1 for equal distributions, 0 for none in common."""
    normed = [
        torch.nn.functional.normalize(_probabilities(logits.float(), classification), dim=-1)
        for logits in (student_logits, teacher_logits)
    ]
    return normed[0] @ normed[1].transpose(1, 2)
