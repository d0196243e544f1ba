"""Annotated records as scene graphs, and predictions beside the annotations of their images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..scene_graph import SceneGraph
from .prediction_file import Prediction, decode_masks
from .record_source import Record, RecordSource


MatchBy = Literal["image-id", "file-name"]


class RecordGraphs:
    """Turns checked records into graphs in pixels of the image, with scores of 1.

    Args:
        source: Where the records come from, for the names.
        masks: Decode the masks, if there are any.
    """

    def __init__(self, source: RecordSource, *, masks: bool = True) -> None:
        self.id2label = dict(enumerate(source.entity_names))
        self.id2predicate = dict(enumerate(source.predicate_names))
        self.masks = masks and source.has_masks

    def graph(self, record: Record) -> SceneGraph:
        """Return the annotation of an image."""
        entities, relations = record["objects"], record["relations"]
        rows = [(row["subject"], row["object"], row["predicate"]) for row in relations]
        masks = decode_masks([entity["mask"] for entity in entities]) if self.masks else None
        return SceneGraph(
            boxes_xyxy=np.array([entity["bbox"] for entity in entities], dtype=np.float32),
            labels=np.array([entity["label"] for entity in entities], dtype=np.int64),
            scores=np.ones(len(entities), dtype=np.float32),
            relations=np.array(rows, dtype=np.int64).reshape(-1, 3),
            relation_scores=np.ones(len(rows), dtype=np.float32),
            image_size=(record["height"], record["width"]),
            id2label=self.id2label,
            id2predicate=self.id2predicate,
            masks=masks,
        )


@dataclass
class Pairing:
    """Pairs of predictions and annotations of the same images, in whatever order they come.

    For one pass. Predictions stream; annotations that come before their prediction wait.

    Args:
        by: Whether images have the same id, or their files the same name (without its ending).
        allow_unmatched: Leave out predictions of images that have no annotation, and count them,
            instead of raising an error.
    """

    by: MatchBy = "image-id"
    allow_unmatched: bool = False
    num_pairs: int = 0
    num_without_prediction: int = 0
    num_without_annotation: int = 0
    # Graphs, or with masks records, whose masks are encoded.
    _waiting: dict[str, Any] = field(default_factory=dict)
    _seen: dict[str, set[str]] = field(
        default_factory=lambda: {"predictions": set(), "annotations": set()}
    )
    _unmatched: str | None = None

    def pairs(
        self, predictions: Iterable[Prediction], references: Iterable[Record], source: RecordSource
    ) -> Iterator[tuple[SceneGraph, SceneGraph]]:
        """Yield predicted and annotated graphs; an image without prediction has an empty one.

        Raises:
            ValueError: If an image comes twice, predictions have no annotation, or no image of the
                one is among the other.
        """
        graphs, records = RecordGraphs(source), iter(references)
        for prediction in predictions:
            key = self._new_key("predictions", prediction.image_id, prediction.file_name)
            annotated = self._find(key, records, graphs)
            if annotated is None:
                self.num_without_annotation += 1
                self._unmatched = self._unmatched or key
                continue
            self.num_pairs += 1
            yield prediction.graph, annotated
        for record in records:
            self._put_aside(record, graphs)
        self._check()
        for entry in self._waiting.values():
            self.num_without_prediction += 1
            reference = _as_graph(entry, graphs)
            yield SceneGraph.empty(reference.image_size), reference

    def _find(self, key: str, records: Iterator[Record], graphs: RecordGraphs) -> SceneGraph | None:
        """Take the annotation of an image, reading on until it comes."""
        while key not in self._waiting:
            record = next(records, None)
            if record is None:
                return None
            self._put_aside(record, graphs)
        return _as_graph(self._waiting.pop(key), graphs)

    def _put_aside(self, record: Record, graphs: RecordGraphs) -> None:
        key = self._new_key("annotations", record["image_id"], record["image"].get("path"))
        if graphs.masks:
            self._waiting[key] = {name: record[name] for name in record if name != "image"}
        else:
            self._waiting[key] = graphs.graph(record)

    def _check(self) -> None:
        if self._unmatched is None or (self.allow_unmatched and self.num_pairs):
            return
        if not self.num_pairs and self._waiting:
            raise ValueError(
                f"No prediction is of an annotated image: by {self.by}, predictions are called "
                f"{self._unmatched!r} and the like, annotated images {next(iter(self._waiting))!r};"
                " is it another split, or should `--match` be another?"
            )
        raise ValueError(
            f"{self.num_without_annotation} predictions are of images without annotation, as "
            f"{self._unmatched!r}; is it another split? `--allow-unmatched` leaves them out."
        )

    def _new_key(self, side: str, image_id: str, path: str | None) -> str:
        if self.by == "file-name" and path is None:
            raise ValueError(f"Image {image_id} has no file name to be matched by.")
        key = image_id if self.by == "image-id" else Path(str(path)).stem
        if key in self._seen[side]:
            raise ValueError(f"The {side} have two images {key!r} by {self.by}.")
        self._seen[side].add(key)
        return key


def _as_graph(entry: SceneGraph | Record, graphs: RecordGraphs) -> SceneGraph:
    return entry if isinstance(entry, SceneGraph) else graphs.graph(entry)
