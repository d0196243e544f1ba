"""Recall of scene graphs, gathered image by image.

I images, R annotated triplets of all images, P predicates.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .triplet_matching import (
    MISSED,
    BoolArray,
    IntArray,
    check_iou_threshold,
    rank_of_first_hit,
    reachable_triplets,
)


@dataclass(frozen=True)
class RecallProtocol:
    """What the published evaluators and a clean one disagree about.

    Attributes:
        iou_threshold: Least overlap of subject and of object boxes, inclusive, (0, 1].
        add_one_pixel: Count the last pixel as part of a box.
        skip_images_without_predictions: Leave such images out instead of counting them as 0, which
            raises the mean.
        average_all_predicates: Count predicates that are never annotated as 0 in the mean recall
            instead of leaving them out; needs `num_predicates`.
    """

    iou_threshold: float = 0.5
    add_one_pixel: bool = False
    skip_images_without_predictions: bool = False
    average_all_predicates: bool = False

    def __post_init__(self) -> None:
        check_iou_threshold(self.iou_threshold)


CLEAN_PROTOCOL = RecallProtocol()
# Scene-Graph-Benchmark.pytorch and its descendants: `vg_eval.py:300`, `sgg_vg_evaluation.py:887`.
SGTR_PROTOCOL = RecallProtocol(
    add_one_pixel=True, skip_images_without_predictions=True, average_all_predicates=True
)
PROTOCOLS: Mapping[str, RecallProtocol] = {"clean": CLEAN_PROTOCOL, "sgtr": SGTR_PROTOCOL}


class SceneGraphRecall:
    """R@K, mR@K, F@K, recall per predicate, of pairs and, on request, of unseen triplets.

    Keeps one rank and one predicate for each annotated triplet, never graphs or boxes. The
    predictions are taken as they are: give graphs with one predicate a pair for the recall under
    graph constraint, graphs with several for the unconstrained one.

    Args:
        top_k: Numbers of predictions looked at.
        protocol: "clean", "sgtr" (as in the published tables) or a `RecallProtocol`.
        num_predicates: P; needed if the protocol averages over all predicates.
        id2predicate: Names for the report, where a predicate without name is its number.
        seen_triplets: (S, 3) classes of subject and object, and predicate, of all triplets in the
            training annotations (`distinct_triplets`); gives the zero-shot recall zR@K.

    Raises:
        ValueError: If `top_k` is empty or not positive, `protocol` is unknown, or `num_predicates`
            is missing.

    Example:
        ```python
        metric = SceneGraphRecall(top_k=(20, 50))
        metric.update(predictions, references)
        metric.compute()["R@50"]
        ```
    """

    def __init__(
        self,
        top_k: Sequence[int] = (20, 50, 100),
        protocol: str | RecallProtocol = "clean",
        num_predicates: int | None = None,
        id2predicate: Mapping[int, str] | None = None,
        seen_triplets: IntArray | None = None,
    ) -> None:
        if not top_k or min(top_k) < 1:
            raise ValueError(f"`top_k` must hold positive numbers, got {tuple(top_k)}.")
        self.top_k = tuple(top_k)
        self.protocol = _resolve_protocol(protocol)
        if self.protocol.average_all_predicates and num_predicates is None:
            raise ValueError(
                "`num_predicates` is needed by a protocol that averages over all predicates; "
                'pass it or take `protocol="clean"`.'
            )
        self.num_predicates = num_predicates
        self.id2predicate = dict(id2predicate or {})
        self._seen = None if seen_triplets is None else _triplet_keys(seen_triplets)
        self._records = _ImageRecords(("pair_ranks", "is_unseen"))

    def update(self, predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]) -> None:
        """Add images.

        Args:
            predictions: One graph an image, triplets best first.
            references: The annotated graphs of the same images in the same order.

        Raises:
            ValueError: If the lengths or the image sizes differ, or a predicate is not below
                `num_predicates`.
        """
        for prediction, reference in _pairs(predictions, references):
            _check_predicates(reference, self.num_predicates)
            ranks, pair_ranks = (
                rank_of_first_hit(
                    prediction,
                    reference,
                    self.protocol.iou_threshold,
                    add_one_pixel=self.protocol.add_one_pixel,
                    any_predicate=any_predicate,
                )
                for any_predicate in (False, True)
            )
            is_unseen = np.zeros(len(ranks), dtype=np.int64)
            if self._seen is not None:
                is_unseen = (
                    ~np.isin(_triplet_keys(labelled_triplets(reference)), self._seen)
                ).astype(np.int64)
            self._records.add(
                ranks,
                reference.relations[:, 2],
                len(prediction.relations),
                pair_ranks=pair_ranks,
                is_unseen=is_unseen.astype(np.int64),
            )

    def state_dict(self) -> dict[str, IntArray]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        return self._records.state_dict()

    def merge_state(self, state: Mapping[str, IntArray]) -> None:
        """Add what the `state_dict` of another process has gathered.

        An image that two processes have seen counts twice: do not pad the last batch.
        """
        self._records.merge_state(state)

    def merge(self, other: "SceneGraphRecall") -> None:
        """Add what another metric has gathered.

        Raises:
            ValueError: If the protocols differ.
        """
        if other.protocol != self.protocol:
            raise ValueError(
                f"`other.protocol` must be {self.protocol} to be merged, got {other.protocol}."
            )
        self.merge_state(other.state_dict())

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all images so far.

        Returns:
            "R@K": mean over images of the share of their triplets found; "mR@K": the mean over
            images with a predicate of the share found of it, averaged over predicates; "F@K":
            harmonic mean of both; "pair_R@K": as "R@K", whatever predicate the pair was given;
            "micro_R@K": share of all triplets, whatever their image; "zR@K": "R@K" of the triplets
            that were never seen, over images that have any; "per_predicate": {"R@K": {predicate:
            recall}} of the annotated ones; and the counts "num_images" (averaged over),
            "num_images_without_relations"
            (skipped), "num_images_without_predictions" (skipped or 0, see "protocol"),
            "num_predicates" (averaged over), "num_predicates_annotated", "num_relations". Metrics
            are NaN if no image is left.
        """
        records = self._records.gather(self.protocol.skip_images_without_predictions)
        num_averaged = self.num_predicates if self.protocol.average_all_predicates else None
        report: dict[str, Any] = {}
        per_predicate: dict[str, dict[str, float]] = {}
        for k in self.top_k:
            is_found = (records.ranks != MISSED) & (records.ranks < k)
            recall, by_predicate = _average(is_found, records)
            mean_recall = _mean_of_predicates(by_predicate, num_averaged)
            report[f"R@{k}"] = recall
            report[f"mR@{k}"] = mean_recall
            report[f"F@{k}"] = harmonic_mean(recall, mean_recall)
            report[f"pair_R@{k}"] = _recall_of(records, records.others["pair_ranks"], k)
            report[f"micro_R@{k}"] = float(is_found.mean()) if len(is_found) else float("nan")
            if self._seen is not None:
                unseen = records.where(records.others["is_unseen"] == 1)
                report[f"zR@{k}"] = _recall_of(unseen, unseen.ranks, k)
            per_predicate[f"R@{k}"] = _with_names(by_predicate, self.id2predicate)
        num_annotated = len(np.unique(records.predicates))
        return {
            **report,
            "per_predicate": per_predicate,
            **self._records.count_images(records),
            "num_relations": len(records.ranks),
            "num_predicates": num_annotated if num_averaged is None else num_averaged,
            "num_predicates_annotated": num_annotated,
        }


class DetectorCeiling:
    """The recall that a perfect relation head would reach on given detections.

    Args:
        iou_threshold: Least overlap, inclusive, (0, 1].
        id2predicate: Names for the report.

    Raises:
        ValueError: If `iou_threshold` is not in (0, 1].
    """

    def __init__(
        self, iou_threshold: float = 0.5, id2predicate: Mapping[int, str] | None = None
    ) -> None:
        check_iou_threshold(iou_threshold)
        self.iou_threshold = iou_threshold
        self.id2predicate = dict(id2predicate or {})
        self._records = _ImageRecords()

    def update(self, entities: Sequence[SceneGraph], references: Sequence[SceneGraph]) -> None:
        """Add images; of `entities` only boxes and labels are looked at.

        Raises:
            ValueError: If the lengths differ.
        """
        for detected, reference in _pairs(entities, references):
            is_reachable = reachable_triplets(detected, reference, self.iou_threshold)
            ranks = np.where(is_reachable, 0, MISSED)
            self._records.add(ranks, reference.relations[:, 2], len(detected.labels))

    def state_dict(self) -> dict[str, IntArray]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        return self._records.state_dict()

    def merge_state(self, state: Mapping[str, IntArray]) -> None:
        """Add what the `state_dict` of another process has gathered."""
        self._records.merge_state(state)

    def compute(self) -> dict[str, Any]:
        """Return "R", "mR", "per_predicate" and the image counts, as `SceneGraphRecall` does."""
        records = self._records.gather(skip_without_predictions=False)
        recall, by_predicate = _average(records.ranks != MISSED, records)
        return {
            "R": recall,
            "mR": _mean_of_predicates(by_predicate, None),
            "per_predicate": _with_names(by_predicate, self.id2predicate),
            **self._records.count_images(records),
        }


def detector_ceiling(
    entities: Sequence[SceneGraph], references: Sequence[SceneGraph], iou_threshold: float = 0.5
) -> dict[str, Any]:
    """Compute `DetectorCeiling` of all images at once."""
    ceiling = DetectorCeiling(iou_threshold)
    ceiling.update(entities, references)
    return ceiling.compute()


def harmonic_mean(first: float, second: float) -> float:
    """Return the harmonic mean of two numbers that are not negative; 0 if both are 0."""
    total = first + second
    return 2 * first * second / total if total else 0.0


def distinct_triplets(references: Iterable[SceneGraph]) -> IntArray:
    """Return the triplets (S, 3) of subject class, object class and predicate that occur."""
    rows = [np.unique(labelled_triplets(reference), axis=0) for reference in references]
    return np.unique(np.concatenate([*rows, np.zeros((0, 3), dtype=np.int64)]), axis=0)


def labelled_triplets(graph: SceneGraph) -> IntArray:
    """Return the relations (R, 3) of a graph as subject class, object class and predicate."""
    ends = graph.labels[graph.relations[:, :2]]
    return np.concatenate((ends, graph.relations[:, 2:]), axis=1).astype(np.int64)


def without_constraint(graph: SceneGraph, top_k: int = 100) -> SceneGraph:
    """Let every relation say each predicate, and keep the best (ng-R in the literature).

    The score of a row is subject score x object score x probability of the predicate.

    Args:
        graph: With `predicate_distributions`.
        top_k: Rows to keep.

    Raises:
        ValueError: If the graph has no distributions.
    """
    if graph.predicate_distributions is None:
        raise ValueError("`graph.predicate_distributions` are needed, this graph has none.")
    pairs = graph.relations[:, :2]
    scores = graph.scores[pairs].prod(axis=1)[:, None] * graph.predicate_distributions
    kept = min(top_k, scores.size)
    best = np.argsort(-scores, axis=None, kind="stable")[:kept]
    rows, predicates = np.unravel_index(best, scores.shape)
    return replace(
        graph,
        relations=np.column_stack((pairs[rows], predicates)).astype(np.int64),
        relation_scores=scores.ravel()[best],
        predicate_distributions=graph.predicate_distributions[rows],
    )


@dataclass(frozen=True)
class _Records:
    """Annotated triplets of the images averaged over; `images` counts up from 0 without gaps."""

    ranks: IntArray
    predicates: IntArray
    images: IntArray
    num_images: int
    others: Mapping[str, IntArray]

    def where(self, is_kept: BoolArray) -> "_Records":
        """Keep some triplets, and the images that have any of them."""
        images = np.unique(self.images[is_kept], return_inverse=True)[1]
        return _Records(
            self.ranks[is_kept],
            self.predicates[is_kept],
            images,
            int(images.max()) + 1 if len(images) else 0,
            {name: values[is_kept] for name, values in self.others.items()},
        )


class _ImageRecords:
    """Rank and predicate of every annotated triplet, and two counts of every image.

    Args:
        others: Names of further numbers of every triplet.
    """

    def __init__(self, others: tuple[str, ...] = ()) -> None:
        self._others = others
        names = ("ranks", "predicates", *others, "relations_per_image", "predictions_per_image")
        self._parts: dict[str, list[IntArray]] = {name: [] for name in names}

    def add(
        self, ranks: IntArray, predicates: IntArray, num_predictions: int, **others: IntArray
    ) -> None:
        self.merge_state(
            others
            | {
                "ranks": ranks,
                "predicates": predicates,
                "relations_per_image": np.array([len(ranks)]),
                "predictions_per_image": np.array([num_predictions]),
            }
        )

    def state_dict(self) -> dict[str, IntArray]:
        state = {}
        for name, parts in self._parts.items():
            state[name] = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
            # One array from now on, so that asking often does not cost more each time.
            self._parts[name] = [state[name]]
        return state

    def merge_state(self, state: Mapping[str, IntArray]) -> None:
        for name, parts in self._parts.items():
            parts.append(np.array(state[name], dtype=np.int64))

    def gather(self, skip_without_predictions: bool) -> _Records:
        state = self.state_dict()
        is_used = state["relations_per_image"] > 0
        if skip_without_predictions:
            is_used &= state["predictions_per_image"] > 0
        # New numbers for the images used, repeated for each of their triplets.
        numbers = np.cumsum(is_used) - 1
        is_triplet_used = np.repeat(is_used, state["relations_per_image"])
        return _Records(
            ranks=state["ranks"][is_triplet_used],
            predicates=state["predicates"][is_triplet_used],
            images=np.repeat(numbers, state["relations_per_image"])[is_triplet_used],
            num_images=int(is_used.sum()),
            others={name: state[name][is_triplet_used] for name in self._others},
        )

    def count_images(self, records: _Records) -> dict[str, int]:
        state = self.state_dict()
        has_relations = state["relations_per_image"] > 0
        has_predictions = state["predictions_per_image"] > 0
        return {
            "num_images": records.num_images,
            "num_images_without_relations": int((~has_relations).sum()),
            "num_images_without_predictions": int((has_relations & ~has_predictions).sum()),
        }


def _recall_of(records: _Records, ranks: IntArray, k: int) -> float:
    """Mean over images of the share of triplets whose rank is below k."""
    if not records.num_images:
        return float("nan")
    is_found = (ranks != MISSED) & (ranks < k)
    return float(_share_of_groups(is_found, records.images).mean())


def _triplet_keys(triplets: IntArray) -> IntArray:
    """One number for each row of (S, 3) small numbers."""
    subject, object_, predicate = np.asarray(triplets, dtype=np.int64).reshape(-1, 3).T
    keys: IntArray = (subject << 40) | (object_ << 20) | predicate
    return keys


def _average(is_found: BoolArray, records: _Records) -> tuple[float, dict[int, float]]:
    """Return the mean over images, and for each annotated predicate the mean over its images."""
    if not records.num_images:
        return float("nan"), {}
    recall = _share_of_groups(is_found, records.images).mean()
    predicates, predicate_of_triplet = np.unique(records.predicates, return_inverse=True)
    # One group for each image and predicate that occur together.
    keys, group_of_triplet = np.unique(
        records.images * len(predicates) + predicate_of_triplet, return_inverse=True
    )
    shares = _share_of_groups(is_found, group_of_triplet)
    predicate_of_group = keys % len(predicates)
    means = np.bincount(predicate_of_group, weights=shares) / np.bincount(predicate_of_group)
    return float(recall), dict(zip(predicates.tolist(), means.tolist(), strict=True))


def _share_of_groups(is_found: BoolArray, groups: IntArray) -> NDArray[np.float64]:
    """Return the share of found members of groups 0, 1, ..., none of which is empty."""
    shares: NDArray[np.float64] = np.bincount(groups, weights=is_found) / np.bincount(groups)
    return shares


def _mean_of_predicates(by_predicate: Mapping[int, float], num_predicates: int | None) -> float:
    if not by_predicate:
        return float("nan")
    return sum(by_predicate.values()) / (num_predicates or len(by_predicate))


def _with_names(by_predicate: Mapping[int, float], names: Mapping[int, str]) -> dict[str, float]:
    return {names.get(number, str(number)): value for number, value in by_predicate.items()}


def _pairs(
    predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]
) -> list[tuple[SceneGraph, SceneGraph]]:
    if len(predictions) != len(references):
        raise ValueError(
            "`predictions` and `references` must hold one graph for each image, got "
            f"{len(predictions)} and {len(references)}."
        )
    return list(zip(predictions, references, strict=True))


def _check_predicates(reference: SceneGraph, num_predicates: int | None) -> None:
    if num_predicates is None or not len(reference.relations):
        return
    largest = int(reference.relations[:, 2].max())
    if largest >= num_predicates:
        raise ValueError(
            f"`num_predicates` is {num_predicates}, but a reference has predicate {largest}; "
            "predicates count from 0."
        )


def _resolve_protocol(protocol: str | RecallProtocol) -> RecallProtocol:
    if isinstance(protocol, RecallProtocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"`protocol` must be one of {sorted(PROTOCOLS)} or a RecallProtocol, got {protocol!r}."
        )
    return PROTOCOLS[protocol]
