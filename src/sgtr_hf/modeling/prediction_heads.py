"""Heads that read classes and boxes off query vectors."""

import math

from torch import Tensor, nn


class MultiLayerPerceptron(nn.Module):
    """Linear layers with ReLU in between.

    Args:
        dimensions: Widths from input to output, so one layer less than entries.
    """

    def __init__(self, *dimensions: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(width_in, width_out)
            for width_in, width_out in zip(dimensions[:-1], dimensions[1:], strict=True)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (..., dimensions[0]) to (..., dimensions[-1])."""
        for layer in self.layers[:-1]:
            features = layer(features).relu()
        return self.layers[-1](features)


def box_head(d_model: int) -> MultiLayerPerceptron:
    """DETR's box head: three layers from a query to the logits of cx, cy, w, h."""
    return MultiLayerPerceptron(d_model, d_model, d_model, 4)


def focal_bias(probability: float = 0.01) -> float:
    """Bias that starts every sigmoid class at `probability` (Lin et al. 2017).

    Without it the many background queries dominate the first thousand steps.
    """
    return -math.log((1 - probability) / probability)


def inverse_sigmoid(probability: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Logit of (...) in [0, 1], finite at both ends."""
    probability = probability.clamp(min=epsilon, max=1 - epsilon)
    return (probability / (1 - probability)).log()
