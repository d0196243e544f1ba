"""The structural predicate node generator of SGTR (Li et al. 2022, section 3.3).

Predicate queries are composed from the entities of the image and decoded by three cooperating
decoders: of the predicate, which looks at the image, and of subject and object, which look at the
entity nodes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from ..configuration.configuration_sgtr import SgtrConfig
from .entity_decoder import ImageMemory
from .position_embedding import box_sine_embedding, centre_sine_embedding
from .prediction_heads import MultiLayerPerceptron
from .transformer_layers import DecoderLayer, EncoderLayer


class EntityNodes(NamedTuple):
    """The detector's queries, seen as nodes of the graph."""

    features: Tensor
    """(B, N, d_model)."""
    boxes: Tensor
    """(B, N, 4) cxcywh."""


class TripletStates(NamedTuple):
    """Vectors of Q triplet queries: (B, Q, d_model), or (L, B, Q, d_model) for L levels."""

    predicate: Tensor
    subject: Tensor
    object: Tensor


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
            queries: (B, Q, d_model) static predicate queries.
            entities: Entity nodes of the image.
            **kwargs: For the attention backend.
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


class PredicateNodeGenerator(nn.Module):
    """Predicate encoder, compositional queries and structural decoder."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        self.encoder = PredicateEncoder(config)
        self.predicate_query_embedding = nn.Embedding(config.num_predicate_queries, width)
        self.subject_query_embedding = nn.Embedding(config.num_predicate_queries, width)
        self.object_query_embedding = nn.Embedding(config.num_predicate_queries, width)
        self.compositional_queries = (
            CompositionalQueries(config) if config.dynamic_queries else None
        )
        self.entity_box_head = (
            MultiLayerPerceptron(2 * width, width, width) if config.entity_box_embedding else None
        )
        self.decoder = StructuralPredicateDecoder(config)

    def forward(self, memory: ImageMemory, entities: EntityNodes, **kwargs: Any) -> TripletStates:
        """Generate predicate nodes.

        Args:
            memory: The image as the detector encoded it.
            entities: The detector's entity nodes.
            **kwargs: For the attention backend.

        Returns:
            States of all levels, (L, B, Q, d_model) each.
        """
        entities = self._with_boxes(entities)
        batch_size = entities.features.shape[0]
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
        if self.compositional_queries is None:
            states = TripletStates(*(torch.zeros_like(position) for position in positions))
        else:
            states = self.compositional_queries(positions.predicate, entities, **kwargs)
        features = self.encoder(memory, **kwargs)
        image = {
            "memory": features,
            "memory_position": memory.position,
            "memory_mask": create_bidirectional_mask(
                config=self.config,
                inputs_embeds=states.predicate,
                attention_mask=memory.padding_mask,
                encoder_hidden_states=features,
            ),
        }
        nodes = {"memory": entities.features}
        return self.decoder(states, positions, image, nodes, **kwargs)

    def _with_boxes(self, entities: EntityNodes) -> EntityNodes:
        if self.entity_box_head is None:
            return entities
        temperature = self.config.detector.position_temperature
        embedding = box_sine_embedding(entities.boxes, self.config.d_model, temperature)
        return entities._replace(features=entities.features + self.entity_box_head(embedding))
