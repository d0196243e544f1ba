"""Denoising of triplets: noised annotated pairs that the predicate decoder must restore.

As denoising queries do for boxes (DN-DETR, Li et al. 2022; for triplets: ours): their assignment
is known, so predicates are learned before matching is stable. They exist in training only.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..configuration.configuration_sgtr import SgtrConfig
from ..losses.hungarian_matching import PaddedAnnotations
from .denoising_queries import NUMBERS_OF_NOISE, noise_boxes, noise_labels
from .graph_nodes import EntityNodes, at_nodes
from .seeded_noise import draw_seeds, seeded_uniform


class DenoisingTriplets(NamedTuple):
    """M = groups * R noised relations an image, group by group."""

    subjects: EntityNodes
    """(B, M, ...) nodes made of noised classes and boxes."""
    objects: EntityNodes
    valid: Tensor
    """(B, M) bool, False on padding."""
    group: Tensor
    """(M,) group of each query, from 0."""


class TripletDenoising(nn.Module):
    """Makes groups of noised copies of the annotated relations; the predicate is never shown."""

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        self.num_groups = config.num_triplet_denoising_groups
        self.label_noise = config.triplet_denoising_label_noise
        self.box_noise = config.triplet_denoising_box_noise
        self.num_classes = config.num_labels
        # In place of what the detector saw.
        self.class_embedding = nn.Embedding(config.num_labels, config.d_model)

    def forward(self, annotations: PaddedAnnotations) -> DenoisingTriplets:
        """Noise subject and object of every relation once a group.

        Args:
            annotations: B images with up to R annotated relations.
        """
        subjects, objects, _ = annotations.relations.repeat(1, self.num_groups, 1).unbind(-1)
        num_relations = annotations.relations.shape[1]
        groups = torch.arange(self.num_groups, device=subjects.device)
        seeds = annotations.noise_seeds
        if seeds is None:
            seeds = draw_seeds(len(subjects), subjects.device)
        # Other numbers than those of the detector, which are stream 0.
        subject_numbers, object_numbers = (
            seeded_uniform(seeds, self.num_groups, num_relations, NUMBERS_OF_NOISE, stream)
            for stream in (1, 2)
        )
        return DenoisingTriplets(
            subjects=self._noise(annotations, subjects, subject_numbers),
            objects=self._noise(annotations, objects, object_numbers),
            valid=annotations.relation_valid.repeat(1, self.num_groups),
            group=groups.repeat_interleave(num_relations),
        )

    def _noise(
        self, annotations: PaddedAnnotations, indices: Tensor, numbers: Tensor
    ) -> EntityNodes:
        labels = annotations.class_labels.gather(1, indices)
        labels = noise_labels(labels, self.num_classes, self.label_noise, numbers)
        features = self.class_embedding(labels)
        return EntityNodes(
            features=features,
            boxes=noise_boxes(at_nodes(annotations.boxes, indices), self.box_noise, numbers),
            probabilities=one_hot(labels, self.num_classes).to(features.dtype),
        )
