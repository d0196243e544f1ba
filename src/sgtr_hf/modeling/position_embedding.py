"""Sine embeddings of pixel grids and of box coordinates (Carion et al. 2020, Liu et al. 2022)."""

import math

import torch
from torch import Tensor


def sine_embedding(positions: Tensor, num_features: int, temperature: float) -> Tensor:
    """Embed coordinates as interleaved sines and cosines.

    Args:
        positions: (..., K) coordinates, normalised to [0, 1].
        num_features: Features of one coordinate; even.
        temperature: Ratio of the longest to the shortest wavelength.

    Returns:
        (..., K * num_features): the features of the first coordinate, then of the second, ...
    """
    # A sine and a cosine share each wavelength.
    pair = torch.arange(num_features // 2, device=positions.device)
    wavelengths = temperature ** (2 * pair / num_features)
    # float32 whatever the model's dtype: bfloat16 cannot tell neighbouring positions apart.
    angles = positions.float()[..., None] * (2 * math.pi) / wavelengths.float()
    features = torch.stack((angles.sin(), angles.cos()), dim=-1)
    return features.flatten(-3).to(positions.dtype)


def box_sine_embedding(boxes: Tensor, d_model: int, temperature: float) -> Tensor:
    """Embed boxes: (..., 4) as cx, cy, w, h to (..., 2 * d_model), features of y, x, w, h."""
    centre_x, centre_y, width, height = boxes.unbind(-1)
    ordered = torch.stack((centre_y, centre_x, width, height), dim=-1)
    return sine_embedding(ordered, d_model // 2, temperature)


def centre_sine_embedding(centres: Tensor, d_model: int, temperature: float) -> Tensor:
    """Embed points: (..., 2) as x, y to (..., d_model), features of y, then of x."""
    return sine_embedding(centres.flip(-1), d_model // 2, temperature)


def grid_sine_embedding(
    mask: Tensor,
    d_model: int,
    temperature: float,
    dtype: torch.dtype,
    *,
    cell_centres: bool = False,
) -> Tensor:
    """Embed the positions of a feature map, counted over its valid part.

    The last valid row and column lie at 1, so that the same place of an image has the same
    embedding whatever the padding beside it.

    Args:
        mask: (B, H, W) bool, True where the image is, False on padding.
        d_model: Features a position.
        temperature: Ratio of the longest to the shortest wavelength.
        dtype: Type of the result.
        cell_centres: Place a cell at its centre, where box coordinates count it, instead of at
            its far corner as DETR does.

    Returns:
        (B, H * W, d_model), row by row.
    """
    columns, rows = _grid_positions(mask, 0.5 if cell_centres else 0.0)
    positions = torch.stack((rows, columns), dim=-1).flatten(1, 2)
    return sine_embedding(positions, d_model // 2, temperature).to(dtype)


def grid_boxes(mask: Tensor, size: float) -> Tensor:
    """Put a square box on every cell of a feature map.

    Args:
        mask: (B, H, W) bool, True where the image is, False on padding.
        size: Width and height of the boxes, as a share of the image.

    Returns:
        (B, H * W, 4) cxcywh relative to the image, row by row.
    """
    columns, rows = _grid_positions(mask, 0.5)
    sides = torch.full_like(rows, size)
    return torch.stack((columns, rows, sides, sides), dim=-1).flatten(1, 2)


def _grid_positions(mask: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """X and y (B, H, W) of the cells, where the last valid row and column lie at 1."""
    rows = mask.cumsum(1, dtype=torch.float32)
    columns = mask.cumsum(2, dtype=torch.float32)
    # DETR's guard against a map without a valid cell.
    epsilon = 1e-6
    rows = (rows - shift) / (rows[:, -1:, :] + epsilon)
    columns = (columns - shift) / (columns[:, :, -1:] + epsilon)
    return columns, rows
