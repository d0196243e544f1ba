"""The one result type: entities of an image and the relations between them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

# Arrays with the last dimension each must have; None for a vector.
_ENTITY_ARRAYS = {"boxes_xyxy": 4, "labels": None, "scores": None}
_RELATION_ARRAYS = {"relations": 3, "relation_scores": None}
_INTEGER_ARRAYS = ("labels", "relations")


class Triplet(NamedTuple):
    """One relation in words."""

    subject: str
    predicate: str
    object: str
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class SceneGraph:
    """Entities of an image and relations between them, best relations first.

    Args:
        boxes_xyxy: (E, 4) float32 x1, y1, x2, y2 in pixels of the image.
        labels: (E,) int64 classes from 0.
        scores: (E,) float32 confidence in [0, 1].
        relations: (R, 3) int64 subject and object as indices of entities, predicate from 0.
        relation_scores: (R,) float32.
        image_size: Height and width in pixels.
        id2label: Names of classes.
        id2predicate: Names of predicates.
        predicate_distributions: (R, P) float32 score of every predicate, where known.
        masks: (E, height, width) boolean, where known.

    Raises:
        ValueError: If shapes disagree, a number is not finite or an index is out of range.
    """

    boxes_xyxy: FloatArray
    labels: IntArray
    scores: FloatArray
    relations: IntArray
    relation_scores: FloatArray
    image_size: tuple[int, int]
    id2label: Mapping[int, str] | None = None
    id2predicate: Mapping[int, str] | None = None
    predicate_distributions: FloatArray | None = None
    masks: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        for arrays in (_ENTITY_ARRAYS, _RELATION_ARRAYS):
            lengths = {name: self._convert(name, columns) for name, columns in arrays.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"These must have one length, got {lengths}.")
        height, width = (int(side) for side in self.image_size)
        object.__setattr__(self, "image_size", (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"`image_size` must be a positive height and width, got {self.image_size}."
            )
        self._convert_optional("predicate_distributions", np.float32, len(self.relations))
        self._convert_optional("masks", np.bool_, len(self.labels))
        self._check_values()

    @classmethod
    def empty(cls, image_size: tuple[int, int], **names: Any) -> "SceneGraph":
        """Return a graph without entities; `names` are `id2label` and `id2predicate`."""
        return cls(
            np.zeros((0, 4), dtype=np.float32),
            np.zeros(0, dtype=np.int64),
            np.zeros(0, dtype=np.float32),
            np.zeros((0, 3), dtype=np.int64),
            np.zeros(0, dtype=np.float32),
            image_size,
            **names,
        )

    @property
    def num_entities(self) -> int:
        """Number of entities."""
        return len(self.labels)

    @property
    def num_relations(self) -> int:
        """Number of relations."""
        return len(self.relations)

    def entity_name(self, index: int) -> str:
        """Return the class name of an entity, or its number where names are not known."""
        label = int(self.labels[index])
        return str(label) if self.id2label is None else self.id2label[label]

    def predicate_name(self, predicate: int) -> str:
        """Return the name of a predicate, or its number where names are not known."""
        return str(predicate) if self.id2predicate is None else self.id2predicate[int(predicate)]

    def triplets(self) -> list[Triplet]:
        """Return the relations in words, best first."""
        return [
            Triplet(
                self.entity_name(subject),
                self.predicate_name(predicate),
                self.entity_name(object_),
                float(score),
            )
            for (subject, object_, predicate), score in zip(
                self.relations.tolist(), self.relation_scores, strict=True
            )
        ]

    def top(self, count: int) -> "SceneGraph":
        """Return the best relations, and of the entities only those that take part."""
        relations = self.relations[:count]
        used, positions = np.unique(relations[:, :2], return_inverse=True)
        return replace(
            self,
            boxes_xyxy=self.boxes_xyxy[used],
            labels=self.labels[used],
            scores=self.scores[used],
            relations=np.column_stack((positions.reshape(-1, 2), relations[:, 2])),
            relation_scores=self.relation_scores[:count],
            predicate_distributions=_head(self.predicate_distributions, slice(count)),
            masks=_head(self.masks, used),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, texts and lists, fit for JSON."""
        graph: dict[str, Any] = {
            "image": {"height": self.image_size[0], "width": self.image_size[1]},
            "entities": [
                {
                    "id": index,
                    "label": int(self.labels[index]),
                    "name": self.entity_name(index),
                    "score": round(float(self.scores[index]), 6),
                    "box": [round(float(value), 3) for value in self.boxes_xyxy[index]],
                }
                for index in range(self.num_entities)
            ],
            "relations": [
                {
                    "subject": subject,
                    "predicate": self.predicate_name(predicate),
                    "predicate_id": predicate,
                    "object": object_,
                    "score": round(float(score), 6),
                }
                for (subject, object_, predicate), score in zip(
                    self.relations.tolist(), self.relation_scores, strict=True
                )
            ],
        }
        for field in ("id2label", "id2predicate"):
            names = getattr(self, field)
            if names is not None:
                graph[field] = {str(index): name for index, name in names.items()}
        if self.predicate_distributions is not None:
            graph["predicate_distributions"] = self.predicate_distributions.round(6).tolist()
        if self.masks is not None:
            graph["masks"] = [_run_lengths(mask) for mask in self.masks]
        return graph

    @classmethod
    def from_dict(cls, graph: Mapping[str, Any]) -> "SceneGraph":
        """Make a graph of what `to_dict` returns.

        Raises:
            ValueError: If an entry is missing or wrong.
        """
        try:
            size = (graph["image"]["height"], graph["image"]["width"])
            entities, relations = graph["entities"], graph["relations"]
            columns: dict[str, Any] = {
                "boxes_xyxy": [entity["box"] for entity in entities],
                "labels": [entity["label"] for entity in entities],
                "scores": [entity["score"] for entity in entities],
                "relations": [
                    [row["subject"], row["object"], row["predicate_id"]] for row in relations
                ],
                "relation_scores": [row["score"] for row in relations],
            }
            names: dict[str, Any] = {
                field: {int(index): name for index, name in graph[field].items()}
                for field in ("id2label", "id2predicate")
                if graph.get(field) is not None
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"This is not a scene graph: entry {error} is missing or of a wrong type. "
                "Pass what `SceneGraph.to_dict` returns."
            ) from error
        masks = graph.get("masks")
        return cls(
            **columns,
            image_size=size,
            **names,
            predicate_distributions=graph.get("predicate_distributions"),
            masks=None if masks is None else np.stack([_mask(runs, size) for runs in masks]),
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the graph as JSON, and write it to a file if one is named."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> "SceneGraph":
        """Read a graph from JSON text or, if `source` is a Path, from a file.

        Raises:
            ValueError: If it is not the JSON of a graph.
        """
        text = source.read_text() if isinstance(source, Path) else source
        try:
            graph = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is not JSON ({error}); pass a Path to read a file.") from error
        if not isinstance(graph, dict):
            raise ValueError(f"The JSON of a scene graph is an object, got {type(graph).__name__}.")
        return cls.from_dict(graph)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SceneGraph):
            return NotImplemented
        return all(
            np.array_equal(own, others) if isinstance(own, np.ndarray) else own == others
            for own, others in (
                (getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        best = ", ".join(
            f"{triplet.subject} {triplet.predicate} {triplet.object} {triplet.score:.2f}"
            for triplet in self.top(3).triplets()
        )
        more = ", ..." if self.num_relations > 3 else ""  # noqa: PLR2004
        counts = f"{self.num_entities} entities, {self.num_relations} relations"
        return f"SceneGraph({counts}: {best}{more})" if best else f"SceneGraph({counts})"

    def _convert(self, name: str, columns: int | None) -> int:
        """Make a field an array of its type that cannot be written to, and return its length."""
        kind = np.int64 if name in _INTEGER_ARRAYS else np.float32
        array: NDArray[Any] = np.array(getattr(self, name), dtype=kind)
        if columns is not None and array.size == 0:
            array = array.reshape(-1, columns)
        if array.ndim != (1 if columns is None else 2) or (columns and array.shape[1] != columns):
            expected = "(n,)" if columns is None else f"(n, {columns})"
            raise ValueError(f"`{name}` must have shape {expected}, got {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity; check the model.")
        array.flags.writeable = False
        object.__setattr__(self, name, array)
        return len(array)

    def _convert_optional(self, name: str, kind: type, length: int) -> None:
        if getattr(self, name) is None:
            return
        array: NDArray[Any] = np.array(getattr(self, name), dtype=kind)
        if len(array) != length:
            raise ValueError(f"`{name}` must have {length} rows, got {len(array)}.")
        if not np.isfinite(array).all():
            raise ValueError(f"`{name}` must be finite, got NaN or infinity; check the model.")
        array.flags.writeable = False
        object.__setattr__(self, name, array)

    def _check_values(self) -> None:
        if (self.boxes_xyxy[:, 2:] < self.boxes_xyxy[:, :2]).any():
            raise ValueError("`boxes_xyxy` must have x2 >= x1 and y2 >= y1; is it another format?")
        _check_indices("relations", self.relations[:, :2], range(self.num_entities), "an entity")
        for name, values, names in (
            ("labels", self.labels, self.id2label),
            ("relations", self.relations[:, 2], self.id2predicate),
        ):
            known = names if names is not None else range(np.iinfo(np.int64).max)
            _check_indices(name, values, known, "a known class")


def _check_indices(name: str, values: IntArray, known: Any, meaning: str) -> None:
    wrong = [value for value in np.unique(values).tolist() if value not in known]
    if wrong:
        raise ValueError(f"`{name}` holds {wrong[0]}, which is not the number of {meaning}.")


def _head(array: NDArray[Any] | None, rows: Any) -> NDArray[Any] | None:
    return None if array is None else array[rows]


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs row by row, the first of False."""
    flat = np.concatenate(([False], mask.ravel(), [not mask.ravel()[-1]]))
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(length) for length in np.diff(np.concatenate(([0], changes)))]


def _mask(runs: list[int], size: tuple[int, int]) -> NDArray[np.bool_]:
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size)
