"""The crops of self-distillation of a whole batch at once, for small images.

A 32-pixel image is changed in a few microseconds, and the calls around that take many times as
long; here they are made once a batch. B images, V crops of an image.
"""

import math
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms import v2

from .multi_crop import MultiCropSettings


# Least and largest ratio of width and height, as in the random resized crop of torchvision.
_ASPECTS = (3 / 4, 4 / 3)
_LUMA = (0.299, 0.587, 0.114)
# Colours in which a turn of the hue is a rotation.
_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_SOLARIZE_THRESHOLD = 0.5
_CHANNEL_MAXIMUM = 255


class Draws(NamedTuple):
    """Uniform random numbers in [0, 1) that decide on a crop, each (B,)."""

    area: Tensor
    aspect: Tensor
    left: Tensor
    top: Tensor
    flip: Tensor
    jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    gray: Tensor
    solarize: Tensor


class DrawnImage(NamedTuple):
    """An image with the random numbers of its crops."""

    pixels: Tensor
    """(3, H, W) uint8."""
    draws: Tensor
    """(V, 12) of `Draws`, the global crops first."""


class CropDraws:
    """Draws the numbers of an image's crops from torch's random numbers.

    Args:
        settings: Of the crops.

    Raises:
        ValueError: If crops are to be blurred, which small images are not.
    """

    def __init__(self, settings: MultiCropSettings) -> None:
        if any(settings.blur_probabilities):
            raise ValueError(
                "`blur_probabilities` must be 0 for crops that are made batch by batch, got "
                f"{settings.blur_probabilities}; or set `batched` to false."
            )
        self.num_crops = 2 + settings.num_local_crops

    def __call__(self, image: Image.Image) -> DrawnImage:
        """Keep an RGB image as it is, and draw."""
        numbers = torch.rand(self.num_crops, len(Draws._fields))
        return DrawnImage(v2.functional.pil_to_tensor(image), numbers)


class BatchedMultiCrop:
    """Makes the crops of a batch: as `MultiCrop`, with three differences.

    Crops lie between pixels, and are clamped to the image where their shape does not fit; colours
    change in a fixed order; the hue turns in YIQ, where that is linear.

    Args:
        settings: Sizes and changes.
        flip_probability: Share of crops that are mirrored.
    """

    def __init__(self, settings: MultiCropSettings, flip_probability: float = 0.5) -> None:
        self.settings, self.flip_probability = settings, flip_probability

    def __call__(self, images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Crop images.

        Args:
            images: (B, 3, H, W) uint8.
            numbers: (B, V, 12) of `CropDraws`.

        Returns:
            Global crops (2, B, 3, S, S) and local ones (L, B, 3, s, s), float32 in [0, 1].
        """
        settings, pixels = self.settings, images.float() / _CHANNEL_MAXIMUM
        crops = []
        for number, draw in enumerate(numbers.unbind(1)):
            is_global = number < 2  # noqa: PLR2004 - as DINO has it
            size = settings.global_size if is_global else settings.local_size
            scale = settings.global_scale if is_global else settings.local_scale
            draws = Draws(*draw.unbind(1))
            crop = self._change_colours(self._cut(pixels, draws, size, scale), draws)
            if number == 1:
                inverts = draws.solarize < settings.solarize_probability
                chosen = _spread(inverts) & (crop >= _SOLARIZE_THRESHOLD)
                crop = torch.where(chosen, 1 - crop, crop)
            crops.append(crop)
        size = settings.local_size
        empty = pixels.new_empty(0, len(images), 3, size, size)
        return torch.stack(crops[:2]), torch.stack(crops[2:]) if crops[2:] else empty

    def _cut(self, pixels: Tensor, draws: Draws, size: int, scale: list[float]) -> Tensor:
        """Cut out, mirror and resize; sides and places are shares of the image's."""
        height, width = pixels.shape[-2:]
        area = scale[0] + (scale[1] - scale[0]) * draws.area
        low, high = (math.log(aspect) for aspect in _ASPECTS)
        # Of the crop's sides in pixels; of their shares of the image, it is divided by the image's.
        aspect = torch.exp(low + (high - low) * draws.aspect) * height / width
        shares = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
        signs = torch.where(draws.flip < self.flip_probability, -1.0, 1.0)
        # From -1 to 1 over the image, as `affine_grid` has it.
        centers = [
            2 * place * (1 - share) + share - 1
            for place, share in zip((draws.left, draws.top), shares, strict=True)
        ]
        zero = torch.zeros_like(area)
        rows = (
            torch.stack((signs * shares[0], zero, centers[0]), dim=1),
            torch.stack((zero, shares[1], centers[1]), dim=1),
        )
        grid = affine_grid(
            torch.stack(rows, dim=1), [len(pixels), 3, size, size], align_corners=False
        )
        cut = grid_sample(pixels, grid, "bicubic", "border", align_corners=False)
        return cut.clamp_(0, 1)

    def _change_colours(self, crops: Tensor, draws: Draws) -> Tensor:
        settings = self.settings
        luma = torch.tensor(_LUMA)[:, None, None]

        def factor(draw: Tensor, most: float) -> Tensor:
            return _spread(1 + most * (2 * draw - 1))

        changed = (crops * factor(draws.brightness, settings.brightness)).clamp(0, 1)
        mean = (changed * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        changed = torch.lerp(mean, changed, factor(draws.contrast, settings.contrast)).clamp(0, 1)
        gray = (changed * luma).sum(1, keepdim=True)
        changed = torch.lerp(gray, changed, factor(draws.saturation, settings.saturation))
        turns = _hue_rotations(settings.hue * (2 * draws.hue - 1))
        changed = torch.einsum("bij,bjhw->bihw", turns, changed.clamp(0, 1)).clamp(0, 1)
        crops = torch.where(_spread(draws.jitter < settings.jitter_probability), changed, crops)
        gray = (crops * luma).sum(1, keepdim=True).expand_as(crops)
        return torch.where(_spread(draws.gray < settings.gray_probability), gray, crops)


def _hue_rotations(turns: Tensor) -> Tensor:
    """Matrices (B, 3, 3) of RGB that turn the hue by shares of the circle."""
    to_yiq = torch.tensor(_TO_YIQ)
    angles = 2 * math.pi * turns
    cosines, sines, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    rotation = torch.stack(
        (zero + 1, zero, zero, zero, cosines, -sines, zero, sines, cosines), dim=1
    ).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ rotation @ to_yiq


def _spread(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return values[:, None, None, None]
