"""What the scene graph classes return.

B images, N entity nodes, Q predicate queries, L levels, C entity classes, P predicates.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from .detection_outputs import EntityLevels, SgtrDetrModelOutput
from .graph_nodes import EntityNodes, TripletNodes


@dataclass
class SgtrModelOutput(ModelOutput):
    """Entity and predicate nodes.

    Args:
        entity_states: (B, N, d_model) entity nodes.
        entity_boxes: (B, N, 4) their boxes, cxcywh relative to the image.
        predicate_states: (L, B, Q, d_model) of the levels of the predicate decoder.
        subject_states: (L, B, Q, d_model).
        object_states: (L, B, Q, d_model).
        detector: Output of the detector's base model.
        entity_levels: What was read off it.
        entities: The entity nodes with their box and class embedded.
        triplets: The predicate nodes with all that belongs to them.
    """

    # Always there, but transformers wants a default for every output.
    entity_states: Tensor = None  # type: ignore[assignment]
    entity_boxes: Tensor = None  # type: ignore[assignment]
    predicate_states: Tensor = None  # type: ignore[assignment]
    subject_states: Tensor = None  # type: ignore[assignment]
    object_states: Tensor = None  # type: ignore[assignment]
    detector: SgtrDetrModelOutput = None  # type: ignore[assignment]
    entity_levels: EntityLevels = None  # type: ignore[assignment]
    entities: EntityNodes = None  # type: ignore[assignment]
    triplets: TripletNodes = None  # type: ignore[assignment]


@dataclass
class SgtrSceneGraphOutput(ModelOutput):
    """Everything that a scene graph is made of.

    Args:
        loss: Sum of `loss_dict`, when labels were given.
        loss_dict: Weighted losses by name.
        logits: Entities, (B, N, C + 1) with no-object last, or (B, N, C) for a focal head.
        pred_boxes: (B, N, 4) cxcywh relative to the image without its padding.
        entity_probabilities: (B, N, C), no-object removed.
        triplet_class_probabilities: The same, calibrated for the scores of triplets; None of given
            entities.
        given_entities: (B, N) bool, True for the entities of the caller, False for padding; None of
            detected ones.
        predicate_logits: (B, Q, P), or (B, Q, P + 1) with background first for a softmax head.
        predicate_probabilities: (B, Q, P), background removed.
        relation_vectors: (B, Q, 4) centres of subject and object: x, y, x, y.
        subject_logits: (B, Q, C + 1) or (B, Q, C) classes that the subject should have.
        subject_boxes: (B, Q, 4) box that it should have.
        object_logits: Likewise of the object.
        object_boxes: Likewise of the object.
        subject_scores: (B, Q, N) how well each entity fits as the subject.
        object_scores: (B, Q, N) how well each entity fits as the object.
        subject_log_correspondence: (B, Q, N) log-probability of each entity to be the subject; of
            unified assembling, where the scores are its exponentials.
        object_log_correspondence: Likewise of the object.
        auxiliary_outputs: The raw heads and the scores of the earlier levels of the structural
            decoder, when labels were given.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    entity_probabilities: Tensor | None = None
    triplet_class_probabilities: Tensor | None = None
    given_entities: Tensor | None = None
    predicate_logits: Tensor | None = None
    predicate_probabilities: Tensor | None = None
    relation_vectors: Tensor | None = None
    subject_logits: Tensor | None = None
    subject_boxes: Tensor | None = None
    object_logits: Tensor | None = None
    object_boxes: Tensor | None = None
    subject_scores: Tensor | None = None
    object_scores: Tensor | None = None
    subject_log_correspondence: Tensor | None = None
    object_log_correspondence: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
