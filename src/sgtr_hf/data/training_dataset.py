"""Annotated images for training and evaluation, from any data set of the one schema."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..scene_graph import SceneGraph
from .parquet_reader import open_split
from .record_checks import find_problems
from .resampling import Resampling, ResamplingSettings, predicates_of
from .schema import vocabularies
from .training_augmentation import Annotation, Augmentation, augment


logger = logging.getLogger(__name__)

# What is known of an image without opening it.
ANNOTATION_COLUMNS = ("image_id", "width", "height", "objects", "relations")
_PICTURE = datasets.Image()
# Sets the random numbers that choose relations apart from those of the augmentation.
_OF_RELATIONS = 1
# Likewise those of denoising.
_OF_NOISE = 2


class TrainingImage(NamedTuple):
    """One image with its annotation."""

    image: Image.Image
    image_id: str
    known: Annotation
    """Boxes in pixels of the image, labels and relations."""
    names: tuple[dict[int, str], dict[int, str]]
    """Of classes and predicates."""
    is_resized: bool = False
    """Whether the image has the size that the model shall see."""
    noise_seed: int | None = None
    """Of the noise of its denoising queries, in training."""

    @property
    def annotation(self) -> dict[str, Any]:
        """The annotation in COCO style, as the image processor takes it, with `relations`."""
        boxes = self.known.boxes.copy()
        boxes[:, 2:] -= boxes[:, :2]
        return {
            "image_id": self.image_id,
            "annotations": [
                {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
                for box, label in zip(boxes.tolist(), self.known.labels.tolist(), strict=True)
            ],
            "relations": self.known.relations.tolist(),
        }

    @property
    def reference(self) -> SceneGraph:
        """The annotation as a graph in pixels of the image."""
        return reference_graph(self.known, (self.image.height, self.image.width), self.names)


class UnreadablePictureError(ValueError):
    """A picture cannot be decoded, or is another one than its record says."""


class SceneGraphDataset(Dataset[TrainingImage]):
    """A split of annotated images.

    The augmentation of an image depends on seed, epoch and index alone, so that a resumed run
    sees what an uninterrupted one would have seen.

    Args:
        split: Rows of `scene_graph_features`.
        augmentation: None for evaluation.
        seed: Of augmentation and resampling.
        resampling: How often images come in an epoch; each once if None.
        on_error: "drop" puts the next image in the place of one whose picture cannot be read, and
            says so in the log; "raise" stops.

    Attributes:
        epoch: Decides augmentation and resampling; set it before each pass.
    """

    def __init__(
        self,
        split: datasets.Dataset,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        resampling: ResamplingSettings | None = None,
        on_error: Literal["raise", "drop"] = "raise",
    ) -> None:
        self.id2label, self.id2predicate = vocabularies(split.features)
        self.split = split
        self.on_error = on_error
        self.augmentation = augmentation and augmentation.for_predicates(self.id2predicate)
        self.seed = seed
        self.epoch = 0
        self.resampling: Resampling | None = None
        if resampling is not None:
            self.resampling = Resampling(
                predicates_of(split), len(self.id2predicate), resampling, seed
            )
        self._rows_of_epoch: tuple[int, NDArray[np.int64]] | None = None
        # As Arrow, pictures stay encoded until they are wanted, and masks for good.
        self._encoded = split.with_format("arrow")

    def __len__(self) -> int:
        return len(self.split) if self.resampling is None else self.resampling.num_rows

    def __getitem__(self, index: int) -> TrainingImage:
        if self.on_error == "raise":
            return self._read(index)
        for place in range(index, index + len(self)):
            try:
                return self._read(place % len(self))
            except UnreadablePictureError as error:
                logger.warning("%s The next image takes its place.", error)
        raise ValueError("None of the pictures can be read.")

    def _read(self, index: int) -> TrainingImage:
        record = self._encoded[self._row(index)].to_pylist()[0]
        annotation = annotation_of(record)
        if self.resampling is not None:
            generator = np.random.default_rng((self.seed, self.epoch, index, _OF_RELATIONS))
            predicates = annotation.relations[:, 2]
            stays = self.resampling.keep(self._row(index), predicates, generator)
            annotation = annotation._replace(relations=annotation.relations[stays])
        return make_training_image(
            record,
            annotation,
            (self.id2label, self.id2predicate),
            self.augmentation,
            (self.seed, self.epoch, index),
        )

    @property
    def num_images(self) -> int:
        """Images of an epoch."""
        return len(self)

    def _row(self, index: int) -> int:
        """The row of the split that a row of the epoch shows."""
        if self.resampling is None:
            return index
        if self._rows_of_epoch is None or self._rows_of_epoch[0] != self.epoch:
            self._rows_of_epoch = (self.epoch, self.resampling.rows(self.epoch))
        return int(self._rows_of_epoch[1][index])

    def check(self) -> None:
        """Read all annotations, without opening an image, and reject what cannot be meant.

        Raises:
            ValueError: If a label, a predicate or an index of an entity is out of range, or a box
                has no area inside its image.
        """
        sizes = (len(self.id2label), len(self.id2predicate))
        check_annotations(self.split.select_columns(list(ANNOTATION_COLUMNS)), *sizes)

    def references(self) -> list[SceneGraph]:
        """Return all annotations as graphs, without opening an image."""
        names = (self.id2label, self.id2predicate)
        return [
            reference_graph(annotation_of(record), (record["height"], record["width"]), names)
            for record in self.split.select_columns(list(ANNOTATION_COLUMNS))
        ]


def make_training_image(
    record: dict[str, Any],
    annotation: Annotation,
    names: tuple[dict[int, str], dict[int, str]],
    augmentation: Augmentation | None,
    seed: tuple[int, ...],
) -> TrainingImage:
    """Decode the picture of a record, and change it at random.

    Args:
        record: Of `scene_graph_features`, its picture encoded.
        annotation: What is known of it.
        names: Of classes and predicates.
        augmentation: None for evaluation.
        seed: Of the changes of this image in this epoch.

    Raises:
        UnreadablePictureError: If the picture cannot be read, or has another size than the record
            says.
    """
    image = _decode(record)
    if augmentation is None:
        return TrainingImage(image, record["image_id"], annotation, names)
    # Palettes and the like cannot be brightened.
    image, annotation = augment(
        image.convert("RGB"), annotation, augmentation, np.random.default_rng(seed)
    )
    is_resized = bool(augmentation.resize_sides)
    return TrainingImage(
        image, record["image_id"], annotation, names, is_resized, seed_of_noise(seed)
    )


def seed_of_noise(seed: tuple[int, ...]) -> int:
    """Return a seed for the noise of an image: of its augmentation's seed, but other numbers."""
    return int(np.random.SeedSequence((*seed, _OF_NOISE)).generate_state(1)[0])


def reference_graph(
    annotation: Annotation, size: tuple[int, int], names: tuple[dict[int, str], dict[int, str]]
) -> SceneGraph:
    """Return an annotation as a graph that is certain.

    Args:
        annotation: Boxes in pixels.
        size: Height and width of the image.
        names: Of classes and predicates.
    """
    return SceneGraph(
        boxes_xyxy=annotation.boxes.astype(np.float32),
        labels=annotation.labels,
        scores=np.ones(len(annotation.labels), dtype=np.float32),
        relations=annotation.relations,
        relation_scores=np.ones(len(annotation.relations), dtype=np.float32),
        image_size=size,
        id2label=names[0],
        id2predicate=names[1],
    )


class Collator:
    """Turns annotated images into a batch of model inputs.

    Images that were resized by their augmentation keep their sizes; smaller ones are padded.

    Args:
        image_processor: A `SgtrImageProcessor`.
        with_references: Add the annotations as graphs, which evaluation compares with.
    """

    def __init__(
        self, image_processor: BaseImageProcessor, *, with_references: bool = True
    ) -> None:
        self.image_processor, self.with_references = image_processor, with_references

    def __call__(self, items: Sequence[TrainingImage]) -> dict[str, Any]:
        """Return pixel_values (B, 3, H, W), labels, references, and pixel_mask if any is padded."""
        features = self.image_processor(
            images=[item.image for item in items],
            annotations=[item.annotation for item in items],
            return_tensors="pt",
            **({"do_resize": False} if items[0].is_resized else {}),
        )
        batch: dict[str, Any] = {
            "pixel_values": features["pixel_values"],
            "labels": [
                _label(item, label) for item, label in zip(items, features["labels"], strict=True)
            ],
        }
        if self.with_references:
            batch["references"] = [item.reference for item in items]
        size = list(features["pixel_values"].shape[-2:])
        if any(label["size"].tolist() != size for label in features["labels"]):
            batch["pixel_mask"] = features["pixel_mask"]
        return batch


def _label(item: TrainingImage, made: dict[str, Tensor]) -> dict[str, Tensor | str]:
    """What the losses need of the processor's label, and what errors call the image by."""
    label: dict[str, Tensor | str] = {"image_id": item.image_id}
    label |= {name: made[name] for name in ("class_labels", "boxes", "relations")}
    if item.noise_seed is not None:
        label["noise_seed"] = torch.tensor(item.noise_seed)
    return label


def load_split(path: str | Path, split: str) -> datasets.Dataset:
    """Load a split of a folder of Parquet shards, one shard, or a split of a Hub data set.

    Raises:
        ValueError: If there is no such folder or split.
    """
    try:
        rows: datasets.Dataset = open_split(path, split)
    except ValueError as error:
        raise ValueError(
            f"`data.path`: {error} Make tabletop data with `sgtr-hf make-tabletop`."
        ) from error
    return rows


def check_annotations(
    records: Iterable[dict[str, Any]], num_labels: int, num_predicates: int
) -> int:
    """Reject annotations that cannot be meant, and return the number of records.

    Raises:
        ValueError: If a label, a predicate or an index of an entity is out of range, or a box has
            no area inside the image.
    """
    count = 0
    for record in records:
        problems = [
            problem
            for problem in find_problems(record, num_labels, num_predicates)
            # Training has no use for attributes.
            if problem.part != "attributes"
        ]
        if problems:
            raise ValueError(
                f"{problems[0].message} {count} good records were read before; `sgtr-hf validate` "
                "lists all that are wrong, and `--fix` drops them."
            )
        count += 1
    return count


def _decode(record: dict[str, Any]) -> Image.Image:
    try:
        image: Image.Image = _PICTURE.decode_example(record["image"])
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(
            f"Image {record['image_id']}: the picture cannot be read: {error}. Find all such with "
            "`sgtr-hf validate`."
        ) from error
    if image.size != (record["width"], record["height"]):
        raise UnreadablePictureError(
            f"Image {record['image_id']}: `width` and `height` are {record['width']} and "
            f"{record['height']}, but the picture has {image.width} x {image.height} pixels. Find "
            "all such with `sgtr-hf validate`."
        )
    return image


def annotation_of(record: dict[str, Any]) -> Annotation:
    """Return boxes, labels and relations of a record as arrays."""
    entities, relations = record["objects"], record["relations"]
    rows = [(row["subject"], row["object"], row["predicate"]) for row in relations]
    return Annotation(
        np.array([entity["bbox"] for entity in entities], dtype=np.float64).reshape(-1, 4),
        np.array([entity["label"] for entity in entities], dtype=np.int64),
        np.array(rows, dtype=np.int64).reshape(-1, 3),
    )
