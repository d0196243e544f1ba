"""Annotated images for training and evaluation, from any data set of the one schema."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..scene_graph import SceneGraph
from .schema import vocabularies


class TrainingImage(NamedTuple):
    """One image with its annotation."""

    image: Image.Image
    annotation: dict[str, Any]
    """COCO style, as the image processor takes it, with `relations`."""
    reference: SceneGraph
    """The annotation as a graph in pixels of the image."""


class Augmentation(NamedTuple):
    """How training images vary."""

    flip_probability: float = 0.0
    flip_swaps: dict[int, int] | None = None
    """Predicates that become others in the mirror."""
    brightness: float = 0.0
    """Largest relative change of brightness and contrast."""


class SceneGraphDataset(Dataset[TrainingImage]):
    """A split of annotated images.

    The augmentation of an image depends on seed, epoch and index alone, so that a resumed run
    sees what an uninterrupted one would have seen.

    Args:
        split: Rows of `scene_graph_features`.
        augmentation: None for evaluation.
        seed: Of the augmentation.
    """

    def __init__(
        self, split: datasets.Dataset, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        self.id2label, self.id2predicate = vocabularies(split.features)
        # Opened here, so that one place turns bytes into pixels.
        self.split = split.cast_column("image", datasets.Image(decode=True))
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> TrainingImage:
        record = self.split[index]
        image, boxes, relations = record["image"], _boxes(record), _relations(record)
        check_record(record, len(self.id2label), len(self.id2predicate))
        if self.augmentation is not None:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            image, boxes, relations = augment(image, boxes, relations, self.augmentation, generator)
        return self._assemble(record, image, boxes, relations)

    def references(self) -> list[SceneGraph]:
        """Return all annotations as graphs, without opening an image."""
        rows = self.split.remove_columns("image")
        return [
            self._graph(record, _boxes(record), _relations(record), _size(record))
            for record in rows
        ]

    def _assemble(
        self,
        record: dict[str, Any],
        image: Image.Image,
        boxes: np.ndarray,
        relations: np.ndarray,
    ) -> TrainingImage:
        entities = [
            {
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "category_id": entity["label"],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            for (x1, y1, x2, y2), entity in zip(boxes.tolist(), record["objects"], strict=True)
        ]
        annotation = {
            "image_id": record["image_id"],
            "annotations": entities,
            "relations": relations.tolist(),
        }
        size = (image.height, image.width)
        return TrainingImage(image, annotation, self._graph(record, boxes, relations, size))

    def _graph(
        self,
        record: dict[str, Any],
        boxes: np.ndarray,
        relations: np.ndarray,
        size: tuple[int, int],
    ) -> SceneGraph:
        labels = np.array([entity["label"] for entity in record["objects"]], dtype=np.int64)
        return SceneGraph(
            boxes_xyxy=boxes.astype(np.float32),
            labels=labels,
            scores=np.ones(len(labels), dtype=np.float32),
            relations=relations,
            relation_scores=np.ones(len(relations), dtype=np.float32),
            image_size=size,
            id2label=self.id2label,
            id2predicate=self.id2predicate,
        )


class Collator:
    """Turns annotated images into a batch of model inputs.

    Args:
        image_processor: A `SgtrImageProcessor`.
    """

    def __init__(self, image_processor: Callable[..., Any]) -> None:
        self.image_processor = image_processor

    def __call__(self, items: Sequence[TrainingImage]) -> dict[str, Any]:
        """Return pixel_values (B, 3, H, W), labels, references, and pixel_mask if any is padded."""
        features = self.image_processor(
            images=[item.image for item in items],
            annotations=[item.annotation for item in items],
            return_tensors="pt",
        )
        labels = [
            {name: label[name] for name in ("class_labels", "boxes", "relations")}
            for label in features["labels"]
        ]
        batch: dict[str, Any] = {
            "pixel_values": features["pixel_values"],
            "labels": labels,
            "references": [item.reference for item in items],
        }
        mask: Tensor = features["pixel_mask"]
        if not bool((mask > 0).all()):
            batch["pixel_mask"] = mask
        return batch


def load_split(path: str | Path, split: str) -> datasets.Dataset:
    """Load a split of a folder of Parquet shards, or of a Hub data set.

    Raises:
        ValueError: If there is no such folder or split.
    """
    try:
        loaded = datasets.load_dataset(str(path), split=split)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"`data.path` {path} has no readable split {split!r} ({error}). Make tabletop data "
            "with `sgtr-hf make-tabletop`."
        ) from error
    return loaded


def check_record(record: dict[str, Any], num_labels: int, num_predicates: int) -> None:
    """Reject annotations that cannot be meant.

    Raises:
        ValueError: If a label, a predicate or an index of an entity is out of range.
    """
    num_entities = len(record["objects"])
    for entity in record["objects"]:
        _check_index(record, "objects.label", entity["label"], num_labels)
    for relation in record["relations"]:
        _check_index(record, "relations.subject", relation["subject"], num_entities)
        _check_index(record, "relations.object", relation["object"], num_entities)
        _check_index(record, "relations.predicate", relation["predicate"], num_predicates)


def augment(
    image: Image.Image,
    boxes: np.ndarray,
    relations: np.ndarray,
    augmentation: Augmentation,
    generator: np.random.Generator,
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Mirror an image, with its boxes and the predicates that have a side, and change its light."""
    if generator.uniform() < augmentation.flip_probability:
        image = ImageOps.mirror(image)
        boxes = boxes.copy()
        boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
        swaps = augmentation.flip_swaps or {}
        relations = relations.copy()
        relations[:, 2] = [
            swaps.get(predicate, predicate) for predicate in relations[:, 2].tolist()
        ]
    if augmentation.brightness > 0:
        low, high = 1 - augmentation.brightness, 1 + augmentation.brightness
        image = ImageEnhance.Brightness(image).enhance(float(generator.uniform(low, high)))
        image = ImageEnhance.Contrast(image).enhance(float(generator.uniform(low, high)))
    return image, boxes, relations


def make_swaps(pairs: Sequence[Sequence[str]], id2predicate: dict[int, str]) -> dict[int, int]:
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


def seed_torch_worker(_: int) -> None:
    """Keep a loader's worker to one thread: the cores belong to the model."""
    torch.set_num_threads(1)


def _boxes(record: dict[str, Any]) -> np.ndarray:
    return np.array([entity["bbox"] for entity in record["objects"]], dtype=np.float64).reshape(
        -1, 4
    )


def _relations(record: dict[str, Any]) -> np.ndarray:
    rows = [(row["subject"], row["object"], row["predicate"]) for row in record["relations"]]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _size(record: dict[str, Any]) -> tuple[int, int]:
    return record["height"], record["width"]


def _check_index(record: dict[str, Any], field: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(
            f"Image {record['image_id']}: `{field}` must be from 0 to {count - 1}, got {value}; "
            "correct or drop the annotation."
        )
