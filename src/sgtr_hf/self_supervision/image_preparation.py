"""Brings pictures into the form in which an evaluation shows them to the model.

Each preparation takes a list of RGB pictures and returns normalised tensors (3, H, W) of one size
or of several.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BaseImageProcessor


_CHANNEL_VALUES = 255


class Preparation(Protocol):
    """Anything that turns pictures into tensors."""

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return a tensor (3, H, W) for each picture."""


class Normalization(NamedTuple):
    """Mean and standard deviation of the channels of pictures in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, image_processor: BaseImageProcessor) -> "Normalization":
        """Read them off an image processor."""
        return cls(tuple(image_processor.image_mean), tuple(image_processor.image_std))

    def apply(self, image: Image.Image) -> Tensor:
        """Turn a picture into a tensor (3, H, W)."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float()
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels / _CHANNEL_VALUES - mean[:, None, None]) / std[:, None, None]


def seen_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Return height and width of the pictures that an image processor makes.

    Raises:
        ValueError: If they depend on the picture.
    """
    crops = getattr(image_processor, "do_center_crop", False)
    size = dict((image_processor.crop_size if crops else image_processor.size) or {})
    if not {"height", "width"} <= size.keys():
        raise ValueError(
            "`image_processor` must make pictures of one size, by `crop_size` or by `size` with "
            f"`height` and `width`, got {size}."
        )
    return int(size["height"]), int(size["width"])


class ProcessorPreparation:
    """As the model's image processor does it: a crop of the centre, as classification wants it.

    Args:
        image_processor: Of the model.
    """

    def __init__(self, image_processor: BaseImageProcessor) -> None:
        self.image_processor = image_processor

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return tensors of the processor's size."""
        return list(self.image_processor(images=list(images), return_tensors="pt").pixel_values)


class SquarePreparation:
    """Squeezed to a square: nothing of the picture is cut off, which copy detection wants.

    Args:
        side: In pixels.
        normalization: Of the channels.
    """

    def __init__(self, side: int, normalization: Normalization) -> None:
        self.side, self.normalization = side, normalization

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return tensors (3, side, side)."""
        size = (self.side, self.side)
        return [
            self.normalization.apply(image.resize(size, Image.Resampling.BICUBIC))
            for image in images
        ]


class ThumbnailPreparation:
    """Shrunk until it fits into a square, with its aspect ratio, as retrieval wants it.

    Args:
        side: Largest side in pixels; smaller pictures stay as they are.
        normalization: Of the channels.
        least_side: Sides are raised to this, so that the picture holds a patch.
    """

    def __init__(self, side: int, normalization: Normalization, least_side: int = 1) -> None:
        self.side, self.normalization, self.least_side = side, normalization, least_side

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return tensors of each picture's own size."""
        return [self.normalization.apply(self._shrink(image)) for image in images]

    def _shrink(self, image: Image.Image) -> Image.Image:
        thumbnail = image.copy()
        thumbnail.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
        width, height = (max(side, self.least_side) for side in thumbnail.size)
        if (width, height) == thumbnail.size:
            return thumbnail
        return thumbnail.resize((width, height), Image.Resampling.BICUBIC)


class PatchPreparation:
    """Resized to whole patches, nothing cut off, as maps of attention want it.

    Args:
        side: Short side in pixels; both sides are rounded to whole patches.
        patch_size: Of the model.
        normalization: Of the channels.

    Raises:
        ValueError: If a patch is larger than the side.
    """

    def __init__(self, side: int, patch_size: int, normalization: Normalization) -> None:
        if side < patch_size:
            raise ValueError(
                f"The short side must be at least a patch ({patch_size} pixels), got {side}."
            )
        self.side, self.patch_size, self.normalization = side, patch_size, normalization

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return tensors whose sides are multiples of a patch."""
        return [self.normalization.apply(self.resize(image)) for image in images]

    def resize(self, image: Image.Image) -> Image.Image:
        """Return the picture as the model sees it."""
        factor = self.side / min(image.size) / self.patch_size
        width, height = (round(side * factor) * self.patch_size for side in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)


def scaled(pixel_values: Tensor, scale: float) -> Tensor:
    """Resize (B, 3, H, W) bilinearly without smoothing, as multi-scale features of DINO do."""
    if scale == 1:
        return pixel_values
    return functional.interpolate(
        pixel_values, scale_factor=scale, mode="bilinear", align_corners=False
    )
