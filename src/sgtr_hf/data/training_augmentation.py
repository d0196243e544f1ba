"""Random changes of annotated training images: mirror, crop, light.

T annotated entities, R annotated relations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps


class Annotation(NamedTuple):
    """What is known of one image."""

    boxes: NDArray[np.float64]
    """(T, 4) x1, y1, x2, y2 in pixels."""
    labels: NDArray[np.int64]
    """(T,) classes."""
    relations: NDArray[np.int64]
    """(R, 3) subject and object as rows of `boxes`, predicate."""


@dataclass(frozen=True)
class Augmentation:
    """How training images vary.

    Args:
        flip_probability: Share of images that are mirrored.
        flip_swaps: Predicates that become others in the mirror.
        brightness: Largest relative change of brightness and of contrast.
        least_crop: Least side of a random crop, as a share of the image's; 1 does not crop.
        least_visible: Entities of which a crop shows a smaller share of the area are dropped.
    """

    flip_probability: float = 0.0
    flip_swaps: Mapping[int, int] = field(default_factory=dict)
    brightness: float = 0.0
    least_crop: float = 1.0
    least_visible: float = 0.3


def augment(
    image: Image.Image,
    annotation: Annotation,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> tuple[Image.Image, Annotation]:
    """Change an image at random, and its annotation with it."""
    if generator.uniform() < augmentation.flip_probability:
        image, annotation = flip(image, annotation, augmentation.flip_swaps)
    if augmentation.least_crop < 1:
        image, annotation = _crop_randomly(image, annotation, augmentation, generator)
    if augmentation.brightness > 0:
        low, high = 1 - augmentation.brightness, 1 + augmentation.brightness
        image = ImageEnhance.Brightness(image).enhance(float(generator.uniform(low, high)))
        image = ImageEnhance.Contrast(image).enhance(float(generator.uniform(low, high)))
    return image, annotation


def flip(
    image: Image.Image, annotation: Annotation, swaps: Mapping[int, int]
) -> tuple[Image.Image, Annotation]:
    """Mirror left and right; predicates in `swaps` become others."""
    boxes, relations = annotation.boxes.copy(), annotation.relations.copy()
    boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    predicates = relations[:, 2].tolist()
    relations[:, 2] = [swaps.get(predicate, predicate) for predicate in predicates]
    return ImageOps.mirror(image), Annotation(boxes, annotation.labels, relations)


def crop(
    image: Image.Image,
    annotation: Annotation,
    window: tuple[int, int, int, int],
    least_visible: float,
) -> tuple[Image.Image, Annotation]:
    """Cut a window out; entities that it hardly shows go, with their relations.

    Args:
        image: A picture.
        annotation: Its annotation.
        window: x1, y1, x2, y2 in pixels.
        least_visible: Least share of an entity's area that must be inside.
    """
    left, top, right, bottom = window
    boxes = annotation.boxes - np.array([left, top, left, top])
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    boxes = boxes.clip(0, [right - left, bottom - top] * 2)
    visible_areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    is_kept = (visible_areas > 0) & (visible_areas >= least_visible * areas)
    new_rows = np.cumsum(is_kept) - 1
    relations = annotation.relations[is_kept[annotation.relations[:, :2]].all(axis=1)]
    relations = np.column_stack((new_rows[relations[:, :2]], relations[:, 2]))
    return image.crop(window), Annotation(boxes[is_kept], annotation.labels[is_kept], relations)


def make_swaps(pairs: Sequence[Sequence[str]], id2predicate: Mapping[int, str]) -> dict[int, int]:
    """Resolve pairs of predicate names that change places in the mirror.

    Raises:
        ValueError: If an entry is not a pair of known predicates.
    """
    ids = {name: index for index, name in id2predicate.items()}
    swaps: dict[int, int] = {}
    for pair in pairs:
        if len(pair) != 2 or any(name not in ids for name in pair):  # noqa: PLR2004
            raise ValueError(
                f"`data.flip_swaps` must hold pairs of predicates, got {list(pair)}; known are "
                f"{', '.join(ids)}."
            )
        first, second = (ids[name] for name in pair)
        swaps |= {first: second, second: first}
    return swaps


def _crop_randomly(
    image: Image.Image,
    annotation: Annotation,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> tuple[Image.Image, Annotation]:
    share = generator.uniform(augmentation.least_crop, 1)
    width, height = (max(round(side * share), 1) for side in image.size)
    left = int(generator.integers(image.width - width + 1))
    top = int(generator.integers(image.height - height + 1))
    window = (left, top, left + width, top + height)
    cropped = crop(image, annotation, window, augmentation.least_visible)
    # A crop that shows nothing teaches nothing.
    return cropped if len(cropped[1].labels) else (image, annotation)
