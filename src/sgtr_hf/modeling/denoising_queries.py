"""Denoising queries (DN-DETR, Li et al. 2022): noised annotations that the decoder must restore.

Their assignment is known, so the decoder learns to refine boxes before matching is stable. They
exist in training only.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from ..losses.hungarian_matching import PaddedAnnotations
from .seeded_noise import draw_seeds, seeded_uniform


# Two for a class, four for a box.
NUMBERS_OF_NOISE = 6


class DenoisingQueries(NamedTuple):
    """M = groups * T noised annotations a image, group by group."""

    content: Tensor
    """(B, M, d_model) embeddings of the noised classes."""
    anchors: Tensor
    """(B, M, 4) noised boxes, cxcywh in [0, 1]."""
    entity_indices: Tensor
    """(B, M) annotation that each query must restore, -1 on padding."""
    group: Tensor
    """(M,) group of each query, from 0."""


class DenoisingQueryGenerator(nn.Module):
    """Makes groups of noised copies of the annotations."""

    def __init__(self, config: SgtrDetrConfig) -> None:
        super().__init__()
        self.num_groups = config.num_denoising_groups
        self.label_noise = config.denoising_label_noise
        self.box_noise = config.denoising_box_noise
        self.num_classes = config.num_labels
        self.class_embedding = nn.Embedding(config.num_labels, config.d_model)

    def forward(self, annotations: PaddedAnnotations) -> DenoisingQueries:
        """Noise every annotation once a group.

        Args:
            annotations: B images with up to T annotated entities.
        """
        labels = annotations.class_labels.repeat(1, self.num_groups)
        boxes = annotations.boxes.repeat(1, self.num_groups, 1)
        valid = annotations.valid.repeat(1, self.num_groups)
        batch_size, num_entities = annotations.valid.shape
        seeds = annotations.noise_seeds
        if seeds is None:
            seeds = draw_seeds(batch_size, valid.device)
        numbers = seeded_uniform(seeds, self.num_groups, num_entities, NUMBERS_OF_NOISE)
        indices = torch.arange(num_entities, device=valid.device).repeat(self.num_groups)
        return DenoisingQueries(
            content=self.class_embedding(
                noise_labels(labels, self.num_classes, self.label_noise, numbers)
            ),
            anchors=noise_boxes(boxes, self.box_noise, numbers),
            entity_indices=torch.where(valid, indices, -1),
            group=torch.arange(self.num_groups, device=valid.device).repeat_interleave(
                num_entities
            ),
        )


def noise_labels(labels: Tensor, num_classes: int, share: float, numbers: Tensor) -> Tensor:
    """Replace a share of the classes (...) by random ones, by the first two of the numbers."""
    random_labels = (numbers[..., 0] * num_classes).to(labels.dtype)
    return torch.where(numbers[..., 1] < share, random_labels, labels)


def noise_boxes(boxes: Tensor, amount: float, numbers: Tensor) -> Tensor:
    """Move and resize boxes (..., 4) cxcywh at random, inside the image.

    The centre moves by at most half the amount times the size, the size changes by the amount.

    Args:
        boxes: Of annotations.
        amount: Of noise.
        numbers: (..., 6) in [0, 1), the last four of which decide.
    """
    reach = torch.cat((boxes[..., 2:] / 2, boxes[..., 2:]), dim=-1) * amount
    noised = boxes + (2 * numbers[..., 2:] - 1) * reach
    return box_xyxy_to_cxcywh(box_cxcywh_to_xyxy(noised).clamp(0, 1))


def denoising_visibility(group: Tensor, num_queries: int) -> Callable[..., Tensor]:
    """Say who sees whom among denoising queries followed by the ordinary ones.

    Ordinary queries see each other only, or annotations would leak into them; a denoising query
    sees its own group and the ordinary ones.

    Args:
        group: (M,) group of each denoising query.
        num_queries: Ordinary queries, which follow the denoising ones.

    Returns:
        A mask function (batch, head, query, key) -> visible, as transformers' masks take it.
    """
    ordinary = group.new_full((num_queries,), -1)
    groups = torch.cat((group, ordinary))
    visible = (groups[:, None] == groups[None, :]) | (groups[None, :] == -1)

    def is_visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query, key]

    return is_visible
