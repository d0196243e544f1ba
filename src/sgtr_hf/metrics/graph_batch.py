"""Scene graphs of several images as flat arrays, so that no metric loops over images.

B images of a batch, E entities, K relations of all of them, P predicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .entity_overlap import FloatArray, IntArray
from .evaluation_protocols import Mode


# Keys of labelled triplets are three numbers in one; what is larger would run into its neighbour.
_LABEL_BITS = 20
LABEL_LIMIT = 2**_LABEL_BITS


@dataclass(frozen=True)
class GraphBatch:
    """The graphs of B images behind each other.

    Args:
        boxes: (E, 4) x1, y1, x2, y2 in pixels.
        labels: (E,).
        scores: (E,).
        relations: (K, 3) subject and object as rows of the arrays above, and predicate.
        relation_scores: (K,).
        entity_counts: (B,).
        relation_counts: (B,).
        distributions: (K, P) score of every predicate, where known.
    """

    boxes: NDArray[np.float32]
    labels: IntArray
    scores: NDArray[np.float32]
    relations: IntArray
    relation_scores: NDArray[np.float32]
    entity_counts: IntArray
    relation_counts: IntArray
    distributions: NDArray[np.float32] | None

    @property
    def relation_images(self) -> IntArray:
        """(K,) number of the image of each relation."""
        return np.repeat(np.arange(len(self.relation_counts)), self.relation_counts)

    def labelled_triplets(self) -> IntArray:
        """Return (K, 3) class of the subject, class of the object, and predicate."""
        ends = self.labels[self.relations[:, :2]]
        return np.concatenate((ends, self.relations[:, 2:]), axis=1)


def join_graphs(graphs: Sequence[SceneGraph]) -> GraphBatch:
    """Put graphs behind each other.

    Distributions are known if every graph with relations has them.

    Raises:
        ValueError: If a class or a predicate is 2**20 or more.
    """
    entity_counts = np.array([graph.num_entities for graph in graphs], dtype=np.int64)
    relation_counts = np.array([graph.num_relations for graph in graphs], dtype=np.int64)
    relations = np.concatenate([graph.relations for graph in graphs])
    # The first row of an image's entities, added to subjects and objects.
    first_rows = np.repeat(np.cumsum(entity_counts) - entity_counts, relation_counts)
    relations[:, :2] += first_rows[:, None]
    labels = np.concatenate([graph.labels for graph in graphs])
    for name, values in (("labels", labels), ("relations", relations[:, 2])):
        if len(values) and values.max() >= LABEL_LIMIT:
            raise ValueError(f"`{name}` must be below {LABEL_LIMIT}, got {values.max()}.")
    return GraphBatch(
        boxes=np.concatenate([graph.boxes_xyxy for graph in graphs]),
        labels=labels,
        scores=np.concatenate([graph.scores for graph in graphs]),
        relations=relations,
        relation_scores=np.concatenate([graph.relation_scores for graph in graphs]),
        entity_counts=entity_counts,
        relation_counts=relation_counts,
        distributions=_join_distributions(graphs),
    )


def with_given_entities(prediction: SceneGraph, reference: SceneGraph, mode: Mode) -> SceneGraph:
    """Give a prediction the annotated entities, as the tasks of given entities do.

    Args:
        prediction: Its relations index the annotated entities.
        reference: The annotation.
        mode: "sgcls" takes the boxes and masks, "predcls" the classes too, with scores of 1;
            "sgdet" takes nothing.

    Raises:
        ValueError: If the numbers of entities differ.
    """
    if mode == "sgdet":
        return prediction
    if prediction.num_entities != reference.num_entities:
        raise ValueError(
            f"With `mode={mode!r}` a prediction has the annotated entities, in their order; it has "
            f"{prediction.num_entities}, annotated are {reference.num_entities}."
        )
    given = replace(prediction, boxes_xyxy=reference.boxes_xyxy, masks=reference.masks)
    if mode == "sgcls":
        return given
    scores = np.ones(reference.num_entities, dtype=np.float32)
    return replace(given, labels=reference.labels, scores=scores, id2label=reference.id2label)


def triplet_keys(triplets: IntArray) -> IntArray:
    """Return one number for each row of (..., 3) classes and predicates."""
    first, second, third = np.moveaxis(triplets, -1, 0)
    keys: IntArray = (first << (2 * _LABEL_BITS)) | (second << _LABEL_BITS) | third
    return keys


def find_equal(keys: IntArray, wanted: IntArray) -> tuple[IntArray, IntArray]:
    """Return all pairs of an entry of `wanted` and an equal entry of `keys`, by their positions.

    Sorted by the entries of `wanted`, and then by those of `keys`.
    """
    order = np.argsort(keys, kind="stable")
    low, high = (np.searchsorted(keys[order], wanted, side) for side in ("left", "right"))
    counts = high - low
    positions = np.repeat(np.arange(len(wanted)), counts)
    # 0, 1, ... within the equal ones of each entry.
    steps = np.arange(len(positions)) - np.repeat(np.cumsum(counts) - counts, counts)
    return positions, order[np.repeat(low, counts) + steps]


def triplet_probabilities(batch: GraphBatch, distributions: NDArray[np.float32]) -> FloatArray:
    """Return (K, P) subject score x object score x probability of the predicate."""
    ends = batch.scores[batch.relations[:, :2]].astype(np.float64)
    products: FloatArray = ends.prod(axis=1)[:, None] * distributions
    return products


def _join_distributions(graphs: Sequence[SceneGraph]) -> NDArray[np.float32] | None:
    parts = [graph.predicate_distributions for graph in graphs if graph.num_relations]
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    widths = {part.shape[1] for part in known}
    if len(widths) > 1:
        raise ValueError(
            f"`predicate_distributions` must have one column a predicate, got {sorted(widths)}."
        )
    return np.concatenate(known)
