"""SGTR (Li et al. 2022): an image becomes entity nodes, predicate nodes and the graph they form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..configuration.configuration_sgtr import SgtrConfig
from ..losses.hungarian_matching import (
    AssignmentProblem,
    PaddedAnnotations,
    assign_all,
    pad_annotations,
)
from ..losses.scene_graph_loss import (
    TripletPredictions,
    match_triplets,
    scene_graph_losses,
    triplet_matching_costs,
)
from .backbone_freezing import FreezablePreTrainedModel
from .entity_decoder import ImageMemory
from .graph_assembling import assembling_scores
from .modeling_sgtr_detr import (
    EntityLevels,
    SgtrDetrForObjectDetection,
    SgtrDetrModelOutput,
    entity_probabilities,
    init_transformer_weights,
)
from .predicate_node_generator import EntityNodes, PredicateNodeGenerator
from .prediction_heads import BoxHead, ClassHead


@dataclass
class SgtrModelOutput(ModelOutput):
    """Entity and predicate nodes.

    Args:
        entity_states: (B, N, d_model) entity nodes.
        entity_boxes: (B, N, 4) their boxes, cxcywh relative to the image.
        predicate_states: (L, B, Q, d_model) of the levels of the structural decoder.
        subject_states: (L, B, Q, d_model).
        object_states: (L, B, Q, d_model).
        detector: Output of the detector's base model.
    """

    # Always there, but transformers wants a default for every output.
    entity_states: Tensor = None  # type: ignore[assignment]
    entity_boxes: Tensor = None  # type: ignore[assignment]
    predicate_states: Tensor = None  # type: ignore[assignment]
    subject_states: Tensor = None  # type: ignore[assignment]
    object_states: Tensor = None  # type: ignore[assignment]
    detector: SgtrDetrModelOutput = None  # type: ignore[assignment]


@dataclass
class SgtrSceneGraphOutput(ModelOutput):
    """Everything that a scene graph is made of.

    Args:
        loss: Sum of `loss_dict`, when labels were given.
        loss_dict: Weighted losses by name.
        logits: Entities, (B, N, C + 1) with no-object last, or (B, N, C) for a focal head.
        pred_boxes: (B, N, 4) cxcywh relative to the image without its padding.
        entity_probabilities: (B, N, C), no-object removed.
        predicate_logits: (B, Q, P), or (B, Q, P + 1) with background first for a softmax head.
        predicate_probabilities: (B, Q, P), background removed.
        relation_vectors: (B, Q, 4) centres of subject and object: x, y, x, y.
        subject_logits: (B, Q, C + 1) or (B, Q, C) classes that the subject should have.
        subject_boxes: (B, Q, 4) box that it should have.
        object_logits: Likewise of the object.
        object_boxes: Likewise of the object.
        subject_scores: (B, Q, N) how well each entity fits as the subject.
        object_scores: (B, Q, N) how well each entity fits as the object.
        auxiliary_outputs: The raw heads and the scores of the earlier levels of the structural
            decoder, when labels were given.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    entity_probabilities: Tensor | None = None
    predicate_logits: Tensor | None = None
    predicate_probabilities: Tensor | None = None
    relation_vectors: Tensor | None = None
    subject_logits: Tensor | None = None
    subject_boxes: Tensor | None = None
    object_logits: Tensor | None = None
    object_boxes: Tensor | None = None
    subject_scores: Tensor | None = None
    object_scores: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None


class SgtrPreTrainedModel(FreezablePreTrainedModel):
    """What the scene graph classes share with transformers: names, backends, initial weights."""

    config: SgtrConfig
    config_class = SgtrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012 - transformers' contract
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_transformer_weights(module, self.config.initializer_range)


class SgtrModel(SgtrPreTrainedModel):
    """Detector and predicate node generator."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__(config)
        self.detector = SgtrDetrForObjectDetection(config.detector)
        self.predicate_node_generator = PredicateNodeGenerator(config)
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Stop the training of the detector, if it is frozen."""
        if self.config.freeze_detector:
            self.detector.requires_grad_(False)

    def train(self, mode: bool = True) -> "SgtrModel":
        """Switch modes; a frozen detector stays in evaluation mode."""
        super().train(mode)
        if self.config.freeze_detector:
            self.detector.eval()
        return self

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        annotations: PaddedAnnotations | None = None,
        detector: SgtrDetrModelOutput | None = None,
        **kwargs: Any,
    ) -> SgtrModelOutput:
        """Generate the nodes of the graph.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            pixel_mask: (B, H, W), 1 where the image is and 0 on padding; all 1 when None.
            annotations: In training; the detector then returns all its levels.
            detector: The detector's output for these images, which is then not run.
            **kwargs: For the attention backend.
        """
        if detector is None:
            detector = self._detect(pixel_values, pixel_mask, annotations, **kwargs)
        entities = EntityNodes(detector.last_hidden_state, detector.pred_boxes)
        states = self.predicate_node_generator(detector.memory, entities, **kwargs)
        return SgtrModelOutput(
            entity_states=entities.features,
            entity_boxes=entities.boxes,
            predicate_states=states.predicate,
            subject_states=states.subject,
            object_states=states.object,
            detector=detector,
        )

    def _detect(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None,
        annotations: PaddedAnnotations | None,
        **kwargs: Any,
    ) -> SgtrDetrModelOutput:
        is_frozen = self.config.freeze_detector
        detector_is_trained = annotations is not None and not is_frozen
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen):
            return self.detector.model(
                pixel_values,
                pixel_mask,
                annotations if detector_is_trained else None,
                all_levels=detector_is_trained,
                **kwargs,
            )


class SgtrForSceneGraphGeneration(SgtrPreTrainedModel):
    """`SgtrModel` with heads, graph assembling, matching and losses."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__(config)
        self.model = SgtrModel(config)
        width, detector = config.d_model, config.detector
        entities_are_focal = detector.classification == "focal"
        entity_columns = config.num_labels + (not entities_are_focal)
        predicates_are_focal = config.predicate_classification == "focal"
        # A softmax head begins with background.
        predicate_columns = config.num_predicates + (not predicates_are_focal)
        self.predicate_head = ClassHead(width, predicate_columns, is_focal=predicates_are_focal)
        self.relation_vector_head = nn.Linear(width, 4)
        self.subject_class_head = ClassHead(width, entity_columns, is_focal=entities_are_focal)
        self.subject_box_head = BoxHead(width)
        self.object_class_head = ClassHead(width, entity_columns, is_focal=entities_are_focal)
        self.object_box_head = BoxHead(width)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        detector_features: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> SgtrSceneGraphOutput:
        """Predict entities, predicates and their links, and the loss when `labels` are given.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            pixel_mask: (B, H, W), 1 where the image is and 0 on padding; all 1 when None.
            labels: One dict an image: class_labels (T,) and boxes (T, 4) as for the detector, and
                relations (R, 3): subject and object as indices of entities, predicate from 0.
            detector_features: Of the method of this name, instead of the images; for a frozen
                detector.
            **kwargs: For the attention backend.

        Raises:
            ValueError: If labels or relations are out of range, there are more entities
                (relations) than entity (predicate) queries, or neither or both of images and
                features are given.
        """
        if (pixel_values is None) == (detector_features is None):
            raise ValueError("Give either `pixel_values` or `detector_features`.")
        annotations = None
        if labels is not None:
            annotations = pad_annotations(
                labels,
                self.device,
                num_classes=self.config.num_labels,
                num_predicates=self.config.num_predicates,
            )
        if detector_features is not None:
            image_sizes = detector_features["image_sizes"]
            cached = self._read_features(detector_features)
            nodes = self.model(annotations=annotations, detector=cached, **kwargs)
        elif pixel_values is not None:
            image_sizes = _image_sizes(pixel_values, pixel_mask)
            nodes = self.model(pixel_values, pixel_mask, annotations, **kwargs)
        entities = self.model.detector.read_levels(nodes.detector)
        triplets = self.read_levels(
            nodes, entities, image_sizes, all_levels=annotations is not None
        )
        output = self._summarize(entities, triplets)
        if annotations is not None:
            output.loss_dict = self.losses(nodes, entities, triplets, annotations)
            output.loss = torch.stack(list(output.loss_dict.values())).sum()
        return output

    @torch.no_grad()
    def detector_features(self, pixel_values: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Run a frozen detector alone, for outputs that can be kept and given to `forward`.

        Args:
            pixel_values: (B, 3, H, W) normalised images without padding.
            **kwargs: For the attention backend.

        Returns:
            entity_states (B, N, d_model), entity_boxes (B, N, 4), memory_features and
            memory_position (B, S, d_model), memory_cells (B, S, 4), image_sizes (B, 2).
        """
        nodes = self.model.detector.model(pixel_values, **kwargs)
        features = {
            "entity_states": nodes.last_hidden_state,
            "entity_boxes": nodes.pred_boxes,
            "memory_features": nodes.memory.features,
            "memory_position": nodes.memory.position,
            "memory_cells": nodes.memory.cells,
            "image_sizes": _image_sizes(pixel_values, None),
        }
        batch_size = len(pixel_values)
        return {
            name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in features.items()
        }

    def _read_features(self, features: Mapping[str, Tensor]) -> SgtrDetrModelOutput:
        if not self.config.freeze_detector:
            raise ValueError(
                "`detector_features` need a frozen detector, `freeze_detector=True`; else they "
                "would be out of date after the first update."
            )
        memory = ImageMemory(
            features["memory_features"], features["memory_position"], features["memory_cells"]
        )
        return SgtrDetrModelOutput(
            last_hidden_state=features["entity_states"],
            pred_boxes=features["entity_boxes"],
            memory=memory,
        )

    def read_levels(
        self,
        nodes: SgtrModelOutput,
        entities: EntityLevels,
        image_sizes: Tensor,
        *,
        all_levels: bool,
    ) -> TripletPredictions:
        """Read triplets off the predicate nodes and link them to entities.

        Args:
            nodes: Of `SgtrModel`.
            entities: The detector's predictions; the last level's are the entities of the graph.
            image_sizes: (B, 2) height and width without padding, in pixels.
            all_levels: Read every level instead of the last.
        """
        first = 0 if all_levels and self.config.auxiliary_loss else -1
        predicate = nodes.predicate_states[first:]
        subject, object_ = nodes.subject_states[first:], nodes.object_states[first:]
        vectors = self.relation_vector_head(predicate).sigmoid()
        subject_logits = self.subject_class_head(subject)
        subject_boxes = self.subject_box_head(subject).sigmoid()
        object_logits = self.object_class_head(object_)
        object_boxes = self.object_box_head(object_).sigmoid()
        classification = self.config.detector.classification
        entity = (
            entity_probabilities(entities.logits[-1], classification),
            entities.boxes[-1],
        )
        subject_indicator = (
            vectors[..., :2],
            entity_probabilities(subject_logits, classification),
            subject_boxes,
        )
        object_indicator = (
            vectors[..., 2:],
            entity_probabilities(object_logits, classification),
            object_boxes,
        )
        return TripletPredictions(
            predicate_logits=self.predicate_head(predicate),
            relation_vectors=vectors,
            subject_logits=subject_logits,
            subject_boxes=subject_boxes,
            object_logits=object_logits,
            object_boxes=object_boxes,
            subject_scores=assembling_scores(self.config, subject_indicator, entity, image_sizes),
            object_scores=assembling_scores(self.config, object_indicator, entity, image_sizes),
        )

    def losses(
        self,
        nodes: SgtrModelOutput,
        entities: EntityLevels,
        triplets: TripletPredictions,
        annotations: PaddedAnnotations,
    ) -> dict[str, Tensor]:
        """Weighted losses of predicates, and of entities unless the detector is frozen.

        Arguments are the outputs of the parts, with all levels, and the padded annotations.
        """
        entity_nodes = (entities.logits[-1], entities.boxes[-1])
        if self.config.freeze_detector:
            matches = match_triplets(self.config, triplets, *entity_nodes, annotations)
            return scene_graph_losses(self.config, triplets, annotations, matches)
        detector = self.model.detector
        problems = detector.matching_problems(nodes.detector, entities, annotations)
        if self.config.legacy_triplet_matching:
            entity_matches = list(assign_all(*problems))
            matches = match_triplets(self.config, triplets, *entity_nodes, annotations)
        else:
            triplet_problem = AssignmentProblem(
                triplet_matching_costs(self.config, triplets, *entity_nodes, annotations),
                annotations.relation_valid,
                "num_predicate_queries",
            )
            *entity_matches, matches = assign_all(*problems, triplet_problem)
        losses = scene_graph_losses(self.config, triplets, annotations, matches)
        entity_losses = detector.losses(nodes.detector, entities, annotations, entity_matches)
        return losses | {f"{name}_of_entities": loss for name, loss in entity_losses.items()}

    def _summarize(
        self, entities: EntityLevels, triplets: TripletPredictions
    ) -> SgtrSceneGraphOutput:
        """Make the public output, without losses."""
        logits = entities.logits[-1]
        *earlier, last = (
            TripletPredictions(*(field[level] for field in triplets))
            for level in range(len(triplets.predicate_logits))
        )
        return SgtrSceneGraphOutput(
            logits=logits,
            pred_boxes=entities.boxes[-1],
            entity_probabilities=entity_probabilities(logits, self.config.detector.classification),
            predicate_probabilities=predicate_probabilities(
                last.predicate_logits, self.config.predicate_classification
            ),
            auxiliary_outputs=[level._asdict() for level in earlier] or None,
            **last._asdict(),
        )


def predicate_probabilities(logits: Tensor, classification: str) -> Tensor:
    """Turn logits into the probabilities (..., P) of the real predicates.

    Args:
        logits: (..., P + 1) with background first for "softmax", (..., P) for "focal".
        classification: `SgtrConfig.predicate_classification`.
    """
    if classification == "softmax":
        return logits.softmax(dim=-1)[..., 1:]
    return logits.sigmoid()


def _image_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Heights and widths (B, 2) of the images without their padding."""
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return pixel_values.new_tensor([height, width]).expand(batch_size, 2)
    is_image = pixel_mask > 0
    return torch.stack((is_image.any(2).sum(1), is_image.any(1).sum(1)), dim=-1)
