"""Rule-based graph assembling (Li et al. 2022, section 3.4): which entity is whose subject, object.

The rule has no parameters and no gradient. It works on all images, levels and pairs at once.
"""

import torch
from torch import Tensor, nn

from ..boxes import box_cxcywh_to_xyxy, generalized_box_iou
from ..configuration.configuration_sgtr import SgtrConfig


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
        nn.functional.normalize(indicator_probabilities, dim=-1),
        nn.functional.normalize(entity_probabilities, dim=-1).transpose(-1, -2),
    ).pow(exponent)
    overlap = generalized_box_iou(
        box_cxcywh_to_xyxy(indicator_boxes, offset)[..., :, None, :],
        entity_corners[:, None],
    ).clamp(min=0)
    return nearness * confidence * likeness * overlap


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
