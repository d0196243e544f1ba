"""Annotated records as scene graphs, and predictions beside the annotations of their images."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..scene_graph import SceneGraph
from .prediction_file import Prediction, decode_masks
from .record_source import Record, RecordSource


MatchBy = Literal["image-id", "file-name"]


def graph_of_record(record: Record, source: RecordSource, *, masks: bool = True) -> SceneGraph:
    """Return the annotation of an image as a graph in pixels of the image, scores of 1.

    Args:
        record: Checked.
        source: Where it comes from, for the names.
        masks: Decode the masks, if there are any.
    """
    entities, relations = record["objects"], record["relations"]
    rows = [(row["subject"], row["object"], row["predicate"]) for row in relations]
    return SceneGraph(
        boxes_xyxy=np.array([entity["bbox"] for entity in entities], dtype=np.float32),
        labels=np.array([entity["label"] for entity in entities], dtype=np.int64),
        scores=np.ones(len(entities), dtype=np.float32),
        relations=np.array(rows, dtype=np.int64).reshape(-1, 3),
        relation_scores=np.ones(len(rows), dtype=np.float32),
        image_size=(record["height"], record["width"]),
        id2label=dict(enumerate(source.entity_names)),
        id2predicate=dict(enumerate(source.predicate_names)),
        masks=(
            decode_masks([entity["mask"] for entity in entities])
            if masks and source.has_masks
            else None
        ),
    )


@dataclass
class Pairing:
    """Pairs of predictions and annotations of the same images, in whatever order they come.

    For one pass. Where both come in one order, no more than two graphs are kept; else those that
    wait for their other half.

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
    _waiting: tuple[dict[str, Any], dict[str, Any]] = field(default_factory=lambda: ({}, {}))
    _seen: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))

    def pairs(
        self, predictions: Iterable[Prediction], references: Iterable[Record], source: RecordSource
    ) -> Iterator[tuple[SceneGraph, SceneGraph]]:
        """Yield predicted and annotated graphs; an image without prediction has an empty one.

        Raises:
            ValueError: If an image comes twice, predictions have no annotation, or no image of the
                one is among the other.
        """
        keyed = itertools.zip_longest(
            ((self._key_of_prediction(one), one.graph) for one in predictions),
            ((self._key_of_record(one), graph_of_record(one, source)) for one in references),
        )
        for entries in keyed:
            for side, entry in enumerate(entries):
                if entry is not None and (pair := self._match(side, *entry)) is not None:
                    self.num_pairs += 1
                    yield pair
        unmatched, missing = self._waiting
        self._check(unmatched, missing)
        self.num_without_annotation = len(unmatched)
        for reference in missing.values():
            self.num_without_prediction += 1
            yield SceneGraph.empty(reference.image_size), reference

    def _match(
        self, side: int, key: str, graph: SceneGraph
    ) -> tuple[SceneGraph, SceneGraph] | None:
        own, others = self._waiting[side], self._waiting[1 - side]
        if key in self._seen[side]:
            what = ("predictions", "annotations")[side]
            raise ValueError(f"The {what} have two images {key!r} by {self.by}.")
        self._seen[side].add(key)
        if key not in others:
            own[key] = graph
            return None
        other = others.pop(key)
        return (graph, other) if side == 0 else (other, graph)

    def _check(self, unmatched: dict[str, Any], missing: dict[str, Any]) -> None:
        if not unmatched or (self.allow_unmatched and self.num_pairs):
            return
        example = next(iter(unmatched))
        if not self.num_pairs and missing:
            raise ValueError(
                f"No prediction is of an annotated image: by {self.by}, predictions are called "
                f"{example!r} and the like, annotated images {next(iter(missing))!r}; is it "
                "another split, or should `--match` be another?"
            )
        raise ValueError(
            f"{len(unmatched)} predictions are of images without annotation, as {example!r}; is it "
            "another split? `--allow-unmatched` leaves them out."
        )

    def _key_of_prediction(self, prediction: Prediction) -> str:
        return self._key(prediction.image_id, prediction.file_name)

    def _key_of_record(self, record: Record) -> str:
        return self._key(record["image_id"], record["image"].get("path"))

    def _key(self, image_id: str, path: str | None) -> str:
        if self.by == "image-id":
            return image_id
        if path is None:
            raise ValueError(f"Image {image_id} has no file name to be matched by.")
        return Path(path).stem
