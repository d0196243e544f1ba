"""The nodes of a graph on their way through the model.

B images, N entity nodes, Q triplet queries, L levels of the predicate decoder, C entity classes.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class EntityNodes(NamedTuple):
    """The detector's queries, seen as nodes of the graph."""

    features: Tensor
    """(B, N, d_model)."""
    boxes: Tensor
    """(B, N, 4) cxcywh."""
    probabilities: Tensor
    """(B, N, C) of the real classes."""
    valid: Tensor | None = None
    """(B, N) bool, False on padding, which given entities need; None when all are there."""


class TripletStates(NamedTuple):
    """Vectors of Q triplet queries: (B, Q, d_model), or (L, B, Q, d_model) for L levels."""

    predicate: Tensor
    subject: Tensor
    object: Tensor


class TripletAnchors(NamedTuple):
    """Where the entities of Q triplet queries are expected: (B, Q, 4) or (L, B, Q, 4) cxcywh."""

    subject: Tensor
    object: Tensor


@dataclass
class TripletNodes:
    """What a predicate node generator returns."""

    states: TripletStates
    """Of all levels."""
    anchors: TripletAnchors | None = None
    """Of all levels; None for the structural generator, which has no anchors."""
    relatedness_logits: Tensor | None = None
    """(B, N, N) of all ordered pairs, subjects in rows; None unless queries start from pairs."""
    valid: Tensor | None = None
    """(B, Q) bool, False for a query that had no pair to start from; None when all had."""
    denoising: "TripletNodes | None" = None
    """Of the noised annotations, in training; their `valid` is False on padding."""


def split_denoising(nodes: TripletNodes, valid: Tensor) -> TripletNodes:
    """Part the noised annotations, which come first, from the queries.

    Args:
        nodes: Of both.
        valid: (B, M) bool, False on padding of the M noised ones.
    """
    count = valid.shape[1]
    parts = []
    for chosen in (slice(None, count), slice(count, None)):
        anchors = nodes.anchors
        if anchors is not None:
            anchors = TripletAnchors(*(role[:, :, chosen] for role in anchors))
        states = TripletStates(*(role[:, :, chosen] for role in nodes.states))
        parts.append(TripletNodes(states, anchors))
    noised, ordinary = parts
    return replace(
        ordinary,
        relatedness_logits=nodes.relatedness_logits,
        valid=nodes.valid,
        denoising=replace(noised, valid=valid),
    )


def at_nodes(table: Tensor, indices: Tensor) -> Tensor:
    """Read (B, N, D) at the entities (B, Q), which gives (B, Q, D)."""
    return table.gather(1, indices[..., None].expand(-1, -1, table.shape[-1]))


def join(first: Tensor | None, second: Tensor) -> Tensor:
    """Put noised queries before the ordinary ones, along the queries (B, Q, ...)."""
    return second if first is None else torch.cat((first.to(second.dtype), second), dim=1)
