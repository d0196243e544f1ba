"""Random changes of annotated training images: mirror, crop, light and colour, size.

Pictures and boxes go through torchvision.transforms.v2 together; the random numbers come from the
caller's generator, so that an image's changes can be repeated.

T annotated entities, R annotated relations.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional


logger = logging.getLogger(__name__)


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
        flip_swaps: Predicates that become others in the mirror; None for those with left and right
            in their names, which a data set finds in its vocabulary.
        brightness: Largest relative change of brightness and of contrast.
        least_crop: Least side of a random crop, as a share of the image's; 1 does not crop.
        least_visible: Entities of which a crop shows a smaller share of the area are dropped.
        crop_probability: Share of images that are cropped.
        saturation: Largest relative change of saturation.
        hue: Largest turn of the hue, as a share of the colour circle, at most 0.5.
        resize_sides: Lengths in pixels of which the shorter side gets one; none leaves the size
            to the image processor.
        resize_longest_side: Limit of the longer side, above all `resize_sides`; where it would be
            exceeded, the shorter side gets shorter.
    """

    flip_probability: float = 0.0
    flip_swaps: Mapping[int, int] | None = None
    brightness: float = 0.0
    least_crop: float = 1.0
    least_visible: float = 0.3
    crop_probability: float = 1.0
    saturation: float = 0.0
    hue: float = 0.0
    resize_sides: tuple[int, ...] = ()
    resize_longest_side: int = 1333

    def for_predicates(self, id2predicate: Mapping[int, str]) -> "Augmentation":
        """Return the same with known `flip_swaps`: those of `find_swaps` where they are None."""
        if self.flip_swaps is not None or not self.flip_probability:
            return self
        return replace(self, flip_swaps=find_swaps(id2predicate))


def augment(
    image: Image.Image,
    annotation: Annotation,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> tuple[Image.Image, Annotation]:
    """Change an image at random, and its annotation with it.

    What is switched off draws no number, so that it leaves what the others draw as it was.

    Raises:
        ValueError: If images are mirrored and it is not known which predicates change places.
    """
    if augmentation.flip_probability and augmentation.flip_swaps is None:
        raise ValueError(
            "`flip_swaps` must be known to mirror an image, got None; find them by "
            "`augmentation.for_predicates(id2predicate)`."
        )
    if generator.uniform() < augmentation.flip_probability:
        image, annotation = flip(image, annotation, augmentation.flip_swaps or {})
    if augmentation.least_crop < 1 and _happens(augmentation.crop_probability, generator):
        image, annotation = _crop_randomly(image, annotation, augmentation, generator)
    image = _change_colors(image, augmentation, generator)
    if augmentation.resize_sides:
        side = int(generator.choice(augmentation.resize_sides))
        image, annotation = resize(image, annotation, side, augmentation.resize_longest_side)
    return image, annotation


def flip(
    image: Image.Image, annotation: Annotation, swaps: Mapping[int, int]
) -> tuple[Image.Image, Annotation]:
    """Mirror left and right; predicates in `swaps` become others."""
    boxes = functional.horizontal_flip(_boxes_on(image, annotation))
    relations = annotation.relations
    if swaps:
        predicates = [swaps.get(predicate, predicate) for predicate in relations[:, 2].tolist()]
        relations = relations.copy()
        relations[:, 2] = predicates
    # The mirror makes -0.0 of the right border.
    flipped = Annotation(boxes.numpy() + 0.0, annotation.labels, relations)
    return functional.horizontal_flip(image), flipped


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
    place = (top, left, bottom - top, right - left)
    boxes = functional.crop(_boxes_on(image, annotation), *place).numpy()
    visible_areas = _areas(boxes)
    is_kept = (visible_areas > 0) & (visible_areas >= least_visible * _areas(annotation.boxes))
    cropped, labels, relations = functional.crop(image, *place), *annotation[1:]
    if not is_kept.all():
        stays = is_kept[relations[:, 0]] & is_kept[relations[:, 1]]
        relations = relations[stays]
        relations[:, :2] = (np.cumsum(is_kept) - 1)[relations[:, :2]]
        boxes, labels = boxes[is_kept], labels[is_kept]
    return cropped, Annotation(boxes, labels, relations)


def resize(
    image: Image.Image, annotation: Annotation, shortest_side: int, longest_side: int
) -> tuple[Image.Image, Annotation]:
    """Bring the shorter side to a length, or the longer one to its limit where that is less.

    Raises:
        ValueError: If `longest_side` is not above `shortest_side`.
    """
    boxes = _boxes_on(image, annotation)
    boxes = functional.resize(boxes, [shortest_side], max_size=longest_side)
    resized = functional.resize(image, [shortest_side], max_size=longest_side)
    return resized, annotation._replace(boxes=boxes.numpy())


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


def find_swaps(id2predicate: Mapping[int, str]) -> dict[int, int]:
    """Find the predicates that change places in the mirror, by "left" and "right" in their names.

    Says which it found, and warns of those whose counterpart the vocabulary does not have: their
    mirrored relations would be wrong.
    """
    ids = {name.lower(): index for index, name in id2predicate.items()}
    swaps: dict[int, int] = {}
    missing = []
    for name, index in ids.items():
        mirrored = _mirrored_name(name)
        if mirrored == name:
            continue
        if mirrored in ids:
            swaps[index] = ids[mirrored]
        else:
            missing.append(name)
    pairs = [
        f"{id2predicate[first]} / {id2predicate[second]}"
        for first, second in swaps.items()
        if first < second
    ]
    if pairs:
        logger.info("A mirrored image swaps the predicates %s.", ", ".join(pairs))
    if missing:
        logger.warning(
            "The vocabulary has no counterparts of the predicates %s. If they are directions, they "
            "are wrong in mirrored images: set `flip_probability` to 0.",
            ", ".join(missing),
        )
    return swaps


def _mirrored_name(name: str) -> str:
    other = {"left": "right", "right": "left"}
    return re.sub(r"(?<![a-z])(left|right)(?![a-z])", lambda word: other[word.group()], name)


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _happens(probability: float, generator: np.random.Generator) -> bool:
    return probability >= 1 or generator.uniform() < probability


def _boxes_on(image: Image.Image, annotation: Annotation) -> tv_tensors.BoundingBoxes:
    return tv_tensors.BoundingBoxes(
        torch.from_numpy(annotation.boxes),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(image.height, image.width),
    )


def _change_colors(
    image: Image.Image, augmentation: Augmentation, generator: np.random.Generator
) -> Image.Image:
    if augmentation.brightness > 0:
        image = functional.adjust_brightness(image, _factor(augmentation.brightness, generator))
        image = functional.adjust_contrast(image, _factor(augmentation.brightness, generator))
    if augmentation.saturation > 0:
        image = functional.adjust_saturation(image, _factor(augmentation.saturation, generator))
    if augmentation.hue > 0:
        turn = float(generator.uniform(-augmentation.hue, augmentation.hue))
        image = functional.adjust_hue(image, turn)
    return image


def _factor(largest_change: float, generator: np.random.Generator) -> float:
    return float(generator.uniform(1 - largest_change, 1 + largest_change))


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
