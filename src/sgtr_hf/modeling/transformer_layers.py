"""Attention, encoder and decoder layers (Vaswani et al. 2017, in DETR's form).

Positions are added to queries and keys at each attention, never to values. Layers are post-norm
or, with `config.norm_first`, pre-norm. Attention runs through the interface of transformers, so
any of its backends can be chosen by `attn_implementation`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; the only backend that returns its weights.

    Args:
        module: The calling attention module.
        query: (B, heads, queries, width).
        key: (B, heads, keys, width).
        value: (B, heads, keys, width).
        attention_mask: Added to the scores; broadcasts to (B, heads, queries, keys).
        scaling: Factor on the scores.
        dropout: Dropout of the weights.

    Returns:
        (B, queries, heads, width) and the weights (B, heads, queries, keys).
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    dropped = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), weights


class AttentionBackend(nn.Module):
    """Splits heads and calls the backend that the configuration names; a base of attentions."""

    is_causal = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.num_attention_heads = config.num_attention_heads
        self.dropout = config.dropout

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend with already projected (B, length, heads, width) tensors."""
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = interface(
            self,
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=query.shape[-1] ** -0.5,
            **kwargs,
        )
        return attended.flatten(-2), weights

    def split_heads(self, features: Tensor) -> Tensor:
        """Turn (B, length, width) into (B, length, heads, width of a head)."""
        return features.unflatten(-1, (self.num_attention_heads, -1))


class MultiHeadAttention(AttentionBackend):
    """Attention with separate inputs for queries, keys and values, each (B, length, d_model)."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.query_projection = nn.Linear(config.d_model, config.d_model)
        self.key_projection = nn.Linear(config.d_model, config.d_model)
        self.value_projection = nn.Linear(config.d_model, config.d_model)
        self.output_projection = nn.Linear(config.d_model, config.d_model)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, queries, d_model) and, with the eager backend, the attention weights."""
        attended, weights = self.attend(
            self.split_heads(self.query_projection(query)),
            self.split_heads(self.key_projection(key)),
            self.split_heads(self.value_projection(value)),
            mask,
            **kwargs,
        )
        return self.output_projection(attended), weights


class PlaceProjection(nn.Linear):
    """Projection of sine embeddings that starts by dealing them out evenly to the heads.

    With the same start for queries and keys, each head first attends around the place that a query
    names, along both axes, and at all wavelengths. Random projections have to learn that, which
    takes a few epochs of a small data set (ours).
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config.d_model, config.d_model)
        self.num_attention_heads = config.num_attention_heads

    def initial_weight(self) -> Tensor:
        """Permutation (d_model, d_model) that gives every head every n-th sine-cosine pair."""
        pairs = torch.arange(self.in_features).view(-1, 2)
        dealt = pairs.view(-1, self.num_attention_heads, 2).transpose(0, 1).flatten()
        return torch.eye(self.in_features)[dealt]


class ConditionalCrossAttention(AttentionBackend):
    """Cross-attention in which content meets content and place meets place.

    Content and position are projected apart and set side by side within each head, so a score is
    the sum of a content and a spatial product (Conditional DETR, Meng et al. 2021). Values have
    the doubled width too, since fused backends want equal widths.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.query_projection = nn.Linear(config.d_model, config.d_model)
        self.query_position_projection = PlaceProjection(config)
        self.key_projection = nn.Linear(config.d_model, config.d_model)
        self.key_position_projection = PlaceProjection(config)
        self.value_projection = nn.Linear(config.d_model, 2 * config.d_model)
        self.output_projection = nn.Linear(2 * config.d_model, config.d_model)

    def forward(
        self,
        query: Tensor,
        query_position: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, queries, d_model) and, with the eager backend, the attention weights."""
        queries = (self.query_projection(query), self.query_position_projection(query_position))
        keys = (self.key_projection(memory), self.key_position_projection(memory_position))
        attended, weights = self.attend(
            torch.cat([self.split_heads(part) for part in queries], dim=-1),
            torch.cat([self.split_heads(part) for part in keys], dim=-1),
            self.split_heads(self.value_projection(memory)),
            mask,
            **kwargs,
        )
        return self.output_projection(attended), weights


class FeedForward(nn.Module):
    """Two linear layers with the configured activation and dropout in between."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.d_model, config.feed_forward_dim)
        self.activation = ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.dropout)
        self.contraction = nn.Linear(config.feed_forward_dim, config.d_model)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (B, length, d_model) to the same shape."""
        return self.contraction(self.dropout(self.activation(self.expansion(hidden_states))))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a residual branch for whole samples.

    Args:
        probability: Share of samples whose branch is dropped in training.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        """Drop and rescale samples of (B, ...), so that the mean stays."""
        if not self.training or self.probability == 0:
            return branch
        shape = (len(branch), *(1,) * (branch.ndim - 1))
        kept = torch.rand(shape, device=branch.device) >= self.probability
        return branch * kept.to(branch.dtype) / (1 - self.probability)


class _ResidualLayer(GradientCheckpointingLayer):
    """What encoder and decoder layers share: where the norm stands, and residual dropout."""

    def __init__(self, config: PreTrainedConfig, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.residual_dropout = nn.Dropout(config.dropout)
        self.drop_path = DropPath(drop_path)

    def make_norm(self, config: PreTrainedConfig) -> nn.LayerNorm:
        return nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)

    def before(self, norm: nn.LayerNorm, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.norm_first else hidden_states

    def after(self, norm: nn.LayerNorm, hidden_states: Tensor, branch: Tensor) -> Tensor:
        hidden_states = hidden_states + self.drop_path(self.residual_dropout(branch))
        return hidden_states if self.norm_first else norm(hidden_states)


class EncoderLayer(_ResidualLayer):
    """Self-attention and a feed-forward block.

    Args:
        config: Gives width, heads, feed-forward width, dropout, norm placement and epsilon.
        drop_path: Share of samples whose residual branches are dropped in training.
    """

    def __init__(self, config: PreTrainedConfig, drop_path: float = 0.0) -> None:
        super().__init__(config, drop_path)
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_norm = self.make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = self.make_norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        position: Tensor | None = None,
        mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Transform (B, S, d_model).

        Args:
            hidden_states: (B, S, d_model).
            position: (B, S, d_model), added to queries and keys.
            mask: Attention mask of the backend, or None when nothing is padded.
            **kwargs: For the attention backend.
        """
        normed = self.before(self.self_attention_norm, hidden_states)
        placed = _add(normed, position)
        branch, _ = self.self_attention(placed, placed, normed, mask, **kwargs)
        hidden_states = self.after(self.self_attention_norm, hidden_states, branch)
        branch = self.feed_forward(self.before(self.feed_forward_norm, hidden_states))
        return self.after(self.feed_forward_norm, hidden_states, branch)


class DecoderLayer(_ResidualLayer):
    """Self-attention of the queries, cross-attention to a memory, and a feed-forward block.

    Args:
        config: Gives width, heads, feed-forward width, dropout and norm placement.
        conditional: Keep content and place apart in the cross-attention; `spatial_query` is then
            needed.
    """

    def __init__(self, config: PreTrainedConfig, *, conditional: bool = False) -> None:
        super().__init__(config)
        self.self_attention = MultiHeadAttention(config)
        self.self_attention_norm = self.make_norm(config)
        self.conditional = conditional
        self.cross_attention = (ConditionalCrossAttention if conditional else MultiHeadAttention)(
            config
        )
        self.cross_attention_norm = self.make_norm(config)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = self.make_norm(config)

    def forward(
        self,
        hidden_states: Tensor,
        memory: Tensor,
        *,
        query_position: Tensor | None = None,
        memory_position: Tensor | None = None,
        spatial_query: Tensor | None = None,
        self_attention_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Transform the queries (B, Q, d_model).

        Args:
            hidden_states: (B, Q, d_model) queries.
            memory: (B, S, d_model) what they attend to.
            query_position: (B, Q, d_model) added to queries and keys of the self-attention, and
                to the queries of a plain cross-attention.
            memory_position: (B, S, d_model) of the keys.
            spatial_query: (B, Q, d_model) place that a conditional cross-attention looks for.
            self_attention_mask: Mask of the self-attention.
            memory_mask: Mask of the cross-attention.
            **kwargs: For the attention backend.
        """
        normed = self.before(self.self_attention_norm, hidden_states)
        placed = _add(normed, query_position)
        branch, _ = self.self_attention(placed, placed, normed, self_attention_mask, **kwargs)
        hidden_states = self.after(self.self_attention_norm, hidden_states, branch)

        normed = self.before(self.cross_attention_norm, hidden_states)
        if self.conditional:
            inputs = [normed, spatial_query, memory, memory_position]
        else:
            inputs = [_add(normed, query_position), _add(memory, memory_position), memory]
        branch, _ = self.cross_attention(*inputs, memory_mask, **kwargs)
        hidden_states = self.after(self.cross_attention_norm, hidden_states, branch)

        branch = self.feed_forward(self.before(self.feed_forward_norm, hidden_states))
        return self.after(self.feed_forward_norm, hidden_states, branch)


def _add(features: Tensor, position: Tensor | None) -> Tensor:
    return features if position is None else features + position
