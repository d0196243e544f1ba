"""Pair selection: the ordered pairs of entities that are most likely related start the queries.

A light score looks at all N x N pairs; only the best Q get content of their own. (Ours: queries
that meet entities by attention alone are slow to learn relations of place.)
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..boxes import PAIR_GEOMETRY_SIZE, pair_geometry
from ..configuration.configuration_sgtr import SgtrConfig
from .graph_nodes import EntityNodes, at_nodes
from .prediction_heads import ClassHead, MultiLayerPerceptron


class SelectedPairs(NamedTuple):
    """Q pairs, the likeliest first."""

    subjects: Tensor
    """(B, Q) entity of each subject."""
    objects: Tensor
    """(B, Q) entity of each object."""
    valid: Tensor | None
    """(B, Q) bool, False where an image had fewer pairs; None when all had enough."""
    relatedness_logits: Tensor
    """(B, N, N) of all pairs, subjects in rows."""


class PairSelection(nn.Module):
    """Scores all ordered pairs and keeps the likeliest Q.

    The score is a product of a subject and an object vector, plus a head on a narrow layer that
    sees both entities and how their boxes lie. It costs N x N x `pair_width` sums and one narrow
    product, so that 300 entities are affordable.
    """

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        width = config.pair_width
        self.num_queries = config.num_predicate_queries
        self.subject_projection = nn.Linear(config.d_model, 2 * width)
        self.object_projection = nn.Linear(config.d_model, 2 * width)
        self.geometry_projection = nn.Linear(PAIR_GEOMETRY_SIZE, width)
        self.head = ClassHead(width, 1, is_focal=True)

    def forward(self, entities: EntityNodes) -> SelectedPairs:
        """Select min(Q, N * N) pairs; a node pairs with itself only for want of others.

        Args:
            entities: With features that know class and box.
        """
        logits = self.relatedness(entities)
        impossible = torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)[None]
        if entities.valid is not None:
            valid = entities.valid
            impossible = impossible | ~(valid[:, :, None] & valid[:, None])
        likelihood = logits.detach().masked_fill(impossible, -torch.inf).flatten(1)
        count = min(self.num_queries, likelihood.shape[1])
        best, cells = likelihood.topk(count, dim=1)
        num_entities = logits.shape[1]
        return SelectedPairs(
            subjects=cells // num_entities,
            objects=cells % num_entities,
            valid=best.isfinite() if self._may_lack_pairs(entities, count) else None,
            relatedness_logits=logits,
        )

    def relatedness(self, entities: EntityNodes) -> Tensor:
        """Return logits (B, N, N) of being related, subjects in rows."""
        subject, subject_factor = self.subject_projection(entities.features).chunk(2, dim=-1)
        object_, object_factor = self.object_projection(entities.features).chunk(2, dim=-1)
        boxes = entities.boxes.detach()
        geometry = self.geometry_projection(pair_geometry(boxes[:, :, None], boxes[:, None]))
        hidden = (subject[:, :, None] + object_[:, None] + geometry).relu()
        product = torch.matmul(subject_factor, object_factor.transpose(-1, -2))
        return self.head(hidden)[..., 0] + product * subject_factor.shape[-1] ** -0.5

    @staticmethod
    def _may_lack_pairs(entities: EntityNodes, count: int) -> bool:
        num_entities = entities.features.shape[1]
        return entities.valid is not None or count > num_entities * (num_entities - 1)


class PairContent(nn.Module):
    """Content of a triplet query from the two entities that it starts with."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.subject_projection = nn.Linear(width, width)
        self.object_projection = nn.Linear(width, width)
        self.geometry_head = MultiLayerPerceptron(PAIR_GEOMETRY_SIZE, width, width)
        self.fusion = MultiLayerPerceptron(width, width, width)

    def forward(self, nodes: tuple[Tensor, Tensor], boxes: tuple[Tensor, Tensor]) -> Tensor:
        """Return (B, Q, d_model).

        Args:
            nodes: Features (B, Q, d_model) of subjects and of objects.
            boxes: Theirs, (B, Q, 4) cxcywh.
        """
        subject = self.subject_projection(nodes[0])
        object_ = self.object_projection(nodes[1])
        geometry = self.geometry_head(pair_geometry(boxes[0].detach(), boxes[1].detach()))
        return self.fusion((subject + object_ + geometry).relu())


def read_pairs(entities: EntityNodes, pairs: SelectedPairs) -> tuple[EntityNodes, EntityNodes]:
    """Return subjects and objects of the pairs as nodes, (B, Q, ...) each."""
    subject, object_ = (
        EntityNodes(*(at_nodes(table, indices) for table in entities[:3]))
        for indices in (pairs.subjects, pairs.objects)
    )
    return subject, object_
