"""Query selection: the likeliest cells of the encoded image become the queries.

Every cell predicts a class and a box around itself, as the first stage of two-stage Deformable
DETR (Zhu et al. 2021); the best ones give the decoder its anchors and its content. Cells see what
lies under them, so this learns in far fewer steps than queries that must find their objects.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..boxes import box_cxcywh_to_xyxy, box_iou, generalized_box_iou
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from .prediction_heads import BoxHead, ClassHead, inverse_sigmoid


class SelectedQueries(NamedTuple):
    """N queries from S cells."""

    content: Tensor
    """(B, N, d_model), without gradient."""
    anchors: Tensor
    """(B, N, 4) boxes, without gradient."""
    logits: Tensor
    """(B, S, C + 1) or (B, S, C) of all cells."""
    boxes: Tensor
    """(B, S, 4) of all cells."""


class ScoredCells(NamedTuple):
    """What S cells see."""

    features: Tensor
    """(B, S, d_model)."""
    logits: Tensor
    """(B, S, C + 1) or (B, S, C)."""
    boxes: Tensor
    """(B, S, 4) cxcywh."""


class QuerySelection(nn.Module):
    """Reads a class and a box off each cell and keeps the likeliest N."""

    def __init__(self, config: SgtrDetrConfig) -> None:
        super().__init__()
        self.num_queries = config.num_queries
        self.is_focal = config.classification == "focal"
        self.projection = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        columns = config.num_labels + (not self.is_focal)
        self.class_head = ClassHead(config.d_model, columns, is_focal=self.is_focal)
        self.box_head = BoxHead(config.d_model, refines_anchors=True)

    def forward(
        self, features: Tensor, cells: Tensor, padding_mask: Tensor | None
    ) -> SelectedQueries:
        """Select.

        Args:
            features: (B, S, d_model) encoded image.
            cells: (B, S, 4) box on each cell.
            padding_mask: (B, S) bool, True where the image is; None when nothing is padded.
        """
        features, logits, boxes = self.score(features, cells)
        likelihood = (logits if self.is_focal else logits[..., :-1]).detach().amax(dim=-1)
        if padding_mask is not None:
            likelihood = likelihood.masked_fill(~padding_mask, -torch.inf)
        if likelihood.shape[1] < self.num_queries:
            raise ValueError(
                f"`num_queries` is {self.num_queries}, but the image has only "
                f"{likelihood.shape[1]} cells to select from; use larger images."
            )
        best = likelihood.topk(self.num_queries, dim=1).indices[..., None]
        return SelectedQueries(
            content=features.detach().gather(1, best.expand(-1, -1, features.shape[-1])),
            anchors=boxes.detach().gather(1, best.expand(-1, -1, 4)),
            logits=logits,
            boxes=boxes,
        )

    def score(self, features: Tensor, cells: Tensor) -> ScoredCells:
        """Read a class and a box off each cell; arguments as in `forward`."""
        features = self.norm(self.projection(features))
        boxes = (self.box_head(features) + inverse_sigmoid(cells).to(features.dtype)).sigmoid()
        return ScoredCells(features, self.class_head(features), boxes)

    def content_at(self, features: Tensor, cells: Tensor, boxes: Tensor) -> Tensor:
        """Return the content (B, N, d_model) of the cells that fit given boxes best.

        Among cells of much the same box those count that are surest of a class, because the
        decoder has learned from such cells.

        Args:
            features: (B, S, d_model) encoded image.
            cells: (B, S, 4) box on each cell.
            boxes: (B, N, 4) cxcywh, given.
        """
        scored = self.score(features, cells)
        given = box_cxcywh_to_xyxy(boxes)[:, :, None]
        found = box_cxcywh_to_xyxy(scored.boxes)[:, None]
        logits = scored.logits if self.is_focal else scored.logits[..., :-1]
        sureness = logits.sigmoid().amax(-1).sqrt()[:, None]
        # Where no cell overlaps, the generalised IoU still tells near from far.
        fit = box_iou(given, found) * sureness + 1e-4 * generalized_box_iou(given, found)
        nearest = fit.argmax(-1)[..., None].expand(-1, -1, features.shape[-1])
        return scored.features.detach().gather(1, nearest)
