"""Annotated images for training and evaluation, from any data set of the one schema."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BaseImageProcessor

from ..scene_graph import SceneGraph
from .schema import vocabularies
from .training_augmentation import Annotation, Augmentation, augment


class TrainingImage(NamedTuple):
    """One image with its annotation."""

    image: Image.Image
    annotation: dict[str, Any]
    """COCO style, as the image processor takes it, with `relations`."""
    reference: SceneGraph
    """The annotation as a graph in pixels of the image."""


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
        self.split = split
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> TrainingImage:
        record = self.split[index]
        image, annotation = record["image"], _annotation(record)
        if self.augmentation is not None:
            generator = np.random.default_rng((self.seed, self.epoch, index))
            # Palettes and the like cannot be brightened.
            image = image.convert("RGB")
            image, annotation = augment(image, annotation, self.augmentation, generator)
        return TrainingImage(
            image,
            _coco_annotation(record["image_id"], annotation),
            self._graph(annotation, (image.height, image.width)),
        )

    def check(self) -> None:
        """Read all annotations, without opening an image, and reject what cannot be meant.

        Raises:
            ValueError: If a label, a predicate or an index of an entity is out of range, or a box
                has no area inside its image.
        """
        for record in self.split.remove_columns("image"):
            check_record(record, len(self.id2label), len(self.id2predicate))

    def references(self) -> list[SceneGraph]:
        """Return all annotations as graphs, without opening an image."""
        rows = self.split.remove_columns("image")
        return [
            self._graph(_annotation(record), (record["height"], record["width"])) for record in rows
        ]

    def _graph(self, annotation: Annotation, size: tuple[int, int]) -> SceneGraph:
        return SceneGraph(
            boxes_xyxy=annotation.boxes.astype(np.float32),
            labels=annotation.labels,
            scores=np.ones(len(annotation.labels), dtype=np.float32),
            relations=annotation.relations,
            relation_scores=np.ones(len(annotation.relations), dtype=np.float32),
            image_size=size,
            id2label=self.id2label,
            id2predicate=self.id2predicate,
        )


class Collator:
    """Turns annotated images into a batch of model inputs.

    Args:
        image_processor: A `SgtrImageProcessor`.
    """

    def __init__(self, image_processor: BaseImageProcessor) -> None:
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
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(
            f"`data.path` {path} has no readable split {split!r} ({error}). Make tabletop data "
            "with `sgtr-hf make-tabletop`."
        ) from error
    return loaded


def check_record(record: dict[str, Any], num_labels: int, num_predicates: int) -> None:
    """Reject annotations that cannot be meant.

    Raises:
        ValueError: If a label, a predicate or an index of an entity is out of range, or a box has
            no area inside the image.
    """
    num_entities = len(record["objects"])
    for entity in record["objects"]:
        _check_index(record, "objects.label", entity["label"], num_labels)
        _check_box(record, entity["bbox"])
    for relation in record["relations"]:
        _check_index(record, "relations.subject", relation["subject"], num_entities)
        _check_index(record, "relations.object", relation["object"], num_entities)
        _check_index(record, "relations.predicate", relation["predicate"], num_predicates)


def prepare_worker(_: int) -> None:
    """Set a loader's worker up: one thread, and no ear for signals.

    The cores belong to the model. A scheduler, or Ctrl-C, signals every process of a run; a worker
    that died of it would take the main process down before that has saved its checkpoint.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _annotation(record: dict[str, Any]) -> Annotation:
    entities, relations = record["objects"], record["relations"]
    rows = [(row["subject"], row["object"], row["predicate"]) for row in relations]
    return Annotation(
        np.array([entity["bbox"] for entity in entities], dtype=np.float64).reshape(-1, 4),
        np.array([entity["label"] for entity in entities], dtype=np.int64),
        np.array(rows, dtype=np.int64).reshape(-1, 3),
    )


def _coco_annotation(image_id: str, annotation: Annotation) -> dict[str, Any]:
    sizes = annotation.boxes[:, 2:] - annotation.boxes[:, :2]
    boxes_xywh = np.concatenate((annotation.boxes[:, :2], sizes), axis=1).tolist()
    return {
        "image_id": image_id,
        "annotations": [
            {"bbox": box, "category_id": label, "area": box[2] * box[3], "iscrowd": 0}
            for box, label in zip(boxes_xywh, annotation.labels.tolist(), strict=True)
        ],
        "relations": annotation.relations.tolist(),
    }


def _check_index(record: dict[str, Any], field: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(
            f"Image {record['image_id']}: `{field}` must be from 0 to {count - 1}, got {value}; "
            "correct or drop the annotation."
        )


def _check_box(record: dict[str, Any], box: Sequence[float]) -> None:
    x1, y1, x2, y2 = box
    width = min(x2, record["width"]) - max(x1, 0)
    height = min(y2, record["height"]) - max(y1, 0)
    # Written so that a number that is not a number fails too.
    if not (width > 0 and height > 0):
        raise ValueError(
            f"Image {record['image_id']}: `objects.bbox` must be x1, y1, x2, y2 with an area "
            f"inside the image of {record['width']} x {record['height']} pixels, got {list(box)}; "
            "correct or drop the annotation."
        )
