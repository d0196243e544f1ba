"""SGTR (Li et al. 2022) and SGTR+: an image becomes entity and predicate nodes and their graph."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_sgtr import SgtrConfig
from ..losses.detection_loss import count_annotations
from ..losses.hungarian_matching import (
    AssignmentProblem,
    LossCounts,
    PaddedAnnotations,
    assign_all,
    pad_annotations,
)
from ..losses.scene_graph_loss import (
    MatchedEntities,
    TripletAssignment,
    relatedness_loss,
    scene_graph_losses,
)
from ..losses.triplet_matching_costs import legacy_triplet_matching, triplet_matching_costs
from ..losses.triplet_predictions import TripletPredictions, count_repetitions, repeat_relations
from .backbone_freezing import FreezablePreTrainedModel
from .detection_outputs import EntityLevels, SgtrDetrModelOutput
from .entity_decoder import ImageMemory
from .given_entities import CERTAIN_LOGIT, GivenEntities, pad_given_entities
from .graph_assembling import UnifiedAssembling, assembling_scores, image_sizes_of
from .graph_nodes import EntityNodes, TripletNodes, TripletStates
from .graph_outputs import SgtrModelOutput, SgtrSceneGraphOutput
from .modeling_sgtr_detr import (
    SgtrDetrForObjectDetection,
    entity_probabilities,
    init_transformer_weights,
)
from .predicate_node_generator import PredicateNodeGenerator
from .prediction_heads import (
    BoxHead,
    ClassHead,
    predicate_probabilities,
    triplet_class_probabilities,
)


class SgtrPreTrainedModel(FreezablePreTrainedModel):
    """What the scene graph classes share with transformers: names, backends, initial weights."""

    config: SgtrConfig
    config_class = SgtrConfig
    base_model_prefix = "model"
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012 - transformers' contract

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
        given: GivenEntities | None = None,
        **kwargs: Any,
    ) -> SgtrModelOutput:
        """Generate the nodes of the graph.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            pixel_mask: (B, H, W), 1 where the image is and 0 on padding; all 1 when None.
            annotations: In training; the detector then returns all its levels.
            detector: The detector's output for these images, which is then not run.
            given: Entities to take instead of detecting any.
            **kwargs: For the attention backend.
        """
        if detector is None:
            detector = self._detect(pixel_values, pixel_mask, annotations, given, **kwargs)
        levels = self.detector.read_levels(detector)
        classification = self.config.detector.classification
        entities = EntityNodes(
            detector.last_hidden_state,
            detector.pred_boxes,
            entity_probabilities(levels.logits[-1], classification),
            None if detector.given is None else detector.given.valid,
        )
        triplets, entities = self.predicate_node_generator(
            detector.memory, entities, annotations, **kwargs
        )
        return SgtrModelOutput(
            entity_states=detector.last_hidden_state,
            entity_boxes=detector.pred_boxes,
            predicate_states=triplets.states.predicate,
            subject_states=triplets.states.subject,
            object_states=triplets.states.object,
            detector=detector,
            entity_levels=levels,
            entities=entities,
            triplets=triplets,
        )

    def _detect(
        self,
        pixel_values: Tensor | None,
        pixel_mask: Tensor | None,
        annotations: PaddedAnnotations | None,
        given: GivenEntities | None,
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
                given=given,
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
        self.subject_class_head = ClassHead(width, entity_columns, is_focal=entities_are_focal)
        self.object_class_head = ClassHead(width, entity_columns, is_focal=entities_are_focal)
        if config.predicate_node_generator == "structural":
            # The boxes of the spatial-aware generator are its anchors.
            self.relation_vector_head = nn.Linear(width, 4)
            self.subject_box_head = BoxHead(width)
            self.object_box_head = BoxHead(width)
        self.assembling = (
            UnifiedAssembling(config) if config.graph_assembling == "unified" else None
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        detector_features: Mapping[str, Tensor] | None = None,
        entity_boxes: Sequence[Tensor] | None = None,
        entity_labels: Sequence[Tensor] | None = None,
        loss_counts: LossCounts | None = None,
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
            entity_boxes: For each image (E, 4) boxes, cxcywh relative to the image without its
                padding: relations are then found among these (SGCls). Needs anchor queries.
            entity_labels: For each image (E,) their classes from 0 (PredCls).
            loss_counts: Of `loss_counts`, where gradients of several batches are accumulated.
            **kwargs: For the attention backend.

        Raises:
            ValueError: If labels or relations are out of range, there are more entities
                (relations) than entity (predicate) queries, neither or both of images and
                features are given, or entities are given together with labels or features, or to
                a detector that cannot take them.
        """
        if (pixel_values is None) == (detector_features is None):
            raise ValueError("Give either `pixel_values` or `detector_features`.")
        annotations = None
        if labels is not None:
            annotations = self._pad(labels)
            counts = self._count(annotations) if loss_counts is None else loss_counts
            annotations = annotations._replace(counts=counts)
        if entity_boxes is not None and (labels is not None or detector_features is not None):
            raise ValueError("`entity_boxes` go with images alone, not with labels or features.")
        given = self._given(entity_boxes, entity_labels)
        if detector_features is not None:
            image_sizes = detector_features["image_sizes"]
            cached = self._read_features(detector_features)
            nodes = self.model(annotations=annotations, detector=cached, **kwargs)
        elif pixel_values is not None:
            nodes = self.model(pixel_values, pixel_mask, annotations, given=given, **kwargs)
            image_sizes = image_sizes_of(pixel_values, pixel_mask)
        triplets = self.read_levels(
            nodes, nodes.triplets, image_sizes, all_levels=annotations is not None
        )
        output = self._summarize(nodes.entity_levels, triplets, given=given)
        if annotations is not None:
            losses = self.losses(nodes, triplets, image_sizes, annotations)
            # An output that gets fields afterwards would not list them among its items.
            output = replace(output, loss=torch.stack([*losses.values()]).sum(), loss_dict=losses)
        return output

    def loss_counts(self, labels: Sequence[dict[str, Tensor]], num_batches: int = 1) -> LossCounts:
        """Count what the losses of an update are divided by, as the detector's does."""
        return self._count(self._pad(labels), num_batches)

    def _count(self, annotations: PaddedAnnotations, num_batches: int = 1) -> LossCounts:
        repetitions = count_repetitions(self.config, annotations)
        return count_annotations(annotations, self.config.num_predicates, num_batches, repetitions)

    def _pad(self, labels: Sequence[dict[str, Tensor]]) -> PaddedAnnotations:
        config = self.config
        return pad_annotations(
            labels,
            self.device,
            num_classes=config.num_labels,
            num_predicates=config.num_predicates,
        )

    def _given(
        self, boxes: Sequence[Tensor] | None, labels: Sequence[Tensor] | None
    ) -> GivenEntities | None:
        if boxes is not None:
            return pad_given_entities(self.config.detector, boxes, labels, self.device)
        if labels is not None:
            raise ValueError("`entity_labels` need `entity_boxes`, got None.")
        return None

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
            "image_sizes": image_sizes_of(pixel_values, None),
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
        triplets: TripletNodes,
        image_sizes: Tensor,
        *,
        all_levels: bool,
    ) -> TripletPredictions:
        """Read triplets off predicate nodes and link them to entities.

        Args:
            nodes: Of `SgtrModel`; its entities are those of the graph.
            triplets: Predicate nodes: `nodes.triplets`, or the noised ones among them.
            image_sizes: (B, 2) height and width without padding, in pixels.
            all_levels: Read every level instead of the last.
        """
        first = 0 if all_levels and self.config.auxiliary_loss else -1
        predicate, subject, object_ = states = TripletStates(
            *(role[first:] for role in triplets.states)
        )
        if triplets.anchors is None:
            vectors = self.relation_vector_head(predicate).sigmoid()
            boxes = (
                self.subject_box_head(subject).sigmoid(),
                self.object_box_head(object_).sigmoid(),
            )
        else:
            boxes = (triplets.anchors.subject[first:], triplets.anchors.object[first:])
            vectors = torch.cat([role[..., :2] for role in boxes], dim=-1)
        logits = self.predicate_head(predicate)
        if triplets.valid is not None:
            logits = self._hide(logits, triplets.valid)
        predictions = TripletPredictions(
            predicate_logits=logits,
            relation_vectors=vectors,
            subject_logits=self.subject_class_head(subject),
            subject_boxes=boxes[0],
            object_logits=self.object_class_head(object_),
            object_boxes=boxes[1],
            subject_scores=predicate,
            object_scores=predicate,
        )
        if self.assembling is None:
            return self._link_by_rule(predictions, nodes, image_sizes)
        links = self.assembling(states, boxes, nodes.entities)
        return predictions._replace(
            subject_scores=links.subject.exp(),
            object_scores=links.object.exp(),
            subject_log_correspondence=links.subject,
            object_log_correspondence=links.object,
        )

    def _link_by_rule(
        self, predictions: TripletPredictions, nodes: SgtrModelOutput, image_sizes: Tensor
    ) -> TripletPredictions:
        classification = self.config.detector.classification
        entity = (nodes.entities.probabilities, nodes.entities.boxes)
        subject, object_ = (
            assembling_scores(
                self.config,
                (centres, entity_probabilities(logits, classification), boxes),
                entity,
                image_sizes,
            )
            for centres, logits, boxes in (
                (
                    predictions.relation_vectors[..., :2],
                    predictions.subject_logits,
                    predictions.subject_boxes,
                ),
                (
                    predictions.relation_vectors[..., 2:],
                    predictions.object_logits,
                    predictions.object_boxes,
                ),
            )
        )
        return predictions._replace(subject_scores=subject, object_scores=object_)

    def _hide(self, logits: Tensor, valid: Tensor) -> Tensor:
        """Rule all predicates (L, B, Q, P) out for queries that are not there."""
        nothing = torch.full_like(logits, -CERTAIN_LOGIT)
        if self.config.predicate_classification == "softmax":
            nothing[..., 0] = CERTAIN_LOGIT
        return torch.where(valid[..., None], logits, nothing)

    def losses(
        self,
        nodes: SgtrModelOutput,
        triplets: TripletPredictions,
        image_sizes: Tensor,
        annotations: PaddedAnnotations,
    ) -> dict[str, Tensor]:
        """Weighted losses of predicates, and of entities unless the detector is frozen.

        Arguments are the outputs of the parts, with all levels, and the padded annotations.
        """
        config, detector, levels = self.config, self.model.detector, nodes.entity_levels
        needs_entities = config.graph_assembling == "unified" or config.pair_queries
        entity_problems = (
            detector.matching_problems(nodes.detector, levels, annotations)
            if needs_entities or not config.freeze_detector
            else []
        )
        entity_matches, assignments = self._match(nodes, triplets, entity_problems, annotations)
        entities = None
        if config.graph_assembling == "unified":
            probabilities = nodes.entities.probabilities
            entities = MatchedEntities(nodes.entities.boxes, probabilities, entity_matches[0][-1])
        losses = scene_graph_losses(config, triplets, *assignments, entities=entities)
        relatedness = nodes.triplets.relatedness_logits
        if relatedness is not None:
            losses["loss_relatedness"] = relatedness_loss(
                config, relatedness, annotations, entity_matches[0][-1]
            )
        if nodes.triplets.denoising is not None:
            losses |= self._denoising_losses(nodes, image_sizes, annotations, entities)
        if not config.freeze_detector:
            found = detector.losses(nodes.detector, levels, annotations, entity_matches)
            losses |= {f"{name}_of_entities": loss for name, loss in found.items()}
        return losses

    def _match(
        self,
        nodes: SgtrModelOutput,
        triplets: TripletPredictions,
        entity_problems: list[AssignmentProblem],
        annotations: PaddedAnnotations,
    ) -> tuple[list[Tensor], list[TripletAssignment]]:
        """Match entities and, at the earlier and at the last level, triplets; one copy to host."""
        config = self.config
        arguments = (nodes.entity_levels.logits[-1], nodes.entity_levels.boxes[-1], annotations)
        if config.legacy_triplet_matching:
            matches = legacy_triplet_matching(config, triplets, *arguments)
            found = list(assign_all(*entity_problems)) if entity_problems else []
            return found, [TripletAssignment(annotations, matches)]
        costs = triplet_matching_costs(config, triplets, *arguments)
        times = config.auxiliary_assignments
        repeated = repeat_relations(annotations, times, count_repetitions(config, annotations))
        problems = [
            AssignmentProblem(
                costs[:-1].repeat(1, 1, 1, times),
                repeated.relation_valid,
                "num_predicate_queries",
            ),
            AssignmentProblem(costs[-1:], annotations.relation_valid, "num_predicate_queries"),
        ]
        *entity_matches, earlier, last = assign_all(*entity_problems, *problems)
        return entity_matches, [
            TripletAssignment(repeated, earlier),
            TripletAssignment(annotations, last),
        ]

    def _denoising_losses(
        self,
        nodes: SgtrModelOutput,
        image_sizes: Tensor,
        annotations: PaddedAnnotations,
        entities: MatchedEntities | None,
    ) -> dict[str, Tensor]:
        """Losses of noised relations, each of which has its own query."""
        denoising = nodes.triplets.denoising
        if denoising is None:
            return {}
        predictions = self.read_levels(nodes, denoising, image_sizes, all_levels=True)
        repeated = repeat_relations(annotations, self.config.num_triplet_denoising_groups)
        valid = repeated.relation_valid
        own = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
        matches = own.expand(len(predictions.predicate_logits), -1, -1)
        losses = scene_graph_losses(
            self.config,
            predictions,
            # Padded ones would count for as much as the fullest image of the batch has.
            TripletAssignment(repeated, matches, only_matched=True),
            entities=entities,
        )
        return {name.replace("loss_", "loss_denoising_", 1): loss for name, loss in losses.items()}

    def _summarize(
        self, entities: EntityLevels, triplets: TripletPredictions, given: GivenEntities | None
    ) -> SgtrSceneGraphOutput:
        """Make the public output, without losses."""
        config, logits = self.config, entities.logits[-1]
        probabilities = entity_probabilities(logits, config.detector.classification)
        calibrated = triplet_class_probabilities(config, probabilities) if given is None else None
        *earlier, last = (
            {name: field[level] for name, field in triplets._asdict().items() if field is not None}
            for level in range(len(triplets.predicate_logits))
        )
        return SgtrSceneGraphOutput(
            logits=logits,
            pred_boxes=entities.boxes[-1],
            entity_probabilities=probabilities,
            triplet_class_probabilities=calibrated,
            given_entities=None if given is None else given.valid,
            predicate_probabilities=predicate_probabilities(config, last["predicate_logits"]),
            auxiliary_outputs=earlier or None,
            **last,
        )
