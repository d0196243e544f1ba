"""The spatial-aware predicate decoder of SGTR+ (a reimplementation; no original code exists).

Each of L levels predicts the whole triplet and moves the anchors of subject and object, from which
the next level starts: a cascade. Anchors give the queries their places, bias the predicate's
attention to the image, and no gradient flows through them from level to level.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.configuration_sgtr import SgtrConfig
from .graph_nodes import EntityNodes, TripletAnchors, TripletStates
from .position_embedding import box_sine_embedding
from .prediction_heads import BoxHead, MultiLayerPerceptron, inverse_sigmoid
from .transformer_layers import DecoderLayer, MultiHeadAttention


# The exponent of a Gaussian map ends here (ours): farther cells are all the same.
LOWEST_BIAS = -16.0


class TripletExchange(nn.Module):
    """Self-attention over the three vectors of a query, so that each knows what the others do."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(config)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        # Tells predicate, subject and object apart.
        self.role_embedding = nn.Embedding(3, config.d_model)

    def forward(self, states: TripletStates, **kwargs: Any) -> TripletStates:
        """Exchange between the vectors (B, Q, d_model) of each query alone."""
        # (B, Q, d_model) each -> (B * Q, 3, d_model)
        vectors = torch.stack(states, dim=2).flatten(0, 1)
        normed = self.norm(vectors)
        placed = normed + self.role_embedding.weight
        exchanged, _ = self.attention(placed, placed, normed, **kwargs)
        vectors = (vectors + exchanged).unflatten(0, states.predicate.shape[:2])
        return TripletStates(*vectors.unbind(2))


class TripletFusion(nn.Module):
    """SGTR's one-way street: what subject and object know is added to the predicate."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.subject_projection = nn.Linear(config.d_model, config.d_model)
        self.object_projection = nn.Linear(config.d_model, config.d_model)

    def forward(self, states: TripletStates, **_: Any) -> TripletStates:
        """Fuse vectors (B, Q, d_model)."""
        subject = self.subject_projection(states.subject)
        fused = (subject + self.object_projection(states.object)).relu()
        return states._replace(predicate=states.predicate + fused)


class SpatialAwareLevel(nn.Module):
    """A predicate, a subject and an object layer, and the exchange between the three."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.predicate_layer = DecoderLayer(config)
        self.subject_layer = DecoderLayer(config)
        self.object_layer = DecoderLayer(config)
        self.exchange = (TripletExchange if config.triplet_exchange else TripletFusion)(config)

    def forward(
        self,
        states: TripletStates,
        positions: TripletStates,
        image: dict[str, Tensor | None],
        entities: dict[str, Tensor | None],
        **kwargs: Any,
    ) -> TripletStates:
        """Transform the vectors (B, Q, d_model); arguments as in `SpatialAwareDecoder`."""
        predicate = self.predicate_layer(
            states.predicate, query_position=positions.predicate, **image, **kwargs
        )
        subject = self.subject_layer(
            states.subject, query_position=positions.subject, **entities, **kwargs
        )
        object_ = self.object_layer(
            states.object, query_position=positions.object, **entities, **kwargs
        )
        return self.exchange(TripletStates(predicate, subject, object_), **kwargs)


class SpatialAwareDecoder(nn.Module):
    """The cascade: L levels, each of which starts from the anchors of the one before."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.config = config
        self.levels = nn.ModuleList(
            SpatialAwareLevel(config) for _ in range(config.predicate_decoder_layers)
        )
        self.predicate_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.entity_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.entity_position_head = MultiLayerPerceptron(2 * width, width, width)
        self.predicate_position_head = MultiLayerPerceptron(4 * width, width, width)
        self.subject_box_head = BoxHead(width, refines_anchors=True)
        self.object_box_head = BoxHead(width, refines_anchors=True)

    def forward(
        self,
        states: TripletStates,
        anchors: TripletAnchors,
        image: dict[str, Tensor | None],
        cells: Tensor,
        entities: EntityNodes,
        entity_mask: Tensor | None,
        self_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[TripletStates, TripletAnchors]:
        """Decode all levels.

        Args:
            states: Content of the queries, (B, Q, d_model) each.
            anchors: Where they start.
            image: `memory`, `memory_position` and `memory_mask` of the predicate layers.
            cells: (B, S, 4) box on each cell of the memory.
            entities: Nodes that subjects and objects look at.
            entity_mask: Attention mask of the nodes; None when all are there.
            self_mask: Attention mask among the queries; None when all see each other.
            **kwargs: For the attention backend.

        Returns:
            Normed states (L, B, Q, d_model) and refined anchors (L, B, Q, 4).

        Raises:
            ValueError: If the attention backend cannot take the bias of `gaussian_attention`.
        """
        self._check_backend()
        nodes = {
            "memory": entities.features,
            "memory_position": self.entity_position_head(self._embed(entities.boxes.detach())),
            "memory_mask": entity_mask,
        }
        padding_mask = image["memory_mask"]
        levels, boxes = [], []
        for level in self.levels:
            if self.config.gaussian_attention:
                bias = gaussian_bias(anchors, cells, self.config.gaussian_spread)
                image = image | {"memory_mask": combine_masks(bias, padding_mask)}
            positions = self._positions(anchors)
            states = level(states, positions, image, nodes, self_attention_mask=self_mask, **kwargs)
            normed = TripletStates(
                self.predicate_norm(states.predicate),
                self.entity_norm(states.subject),
                self.entity_norm(states.object),
            )
            moved = TripletAnchors(
                _move(anchors.subject, self.subject_box_head(normed.subject)),
                _move(anchors.object, self.object_box_head(normed.object)),
            )
            levels.append(normed)
            boxes.append(moved)
            anchors = TripletAnchors(*(box.detach() for box in moved))
        return (
            TripletStates(*(torch.stack(role) for role in zip(*levels, strict=True))),
            TripletAnchors(*(torch.stack(role) for role in zip(*boxes, strict=True))),
        )

    def _check_backend(self) -> None:
        # Here and not at the start, since the backend of a made model can be changed.
        backend = self.config._attn_implementation or "eager"
        if self.config.gaussian_attention and ("flash" in backend or "flex" in backend):
            raise ValueError(
                f"`gaussian_attention` adds a bias to the attention, which {backend!r} cannot "
                'take: use `attn_implementation="sdpa"` or "eager", or a model with '
                "`gaussian_attention=False`."
            )

    def _positions(self, anchors: TripletAnchors) -> TripletStates:
        embedded = self._embed(torch.stack(anchors))
        subject, object_ = self.entity_position_head(embedded)
        predicate = self.predicate_position_head(torch.cat((*embedded,), dim=-1))
        return TripletStates(predicate, subject, object_)

    def _embed(self, boxes: Tensor) -> Tensor:
        temperature = self.config.detector.position_temperature
        return box_sine_embedding(boxes, self.config.d_model, temperature)


def gaussian_bias(anchors: TripletAnchors, cells: Tensor, spread: float) -> Tensor:
    """Log of the larger of two Gaussian maps, around subject and object.

    Args:
        anchors: (B, Q, 4) cxcywh each.
        cells: (B, S, 4) box on each cell of the image.
        spread: Squared distance, in sides of the anchor, at which a map has fallen to 1 / e; 0.6
            in a map that the release of SGTR makes of given boxes (`transformer.py:62-122`).

    Returns:
        (B, 1, Q, S) in [`LOWEST_BIAS`, 0], to be added to attention scores.
    """
    # (2, B, Q, 1, 2) beside (B, 1, S, 2). An anchor of less than a twentieth of the image still
    # looks at its surroundings.
    centres, sides = torch.stack(anchors)[:, :, :, None].split(2, dim=-1)
    offsets = (cells[:, None, :, :2] - centres) / sides.clamp(min=0.05)
    distances = offsets.square().sum(-1) / spread
    return -distances.amin(0).clamp(max=-LOWEST_BIAS)[:, None]


def combine_masks(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Add a bias (B, 1, Q, S) to an attention mask of any backend that takes additive ones."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask


def _move(anchors: Tensor, shift: Tensor) -> Tensor:
    return (shift + inverse_sigmoid(anchors)).sigmoid()
