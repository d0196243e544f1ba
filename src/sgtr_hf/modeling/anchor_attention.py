"""Spatial bias of cross-attention: each head looks at its own part of a box.

Sine embeddings of positions are smooth over the whole image, so that attention by them alone takes
long to become local. A Gaussian around the anchor makes it local from the first step (SMCA, Gao et
al. 2021); its centres start on a compass rose, as the sampling points of Deformable DETR do.
"""

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init


# Of the half box: how far out the heads' centres start, and how wide they start.
ROSE_RADIUS = 0.7
ROSE_WIDTH = 1.0
# Share of the image below which an anchor counts as wide as this, lest a cell falls between heads.
MIN_SIDE = 0.06


class AnchorAttentionBias(nn.Module):
    """Logarithm of a Gaussian a head, relative to centre and size of the anchor."""

    def __init__(self, num_attention_heads: int) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.zeros(num_attention_heads, 2))
        self.log_widths = nn.Parameter(torch.zeros(num_attention_heads))

    @torch.no_grad()
    def init_parameters(self) -> None:
        """Set the compass rose."""
        angles = torch.arange(len(self.offsets), device=self.offsets.device)
        angles = angles * (2 * math.pi / len(self.offsets))
        rose = ROSE_RADIUS * torch.stack((angles.cos(), angles.sin()), dim=-1)
        init.copy_(self.offsets, rose.to(self.offsets))
        init.constant_(self.log_widths, math.log(ROSE_WIDTH))

    def forward(self, anchors: Tensor, cells: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Compute what is added to the attention scores.

        Args:
            anchors: (B, N, 4) cxcywh relative to the image.
            cells: (B, S, 4) boxes of the cells; their centres count.
            padding_mask: (B, S) bool, False on padding; None when nothing is padded.

        Returns:
            (B, heads, N, S).
        """
        half_sides = anchors[..., 2:].clamp(min=MIN_SIDE) / 2
        # (B, N, heads, 2)
        centres = anchors[..., None, :2] + self.offsets * half_sides[..., None, :]
        widths = half_sides[..., None, :] * self.log_widths.exp()[:, None]
        distance = (cells[:, None, None, :, :2] - centres[..., None, :]) / widths[..., None, :]
        bias = -0.5 * distance.square().sum(-1).transpose(1, 2)
        # A Gaussian has no end; beyond e**-12 the heads may as well look anywhere.
        bias = bias.clamp(min=-12)
        if padding_mask is not None:
            lowest = torch.finfo(bias.dtype).min
            bias = bias.masked_fill(~padding_mask[:, None, None], lowest)
        return bias
