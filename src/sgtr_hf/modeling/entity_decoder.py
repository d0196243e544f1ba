"""The detector's decoders, of learned queries and of anchors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from .position_embedding import box_sine_embedding, centre_sine_embedding
from .prediction_heads import BoxHead, MultiLayerPerceptron, inverse_sigmoid
from .transformer_layers import DecoderLayer


@dataclass
class ImageMemory:
    """An encoded image; S is the number of cells of all feature levels."""

    features: Tensor
    """(B, S, d_model)."""
    position: Tensor
    """(B, S, d_model) sine embeddings."""
    cells: Tensor
    """(B, S, 4) a box on each cell, cxcywh; larger on coarser levels."""
    grids: tuple[tuple[int, int], ...] = ()
    """Rows and columns of each feature level; their products add up to S."""
    padding_mask: Tensor | None = None
    """(B, S) bool, True where the image is; None when nothing is padded."""


class _Decoder(nn.Module):
    """Layers, their final norm and the box head, which is the same at each level."""

    def __init__(self, config: SgtrDetrConfig, *, conditional: bool) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(
            DecoderLayer(config, conditional=conditional) for _ in range(config.decoder_layers)
        )
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.box_head = BoxHead(config.d_model, refines_anchors=conditional)

    def memory_mask(self, queries: Tensor, memory: ImageMemory) -> Tensor | None:
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=queries,
            attention_mask=memory.padding_mask,
            encoder_hidden_states=memory.features,
        )


class LearnedQueryDecoder(_Decoder):
    """The paper's decoder: queries are learned positions, their content starts at zero."""

    def __init__(self, config: SgtrDetrConfig) -> None:
        super().__init__(config, conditional=False)

    def forward(
        self, query_position: Tensor, memory: ImageMemory, *, all_levels: bool, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states (L, B, N, d_model) and boxes (L, B, N, 4); L is 1 at inference."""
        hidden_states = torch.zeros_like(query_position)
        memory_mask = self.memory_mask(query_position, memory)
        levels = []
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                memory.features,
                query_position=query_position,
                memory_position=memory.position,
                memory_mask=memory_mask,
                **kwargs,
            )
            levels.append(hidden_states)
        # The norm belongs to what is read off a level, never to what the next level gets.
        normed = self.norm(torch.stack(levels if all_levels else levels[-1:]))
        return normed, self.box_head(normed).sigmoid()


class AnchorQueryDecoder(_Decoder):
    """Queries with a 4-D anchor each, refined level by level (DAB-DETR, Liu et al. 2022)."""

    def __init__(self, config: SgtrDetrConfig) -> None:
        super().__init__(config, conditional=True)
        width = config.d_model
        self.position_head = MultiLayerPerceptron(2 * width, width, width)
        self.scale_head = MultiLayerPerceptron(width, width, width, starts_at_zero=True)
        self.size_head = MultiLayerPerceptron(width, width, 2)

    def forward(
        self,
        hidden_states: Tensor,
        memory: ImageMemory,
        *,
        anchors: Tensor,
        self_mask: Tensor | None,
        all_levels: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states (L, B, N, d_model) and boxes (L, B, N, 4); L is 1 at inference."""
        memory_mask = self.memory_mask(hidden_states, memory)
        levels, boxes = [], []
        for layer in self.layers:
            embedding = box_sine_embedding(
                anchors, self.config.d_model, self.config.position_temperature
            )
            hidden_states = layer(
                hidden_states,
                memory.features,
                query_position=self.position_head(embedding),
                memory_position=memory.position,
                spatial_query=self._spatial_query(hidden_states, anchors),
                self_attention_mask=self_mask,
                memory_mask=memory_mask,
                **kwargs,
            )
            normed = self.norm(hidden_states)
            levels.append(normed)
            boxes.append((self.box_head(normed) + inverse_sigmoid(anchors)).sigmoid())
            # Each level learns its own step: no gradient flows through the anchor it started from.
            anchors = boxes[-1].detach()
        first = 0 if all_levels else -1
        return torch.stack(levels[first:]), torch.stack(boxes[first:])

    def _spatial_query(self, hidden_states: Tensor, anchors: Tensor) -> Tensor:
        """Place of an anchor, its y and x parts stretched by the size that the content expects."""
        width = self.config.d_model
        place = centre_sine_embedding(anchors[..., :2], width, self.config.position_temperature)
        expected_size = self.size_head(hidden_states).sigmoid()
        # The smaller the anchor, the more the attention keeps to its surroundings.
        stretch_x, stretch_y = (expected_size / anchors[..., 2:].clamp(min=0.05)).unbind(-1)
        stretch = torch.stack((stretch_y, stretch_x), dim=-1).repeat_interleave(width // 2, dim=-1)
        return place * stretch * (1 + self.scale_head(hidden_states))
