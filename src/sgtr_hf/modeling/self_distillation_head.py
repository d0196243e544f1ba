"""The head that self-distillation (DINO, Caron et al. 2021) compares images by."""

import itertools

import torch
from torch import Tensor, nn

from ..configuration.configuration_dino_vit import DinoVitConfig


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have a learned or fixed length.

    Parametrised as PyTorch's weight norm, which is deprecated as a function and changes names of
    weights as a parametrisation.

    Args:
        width: Of the input, of length 1.
        count: Number of prototypes.
        fixed_length: Keep every row at length 1.
    """

    def __init__(self, width: int, count: int, *, fixed_length: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, width))
        self.length = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed_length)

    def forward(self, features: Tensor) -> Tensor:
        """Return (..., count) logits of (..., width)."""
        norm = self.direction.norm(dim=1, keepdim=True)
        return nn.functional.linear(features, self.direction * (self.length / norm))


class SelfDistillationHead(nn.Module):
    """A projection, brought to length 1, against prototypes.

    Args:
        config: Gives the head's widths.
        fixed_length: Of the prototypes.
    """

    def __init__(self, config: DinoVitConfig, *, fixed_length: bool) -> None:
        super().__init__()
        widths = [config.d_model, *[config.head_hidden_dim] * (config.head_layers - 1)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.projection = nn.Sequential(*layers, nn.Linear(widths[-1], config.head_bottleneck_dim))
        self.prototypes = Prototypes(
            config.head_bottleneck_dim, config.num_prototypes, fixed_length=fixed_length
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (..., num_prototypes) of (..., d_model), in float32.

        Half precision ends in NaN here: lengths underflow, and the teacher divides by 0.04.
        """
        with torch.autocast(features.device.type, enabled=False):
            projected = self.projection(features.to(self.prototypes.direction.dtype))
            return self.prototypes(nn.functional.normalize(projected, dim=-1))
