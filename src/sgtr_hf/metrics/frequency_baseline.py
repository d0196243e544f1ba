"""The frequency baseline: relations guessed from the classes of the two entities alone.

C entity classes, P predicates, E entities of an image, K predicted triplets.
"""

import dataclasses
from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .entity_overlap import IntArray


FloatArray = NDArray[np.float64]


class FrequencyBaseline:
    """How often an ordered pair of entities of two classes has each predicate.

    Every relation model must be better than this on the same detections, or it has learnt nothing
    from the image. All ordered pairs of different entities of an image count, related or not, so
    that the frequency also ranks pairs by how likely they are related at all.

    Args:
        num_labels: C.
        num_predicates: P.

    Raises:
        ValueError: If a number is not positive.

    Source:
        FREQ of Zellers et al. (CVPR 2018), section 5.3; instead of their background class the
        denominator counts unrelated pairs, which is the same probability without smoothing.

    Example:
        ```python
        baseline = FrequencyBaseline(num_labels=150, num_predicates=50).fit(training_graphs)
        graph = baseline.predict(detections)
        ```
    """

    def __init__(self, num_labels: int, num_predicates: int) -> None:
        for name, number in (("num_labels", num_labels), ("num_predicates", num_predicates)):
            if number < 1:
                raise ValueError(f"`{name}` must be positive, got {number}.")
        self.triplet_counts: IntArray = np.zeros(
            (num_labels, num_labels, num_predicates), dtype=np.int64
        )
        self.pair_counts: IntArray = np.zeros((num_labels, num_labels), dtype=np.int64)

    def fit(self, graphs: Iterable[SceneGraph]) -> "FrequencyBaseline":
        """Count annotated training graphs, in addition to those counted before.

        Several annotations of one predicate for one pair of entities count once. Relations of an
        entity with itself are not counted, as they are never predicted.

        Args:
            graphs: Annotated graphs; may be a generator.

        Returns:
            This baseline.

        Raises:
            ValueError: If a label or a predicate is out of range.
        """
        for graph in graphs:
            self._check(graph)
            num_of_label = np.bincount(graph.labels, minlength=len(self.pair_counts))
            present = np.flatnonzero(num_of_label)
            self.pair_counts[np.ix_(present, present)] += np.outer(
                num_of_label[present], num_of_label[present]
            )
            # An entity makes no pair with itself.
            self.pair_counts[present, present] -= num_of_label[present]
            relations = np.unique(graph.relations.reshape(-1, 3), axis=0)
            relations = relations[relations[:, 0] != relations[:, 1]]
            subject_labels, object_labels = graph.labels[relations[:, :2]].T
            np.add.at(self.triplet_counts, (subject_labels, object_labels, relations[:, 2]), 1)
        return self

    def probabilities(self, subject_labels: IntArray, object_labels: IntArray) -> FloatArray:
        """Return how often pairs of these classes have each predicate.

        Args:
            subject_labels: (...) classes.
            object_labels: (...) classes.

        Returns:
            (..., P) in [0, 1]; 0 for classes never seen together.
        """
        pair_counts = np.maximum(self.pair_counts[subject_labels, object_labels], 1)
        frequencies: FloatArray = (
            self.triplet_counts[subject_labels, object_labels] / pair_counts[..., None]
        )
        return frequencies

    def predict(
        self, entities: SceneGraph, top_k: int = 100, *, graph_constraint: bool = True
    ) -> SceneGraph:
        """Guess the relations of detected or annotated entities.

        The score of a triplet is the score of its subject times that of its object times the
        frequency of the predicate. Triplets of score 0 are left out.

        Args:
            entities: E entities; their relations are replaced.
            top_k: Most triplets to return.
            graph_constraint: Only the most frequent predicate of each pair.

        Returns:
            The same entities with at most `top_k` triplets, best first; equal scores in the order
            of subject, object and predicate.

        Raises:
            ValueError: If a label is out of range or `top_k` is not positive.
        """
        if top_k < 1:
            raise ValueError(f"`top_k` must be positive, got {top_k}.")
        self._check(entities)
        num_entities = len(entities.labels)
        subjects, objects = np.nonzero(~np.eye(num_entities, dtype=np.bool_))
        # One row for each pair, one column for each predicate.
        scores = self.probabilities(entities.labels[subjects], entities.labels[objects])
        entity_scores = entities.scores.astype(np.float64)
        scores *= (entity_scores[subjects] * entity_scores[objects])[:, None]
        if graph_constraint:
            predicates = scores.argmax(axis=1)[:, None]
            scores = np.take_along_axis(scores, predicates, axis=1)
        else:
            predicates = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        pairs, columns = np.nonzero(scores)
        best = np.argsort(-scores[pairs, columns], kind="stable")[:top_k]
        pairs, columns = pairs[best], columns[best]
        relations = np.stack(
            (subjects[pairs], objects[pairs], predicates[pairs, columns]), axis=1
        ).astype(np.int64)
        return dataclasses.replace(
            entities,
            relations=relations,
            relation_scores=scores[pairs, columns].astype(np.float32),
            predicate_distributions=None,
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the counts as a NumPy archive (.npz)."""
        with Path(path).open("wb") as file:
            np.savez_compressed(
                file, triplet_counts=self.triplet_counts, pair_counts=self.pair_counts
            )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "FrequencyBaseline":
        """Read what `save` has written.

        Raises:
            FileNotFoundError: If there is no such file.
            KeyError: If the file is another archive.
        """
        with np.load(path) as archive:
            triplet_counts, pair_counts = archive["triplet_counts"], archive["pair_counts"]
        baseline = cls(num_labels=len(pair_counts), num_predicates=triplet_counts.shape[2])
        baseline.triplet_counts, baseline.pair_counts = triplet_counts, pair_counts
        return baseline

    def _check(self, graph: SceneGraph) -> None:
        num_labels, _, num_predicates = self.triplet_counts.shape
        fields = (
            ("labels", graph.labels, "num_labels", num_labels),
            ("relations", graph.relations[:, 2], "num_predicates", num_predicates),
        )
        for name, values, limit_name, limit in fields:
            if len(values) and (values.min() < 0 or values.max() >= limit):
                raise ValueError(
                    f"`{name}` of the graph reach from {values.min()} to {values.max()}, but "
                    f"`{limit_name}` of the baseline is {limit}; both must count from 0."
                )
