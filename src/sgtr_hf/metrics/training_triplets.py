"""What the training annotations hold: which triplets are unseen, and how rare the others are.

R annotated triplets to look up, S distinct triplets of the training annotations.
"""

from collections.abc import Iterable

import numpy as np

from ..scene_graph import SceneGraph
from .entity_overlap import BoolArray, IntArray
from .graph_batch import triplet_keys


class TrainingTriplets:
    """Triplets of classes in the training annotations.

    Args:
        triplets: (S, 3) distinct classes of subject and object, and predicate, all from 0.
        counts: (S,) how often each is annotated; None if that is not known.
        unseen: (U, 3) triplets that count as zero-shot, where a benchmark publishes their list;
            else all that are not among `triplets` do.

    Raises:
        ValueError: If lengths or shapes differ.
    """

    def __init__(
        self, triplets: IntArray, counts: IntArray | None = None, unseen: IntArray | None = None
    ) -> None:
        rows = _rows_of_three("triplets", triplets)
        if counts is not None and np.shape(counts) != (len(rows),):
            raise ValueError(
                f"`counts` must have one number for each of {len(rows)} triplets, got shape "
                f"{np.shape(counts)}."
            )
        keys = triplet_keys(rows)
        order = np.argsort(keys)
        self.has_counts = counts is not None
        # Sorted by key, so that looking up is a search.
        self._triplets, self._keys = rows[order], keys[order]
        self._counts = (np.ones(len(rows), dtype=np.int64) if counts is None else counts)[order]
        self._unseen_keys = (
            None if unseen is None else triplet_keys(_rows_of_three("unseen", unseen))
        )

    def count(self, triplets: IntArray) -> IntArray:
        """Return (R,) how often each triplet is in the training annotations."""
        keys = triplet_keys(triplets)
        if not len(self._keys):
            return np.zeros(len(keys), dtype=np.int64)
        positions = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[positions] == keys, self._counts[positions], 0)

    def is_unseen(self, triplets: IntArray) -> BoolArray:
        """Return (R,) which triplets count as zero-shot."""
        if self._unseen_keys is None:
            return self.count(triplets) == 0
        return np.isin(triplet_keys(triplets), self._unseen_keys)

    def predicate_counts(self, num_predicates: int) -> list[int]:
        """Return how often each predicate is annotated."""
        counts = np.bincount(self._triplets[:, 2], weights=self._counts, minlength=num_predicates)
        return [int(count) for count in counts]


def count_training_triplets(
    graphs: Iterable[SceneGraph], unseen: IntArray | None = None
) -> TrainingTriplets:
    """Count the triplets of annotated training graphs.

    Args:
        graphs: Read one at a time, so that they may come from a generator.
        unseen: See `TrainingTriplets`.
    """
    counts: dict[tuple[int, ...], int] = {}
    for graph in graphs:
        for row in map(tuple, labelled_triplets(graph).tolist()):
            counts[row] = counts.get(row, 0) + 1
    triplets = np.array(list(counts), dtype=np.int64)
    return TrainingTriplets(triplets, np.array(list(counts.values()), dtype=np.int64), unseen)


def labelled_triplets(graph: SceneGraph) -> IntArray:
    """Return the relations (R, 3) of a graph as subject class, object class and predicate."""
    ends = graph.labels[graph.relations[:, :2]]
    return np.concatenate((ends, graph.relations[:, 2:]), axis=1).astype(np.int64)


def _rows_of_three(name: str, values: IntArray) -> IntArray:
    rows = np.asarray(values, dtype=np.int64)
    if rows.size == 0:
        return rows.reshape(0, 3)
    if rows.shape[1:] != (3,):
        raise ValueError(f"`{name}` must have shape (n, 3), got {rows.shape}.")
    return rows
