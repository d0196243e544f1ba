"""Heads that read classes and boxes off query vectors."""

import itertools
import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..configuration.configuration_sgtr import SgtrConfig


# Probability at which a focal head starts.
RARE = 0.01
# Probabilities nearer to 0 or 1 are taken for this near.
SURE = 1e-6


class MultiLayerPerceptron(nn.Module):
    """Linear layers with ReLU in between.

    Args:
        *dimensions: Widths from input to output, so one layer less than entries.
        starts_at_zero: Whether the output is 0 at first.
    """

    def __init__(self, *dimensions: int, starts_at_zero: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width_in, width_out) for width_in, width_out in itertools.pairwise(dimensions)
        )
        if starts_at_zero:
            self.layers[-1] = ZeroLinear(dimensions[-2], dimensions[-1])

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., dimensions[0]) to (..., dimensions[-1])."""
        for layer in self.layers[:-1]:
            features = layer(features).relu()
        return self.layers[-1](features)


class BoxHead(MultiLayerPerceptron):
    """DETR's box head: three layers from a query to the logits of cx, cy, w, h.

    Args:
        d_model: Width of the query.
        refines_anchors: Start with no shift at all, so that anchors stay where they are.
    """

    def __init__(self, d_model: int, *, refines_anchors: bool = False) -> None:
        super().__init__(d_model, d_model, d_model, 4, starts_at_zero=refines_anchors)


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class ClassHead(nn.Linear):
    """A linear layer to class logits.

    Args:
        d_model: Width of the query.
        num_columns: Logits, with background where there is one.
        is_focal: Start every sigmoid class as rare; or the many background queries dominate the
            first thousand steps (Lin et al. 2017).
    """

    def __init__(self, d_model: int, num_columns: int, *, is_focal: bool) -> None:
        super().__init__(d_model, num_columns)
        self.initial_bias = -math.log((1 - RARE) / RARE) if is_focal else 0.0


class AnchorEmbedding(nn.Embedding):
    """Logits (N, 4) of learned boxes, which start spread over the image, a quarter of it wide."""

    def __init__(self, num_queries: int) -> None:
        super().__init__(num_queries, 4)


@torch.no_grad()
def init_head(module: nn.Module) -> None:
    """Initialise one of the layers above; others stay as they are.

    transformers calls back for modules that hold parameters themselves, never for their owners.
    """
    if isinstance(module, ZeroLinear):
        init.zeros_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, ClassHead):
        init.constant_(module.bias, module.initial_bias)
    elif isinstance(module, AnchorEmbedding):
        centres = torch.rand(len(module.weight), 2, device=module.weight.device)
        boxes = torch.cat((centres, torch.full_like(centres, 0.25)), dim=-1)
        init.copy_(module.weight, inverse_sigmoid(boxes).to(module.weight))


def inverse_sigmoid(probability: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Logit of (...) in [0, 1], finite at both ends."""
    # In half precision 1 - epsilon would be 1.
    is_half = probability.dtype in (torch.float16, torch.bfloat16)
    fine = probability.float() if is_half else probability
    fine = fine.clamp(min=epsilon, max=1 - epsilon)
    return (fine / (1 - fine)).log().to(probability.dtype)


def triplet_class_probabilities(config: SgtrConfig, probabilities: Tensor) -> Tensor:
    """Calibrate the class probabilities (..., C) of detected entities for the scores of triplets.

    Sigmoid heads judge each class alone; that an entity is one thing only is told by how much its
    classes sum to.

    Args:
        config: Gives `class_score_scale`, `class_score_rivalry` and `class_score_offset`.
        probabilities: (..., C) of the real classes.
    """
    settings = (config.class_score_scale, config.class_score_rivalry, config.class_score_offset)
    if settings == (1, 0, 0):
        return probabilities
    probabilities = probabilities.float()
    logits = config.class_score_scale * inverse_sigmoid(probabilities, SURE)
    rivals = probabilities.sum(-1, keepdim=True).clamp(min=SURE).log()
    return (logits + config.class_score_rivalry * rivals + config.class_score_offset).sigmoid()


def predicate_probabilities(config: SgtrConfig, logits: Tensor) -> Tensor:
    """Turn logits into the calibrated probabilities (..., P) of the real predicates.

    Args:
        config: Gives the kind of classification, `score_temperature` and `score_offset`.
        logits: (..., P + 1) with background first for "softmax", (..., P) for "focal".
    """
    scaled = logits / config.score_temperature
    if config.predicate_classification == "softmax":
        background, predicates = scaled.split((1, scaled.shape[-1] - 1), dim=-1)
        scaled = torch.cat((background, predicates + config.score_offset), dim=-1)
        return scaled.softmax(dim=-1)[..., 1:]
    return (scaled + config.score_offset).sigmoid()
