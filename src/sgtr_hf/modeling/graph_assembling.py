"""Graph assembling: which entity is whose subject, and whose object.

The rule of SGTR (Li et al. 2022, section 3.4) has no parameters and no gradient; the unified
assembling of SGTR+ (a reimplementation) is learned, the same in training and inference. Both work
on all images, levels and pairs at once.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr import SgtrConfig
from .graph_nodes import EntityNodes, TripletStates


@torch.no_grad()
def assembling_scores(
    config: SgtrConfig,
    indicator: tuple[Tensor, Tensor, Tensor],
    entity: tuple[Tensor, Tensor],
    image_sizes: Tensor,
) -> Tensor:
    """Score how well each entity fits the subject (or object) of each predicate query.

    A score is the product of nearness of centres, confidence of the entity, likeness of classes
    and overlap of boxes, as in `rel_detr.py` of the release.

    Args:
        config: Gives the exponents and the legacy switches.
        indicator: Of one role: centres (..., B, Q, 2) read off the relation vector, class
            probabilities (..., B, Q, C) and boxes (..., B, Q, 4), cxcywh relative to the image.
        entity: Class probabilities (B, N, C) and boxes (B, N, 4).
        image_sizes: (B, 2) height and width of the images without padding, in pixels.

    Returns:
        (..., B, Q, N), larger is better.
    """
    centres, indicator_probabilities, indicator_boxes = indicator
    entity_probabilities, entity_boxes = entity
    exponent = config.assembling_exponent
    offset = config.detector.legacy_box_offset
    entity_corners = box_cxcywh_to_xyxy(entity_boxes, offset)
    nearness = _nearness(config, centres, entity_corners, image_sizes)
    confidence = entity_probabilities.amax(dim=-1).pow(exponent)[:, None]
    likeness = torch.matmul(
        _unit(indicator_probabilities), _unit(entity_probabilities).transpose(-1, -2)
    ).pow(exponent)
    overlap = generalized_box_iou(
        box_cxcywh_to_xyxy(indicator_boxes, offset)[..., :, None, :],
        entity_corners[:, None],
    ).clamp(min=0)
    return nearness * confidence * likeness * overlap


def _unit(vectors: Tensor) -> Tensor:
    """Bring vectors to length 1; zero stays, which the guard of float16 would round away."""
    return nn.functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)


def _nearness(
    config: SgtrConfig, centres: Tensor, entity_corners: Tensor, image_sizes: Tensor
) -> Tensor:
    """Inverse city-block distance of centres, (..., B, Q, N) in (0, 1]."""
    scale = centres.new_full((1, 1, 2), float(config.assembling_distance_scale))
    if config.legacy_pixel_distance:
        scale = image_sizes.flip(-1).to(centres)[:, None]
    # Corners are scaled before their mean is taken: 1 / (d + 1) shows rounding where d is small.
    corners = entity_corners.unflatten(-1, (2, 2)) * scale[..., None, :]
    distance = (centres * scale)[..., :, None, :] - corners.mean(-2)[:, None]
    return 1 / (distance.abs().sum(-1) + 1)


class Correspondence(NamedTuple):
    """Log-probabilities (L, B, Q, N) that an entity is the subject (object) of a query."""

    subject: Tensor
    object: Tensor


class UnifiedAssembling(nn.Module):
    """Learned, soft correspondence between the role vectors of queries and the entity nodes.

    One softmax over the entities for each role: scaled similarity of the role's vector with the
    entity's, less the distance between the box that the role expects and the entity's (ours: with
    anchors it links well from the first step on).
    """

    def __init__(self, config: SgtrConfig) -> None:
        super().__init__()
        width = config.d_model
        self.box_scale = config.assembling_box_scale
        self.subject_projection = nn.Linear(width, width)
        self.object_projection = nn.Linear(width, width)
        self.subject_key_projection = nn.Linear(width, width)
        self.object_key_projection = nn.Linear(width, width)

    def forward(
        self, states: TripletStates, boxes: tuple[Tensor, Tensor], entities: EntityNodes
    ) -> Correspondence:
        """Link.

        Args:
            states: (L, B, Q, d_model) of the three roles.
            boxes: (L, B, Q, 4) that subject and object are expected to have.
            entities: N nodes that know class and box.
        """
        features = entities.features
        return Correspondence(
            self._link(
                self.subject_projection(states.subject),
                self.subject_key_projection(features),
                boxes[0],
                entities,
            ),
            self._link(
                self.object_projection(states.object),
                self.object_key_projection(features),
                boxes[1],
                entities,
            ),
        )

    def _link(self, queries: Tensor, keys: Tensor, boxes: Tensor, entities: EntityNodes) -> Tensor:
        similarity = torch.matmul(queries, keys.transpose(-1, -2)) * queries.shape[-1] ** -0.5
        # The city-block distance of boxes that differ by their whole size is about one.
        distance = torch.cdist(boxes.detach().float(), entities.boxes.detach().float(), p=1.0)
        scores = similarity.float() - self.box_scale * distance
        if entities.valid is None:
            return scores.log_softmax(dim=-1)
        is_padding = ~entities.valid[:, None]
        scores = scores.masked_fill(is_padding, torch.finfo(scores.dtype).min)
        # An image without entities links to none: infinite scores alone would give NaN there.
        return scores.log_softmax(dim=-1).masked_fill(is_padding, -torch.inf)


def image_sizes_of(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Return heights and widths (B, 2) of images (B, 3, H, W) without their padding (B, H, W)."""
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return pixel_values.new_tensor([height, width]).expand(batch_size, 2)
    is_image = pixel_mask > 0
    return torch.stack((is_image.any(2).sum(1), is_image.any(1).sum(1)), dim=-1)
