"""The random crops that self-distillation compares, with torchvision.transforms.v2."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import v2


# Least and largest radius of the blur in pixels, whatever the size of the crop.
_BLUR_RADII = (0.1, 2.0)
_SOLARIZE_THRESHOLD = 128
_CHANNEL_MAXIMUM = 255


@dataclass
class MultiCropSettings:
    """Which crops are made of an image, and how they are changed; the defaults are DINO's.

    Args:
        global_size: Side in pixels of the two global crops.
        local_size: Side of the local crops.
        num_local_crops: How many there are.
        global_scale: Least and largest share of the image's area in a global crop.
        local_scale: Likewise of a local crop.
        jitter_probability: Share of crops whose colours are changed.
        brightness: Largest relative change.
        contrast: Largest relative change.
        saturation: Largest relative change.
        hue: Largest turn, as a share of the colour circle.
        gray_probability: Share of crops without colour.
        blur_probabilities: Shares of first global, second global and local crops that are blurred;
            0 for small images.
        solarize_probability: Share of second global crops whose bright half is inverted.
        batched: Make the crops of a whole batch at once, without blur: many times faster for
            small images, which must all be of one size.
    """

    global_size: int = 224
    local_size: int = 96
    num_local_crops: int = 8
    global_scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.4])
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray_probability: float = 0.2
    blur_probabilities: list[float] = field(default_factory=lambda: [1.0, 0.1, 0.5])
    solarize_probability: float = 0.2
    batched: bool = False

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 pixel, got {getattr(self, name)}.")
        if self.num_local_crops < 0:
            raise ValueError(f"`num_local_crops` must be at least 0, got {self.num_local_crops}.")
        for name in ("global_scale", "local_scale"):
            scale = getattr(self, name)
            if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:  # noqa: PLR2004
                raise ValueError(
                    f"`{name}` must be a least and a largest share of the area in (0, 1], got "
                    f"{scale}."
                )
        names = ("jitter_probability", "gray_probability", "solarize_probability")
        if len(self.blur_probabilities) != 3:  # noqa: PLR2004
            raise ValueError(
                "`blur_probabilities` must be three, of first global, second global and local "
                f"crops, got {self.blur_probabilities}."
            )
        values = [*self.blur_probabilities, *(getattr(self, name) for name in names)]
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"Probabilities of crops must be between 0 and 1, got {values}.")


class ImageCrops(NamedTuple):
    """Crops of an image, uint8."""

    global_crops: Tensor
    """(2, 3, H, W)."""
    local_crops: Tensor
    """(L, 3, h, w)."""


class MultiCrop:
    """Makes the crops of an image from torch's random numbers.

    Pictures stay PIL images on the way: for single small images that is several times faster than
    tensors.

    Args:
        settings: Sizes and changes.
        flip_probability: Share of crops that are mirrored.

    Source:
        `DataAugmentationDINO` of facebookresearch/dino.
    """

    def __init__(self, settings: MultiCropSettings, flip_probability: float = 0.5) -> None:
        self.settings, self.flip_probability = settings, flip_probability
        first, second, local = settings.blur_probabilities
        size, scale = settings.global_size, settings.global_scale
        self.first = self._changes(size, scale, first)
        self.second = self._changes(size, scale, second, settings.solarize_probability)
        self.local = self._changes(settings.local_size, settings.local_scale, local)

    def __call__(self, image: Image.Image) -> ImageCrops:
        """Crop an RGB image."""
        size, count = self.settings.local_size, self.settings.num_local_crops
        local = [self.local(image) for _ in range(count)]
        return ImageCrops(
            torch.stack([self.first(image), self.second(image)]),
            torch.stack(local) if local else torch.empty(0, 3, size, size, dtype=torch.uint8),
        )

    def _changes(
        self, size: int, scale: Sequence[float], blur: float, solarize: float = 0.0
    ) -> nn.Module:
        settings = self.settings
        jitter = v2.ColorJitter(
            settings.brightness, settings.contrast, settings.saturation, settings.hue
        )
        changes: list[nn.Module] = [
            v2.RandomResizedCrop(
                size, scale=tuple(scale), interpolation=v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(self.flip_probability),
            v2.RandomApply([jitter], settings.jitter_probability),
            v2.RandomGrayscale(settings.gray_probability),
        ]
        if blur:
            changes.append(v2.RandomApply([RandomBlur()], blur))
        if solarize:
            changes.append(v2.RandomSolarize(_SOLARIZE_THRESHOLD, solarize))
        return v2.Compose([*changes, v2.PILToTensor()])


class RandomBlur(nn.Module):
    """Blurs a PIL image by a Gaussian of random radius; that of torchvision has a fixed kernel."""

    def forward(self, image: Image.Image) -> Image.Image:
        """Blur an image."""
        radius = torch.empty(1).uniform_(*_BLUR_RADII).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def normalize_crops(crops: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn pixels (..., 3, H, W), uint8 or float32 in [0, 1], into normalised float32."""
    deviation = torch.tensor(std)[:, None, None]
    offset = torch.tensor(mean)[:, None, None] / deviation
    scale = deviation if crops.is_floating_point() else deviation * _CHANNEL_MAXIMUM
    return (crops.float() / scale).sub_(offset)
