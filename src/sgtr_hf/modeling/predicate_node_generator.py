"""The predicate node generators of SGTR (Li et al. 2022, section 3.3) and SGTR+.

Triplet queries are composed from the entities of the image, or start from its likeliest pairs, and
are decoded by three cooperating decoders: of the predicate, which looks at the image, and of
subject and object, which look at the entity nodes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from ..configuration.configuration_sgtr import SgtrConfig
from ..losses.hungarian_matching import PaddedAnnotations
from .denoising_queries import denoising_visibility
from .entity_decoder import ImageMemory
from .graph_nodes import (
    EntityNodes,
    TripletAnchors,
    TripletNodes,
    TripletStates,
    join,
    split_denoising,
)
from .pair_selection import PairContent, PairSelection, SelectedPairs, read_pairs
from .position_embedding import box_sine_embedding, centre_sine_embedding
from .prediction_heads import BoxHead, MultiLayerPerceptron
from .spatial_aware_decoder import SpatialAwareDecoder
from .transformer_layers import DecoderLayer, EncoderLayer
from .triplet_denoising import DenoisingTriplets, TripletDenoising


class PredicateEncoder(nn.Module):
    """Turns the detector's image memory into one for predicates."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            EncoderLayer(config) for _ in range(config.predicate_encoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def forward(self, memory: ImageMemory, **kwargs: Any) -> Tensor:
        """Return features (B, S, d_model)."""
        features = memory.features
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=features, attention_mask=memory.padding_mask
        )
        for layer in self.layers:
            features = layer(features, memory.position, mask, **kwargs)
        return self.norm(features)


class CompositionalQueries(nn.Module):
    """Composes the content of predicate, subject and object queries from the entity nodes."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.temperature = config.detector.position_temperature
        self.position_projection = nn.Linear(config.d_model, config.d_model)
        self.layer = DecoderLayer(config)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.split = nn.Linear(config.d_model, 3 * config.d_model)

    def forward(self, queries: Tensor, entities: EntityNodes, **kwargs: Any) -> TripletStates:
        """Compose.

        Args:
            queries: (B, Q, d_model) static predicate queries, or content of pairs.
            entities: Entity nodes of the image.
            **kwargs: Attention masks, and for the attention backend.
        """
        centres = centre_sine_embedding(entities.boxes[..., :2], self.d_model, self.temperature)
        memory = entities.features + self.position_projection(centres)
        composed = self.norm(self.layer(queries, memory, **kwargs))
        # The release orders its 3 * d_model outputs as subject, object, predicate.
        subject, object_, predicate = self.split(composed.relu()).chunk(3, dim=-1)
        return TripletStates(predicate, subject, object_)


class StructuralPredicateDecoder(nn.Module):
    """Levels of a predicate, a subject and an object layer; entities flow into the predicate."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        levels = range(config.predicate_decoder_layers)
        self.predicate_layers = nn.ModuleList(DecoderLayer(config) for _ in levels)
        self.subject_layers = nn.ModuleList(DecoderLayer(config) for _ in levels)
        self.object_layers = nn.ModuleList(DecoderLayer(config) for _ in levels)
        self.predicate_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.indicator_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.subject_fusion = nn.Linear(config.d_model, config.d_model)
        self.object_fusion = nn.Linear(config.d_model, config.d_model)

    def forward(
        self,
        states: TripletStates,
        positions: TripletStates,
        image: dict[str, Tensor | None],
        entities: dict[str, Tensor | None],
        **kwargs: Any,
    ) -> TripletStates:
        """Decode all levels.

        Args:
            states: Content of the queries, (B, Q, d_model) each.
            positions: Their positional parts, likewise.
            image: `memory`, `memory_position` and `memory_mask` of the predicate layers.
            entities: `memory` of the subject and object layers.
            **kwargs: For the attention backend.

        Returns:
            States of all levels, (L, B, Q, d_model) each.
        """
        levels = []
        for predicate_layer, subject_layer, object_layer in zip(
            self.predicate_layers, self.subject_layers, self.object_layers, strict=True
        ):
            predicate = self.predicate_norm(
                predicate_layer(
                    states.predicate, query_position=positions.predicate, **image, **kwargs
                )
            )
            subject = self.indicator_norm(
                subject_layer(
                    states.subject, query_position=positions.subject, **entities, **kwargs
                )
            )
            object_ = self.indicator_norm(
                object_layer(states.object, query_position=positions.object, **entities, **kwargs)
            )
            fused = (self.subject_fusion(subject) + self.object_fusion(object_)).relu()
            # The normed states go on to the next level, as released.
            states = TripletStates(predicate + fused, subject, object_)
            levels.append(states)
        return TripletStates(*(torch.stack(role) for role in zip(*levels, strict=True)))


class EntityEmbedding(nn.Module):
    """Lets entity nodes know their box and their class.

    The vectors of a detector with anchors say how to refine a box, not where it is.
    """

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.d_model, self.temperature = width, config.detector.position_temperature
        self.box_head = (
            MultiLayerPerceptron(2 * width, width, width) if config.entity_box_embedding else None
        )
        self.class_projection = (
            nn.Linear(config.num_labels, width, bias=False)
            if config.entity_class_embedding
            else None
        )

    def forward(self, entities: EntityNodes) -> EntityNodes:
        """Add the embeddings to the features; no gradient flows to boxes and probabilities."""
        features = entities.features
        if self.box_head is not None:
            boxes = box_sine_embedding(entities.boxes.detach(), self.d_model, self.temperature)
            features = features + self.box_head(boxes)
        if self.class_projection is not None:
            features = features + self.class_projection(entities.probabilities.detach())
        return entities._replace(features=features)


class QueryStart(NamedTuple):
    """What the triplet queries start with."""

    states: TripletStates
    """(B, Q, d_model) content, which composition adds to; zeros unless they start from pairs."""
    positions: TripletStates | None
    """(B, Q, d_model) learned ones; None for queries with anchors."""
    anchors: TripletAnchors | None
    """(B, Q, 4) boxes of the pairs; None unless the queries start from them."""
    pairs: SelectedPairs | None


class PredicateNodeGenerator(nn.Module):
    """Predicate encoder, start and composition of the queries, and their decoder."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.config = config
        width, count = config.d_model, config.num_predicate_queries
        self.encoder = PredicateEncoder(config)
        self.entity_embedding = EntityEmbedding(config)
        is_spatial = config.predicate_node_generator == "spatial_aware"
        self.pair_selection = PairSelection(config) if config.pair_queries else None
        if config.pair_queries:
            self.pair_content = PairContent(config)
        # Content of queries without pairs, and position of queries without anchors.
        if not (config.pair_queries and is_spatial):
            self.predicate_query_embedding = nn.Embedding(count, width)
        if not is_spatial:
            self.subject_query_embedding = nn.Embedding(count, width)
            self.object_query_embedding = nn.Embedding(count, width)
        if is_spatial and not config.pair_queries:
            self.subject_anchor_head = BoxHead(width)
            self.object_anchor_head = BoxHead(width)
        self.compositional_queries = (
            CompositionalQueries(config) if config.dynamic_queries else None
        )
        self.denoising = (
            TripletDenoising(config) if config.num_triplet_denoising_groups > 0 else None
        )
        self.decoder: StructuralPredicateDecoder | SpatialAwareDecoder = (
            SpatialAwareDecoder(config) if is_spatial else StructuralPredicateDecoder(config)
        )

    def forward(
        self,
        memory: ImageMemory,
        entities: EntityNodes,
        annotations: PaddedAnnotations | None = None,
        **kwargs: Any,
    ) -> tuple[TripletNodes, EntityNodes]:
        """Generate predicate nodes.

        Args:
            memory: The image as the detector encoded it.
            entities: The detector's entity nodes.
            annotations: For denoising, in training mode.
            **kwargs: For the attention backend.

        Returns:
            The triplet nodes, and the entity nodes as they were embedded.
        """
        entities = self.entity_embedding(entities)
        denoising = None
        if self.denoising is not None and self.training and annotations is not None:
            denoising = self.denoising(annotations)
        start = self._start(entities, denoising)
        masks = {
            "self_attention_mask": self._self_mask(start, denoising),
            "memory_mask": self._mask(start, entities.features, entities.valid),
        }
        states = self._compose(start, entities, masks, **kwargs)
        nodes = self._decode(memory, start, states, entities, masks, **kwargs)
        if denoising is not None:
            nodes = split_denoising(nodes, denoising.valid)
        return nodes, entities

    def _start(self, entities: EntityNodes, denoising: DenoisingTriplets | None) -> QueryStart:
        batch_size, _, width = entities.features.shape
        positions = None
        if self.config.predicate_node_generator == "structural":
            positions = TripletStates(
                *(
                    embedding.weight.expand(batch_size, -1, -1)
                    for embedding in (
                        self.predicate_query_embedding,
                        self.subject_query_embedding,
                        self.object_query_embedding,
                    )
                )
            )
        if self.pair_selection is None:
            zeros = entities.features.new_zeros(
                batch_size, self.config.num_predicate_queries, width
            )
            return QueryStart(TripletStates(zeros, zeros, zeros), positions, None, None)
        pairs = self.pair_selection(entities)
        if positions is not None:
            count = pairs.subjects.shape[1]
            positions = TripletStates(*(role[:, :count] for role in positions))
        subjects, objects = read_pairs(entities, pairs)
        if denoising is not None:
            subjects = self._with_noised(denoising.subjects, subjects)
            objects = self._with_noised(denoising.objects, objects)
        content = self.pair_content(
            (subjects.features, objects.features), (subjects.boxes, objects.boxes)
        )
        return QueryStart(
            TripletStates(content, subjects.features, objects.features),
            positions,
            TripletAnchors(subjects.boxes.detach(), objects.boxes.detach()),
            pairs,
        )

    def _with_noised(self, noised: EntityNodes, nodes: EntityNodes) -> EntityNodes:
        # Boxes and classes of annotations are float32 in any model.
        tables = zip(noised[:3], nodes[:3], strict=True)
        noised = self.entity_embedding(EntityNodes(*(one.to(other) for one, other in tables)))
        return EntityNodes(*(join(*tables) for tables in zip(noised[:3], nodes[:3], strict=True)))

    def _compose(
        self,
        start: QueryStart,
        entities: EntityNodes,
        masks: dict[str, Tensor | None],
        **kwargs: Any,
    ) -> TripletStates:
        if self.compositional_queries is None:
            return start.states
        queries = start.states.predicate
        if start.pairs is None:
            queries = self.predicate_query_embedding.weight.expand(len(queries), -1, -1)
        composed = self.compositional_queries(queries, entities, **masks, **kwargs)
        if start.pairs is None:
            return composed
        return TripletStates(
            *(role + more for role, more in zip(start.states, composed, strict=True))
        )

    def _decode(
        self,
        memory: ImageMemory,
        start: QueryStart,
        states: TripletStates,
        entities: EntityNodes,
        masks: dict[str, Tensor | None],
        **kwargs: Any,
    ) -> TripletNodes:
        features = self.encoder(memory, **kwargs)
        image = {
            "memory": features,
            "memory_position": memory.position,
            "memory_mask": self._mask(start, features, memory.padding_mask),
        }
        anchors: TripletAnchors | None = None
        if isinstance(self.decoder, SpatialAwareDecoder):
            levels, anchors = self.decoder(
                states,
                self._first_anchors(start, states),
                image,
                memory.cells.to(features.dtype),
                entities,
                masks["memory_mask"],
                masks["self_attention_mask"],
                **kwargs,
            )
        else:
            nodes = {"memory": entities.features, "memory_mask": masks["memory_mask"]}
            levels = self.decoder(states, start.positions, image, nodes, **kwargs)
        found = TripletNodes(levels, anchors)
        if start.pairs is not None:
            found.relatedness_logits, found.valid = (
                start.pairs.relatedness_logits,
                start.pairs.valid,
            )
        return found

    def _first_anchors(self, start: QueryStart, states: TripletStates) -> TripletAnchors:
        if start.anchors is not None:
            return start.anchors
        return TripletAnchors(
            self.subject_anchor_head(states.subject).sigmoid(),
            self.object_anchor_head(states.object).sigmoid(),
        )

    def _mask(self, start: QueryStart, memory: Tensor, valid: Tensor | None) -> Tensor | None:
        """Mask of a cross-attention from the queries; None when nothing is padded."""
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=start.states.predicate,
            attention_mask=valid,
            encoder_hidden_states=memory,
        )

    def _self_mask(self, start: QueryStart, denoising: DenoisingTriplets | None) -> Tensor | None:
        """Hide noised annotations from the queries, and queries without a pair from all."""
        valid = None if start.pairs is None else start.pairs.valid
        if denoising is None:
            if valid is None:
                return None
            return self._mask(start, start.states.predicate, valid)
        num_queries = start.states.predicate.shape[1] - len(denoising.group)
        if valid is None:
            valid = denoising.valid.new_ones(len(denoising.valid), num_queries)
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=start.states.predicate,
            attention_mask=torch.cat((denoising.valid, valid), dim=1),
            and_mask_function=denoising_visibility(denoising.group, num_queries),
        )
