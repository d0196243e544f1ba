"""The scores of the Open Images visual relationship challenge, gathered image by image.

B images of a batch, K predicted triplets that count, R annotated triplets, N candidates: pairs of a
predicted and an annotated triplet of one image with the same three classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .entity_overlap import BoolArray, FloatArray, IntArray, box_overlap
from .evaluation_protocols import Overlap
from .graph_batch import (
    GraphBatch,
    find_equal,
    join_graphs,
    triplet_keys,
    triplet_probabilities,
)
from .recall import BATCH_IMAGES, pair_graphs
from .recall_report import Vocabulary
from .triplet_matching import best_cells, check_image_sizes
from .triplet_precision import average_precision


# Of the weighted score; they add up to 1.
RECALL_WEIGHT, RELATION_WEIGHT, PHRASE_WEIGHT = 0.2, 0.4, 0.4
RECALL_TOP_K = 50
# Relations of an image that count, and predicates that each of them says.
PREDICTIONS, PREDICATES_OF_RELATION = 100, 2
IOU_THRESHOLD = 0.5


@dataclass(frozen=True)
class OpenImagesProtocol:
    """What evaluations of Open Images disagree about.

    Args:
        name: For reports.
        recall_overlap: Kind of overlap of R@50, see `RecallProtocol.overlap`.
        precision_overlap: Kind of overlap of the precisions.
        least_score: Predictions must exceed it.
        early_precision: See `average_precision`.
    """

    name: str
    recall_overlap: Overlap = "exact"
    precision_overlap: Overlap = "exact"
    least_score: float = -math.inf
    early_precision: bool = False


OPEN_IMAGES_PROTOCOLS: Mapping[str, OpenImagesProtocol] = MappingProxyType(
    {
        "strict": OpenImagesProtocol("strict"),
        # naver-ai/egtr, `oi_eval.py` and `ap_eval_rel.py`.
        "egtr": OpenImagesProtocol("egtr", "pixels", "inflated", least_score=1e-5),
        # Scarecrow0/SGTR, `sgg_oi_evaluation.py`.
        "as_emitted": OpenImagesProtocol(
            "as_emitted", "pixels", "pixels", least_score=0.0, early_precision=True
        ),
    }
)


class OpenImagesScore:
    """micro R@50, weighted mean average precision of relations and of phrases, weighted score.

    Where predictions know the probabilities of all predicates, each relation says its two
    likeliest, and the best 100 by subject score x object score x probability count; else the
    relations do as they are, by their scores. A predicted triplet finds an annotated one of the
    same three classes if both boxes (relation), or the boxes around both (phrase), overlap by more
    than one half; each annotated triplet is found once. Precision averages over predicates,
    weighted by how often they are annotated. Of equal scores, those that find nothing come first.

    Args:
        protocol: "strict", "egtr" or "as_emitted".
        id2predicate: Names for the report.

    Raises:
        ValueError: If there is no such protocol.
    """

    def __init__(
        self, protocol: str = "strict", id2predicate: Mapping[int, str] | None = None
    ) -> None:
        if protocol not in OPEN_IMAGES_PROTOCOLS:
            raise ValueError(
                f"`protocol` must be one of {', '.join(OPEN_IMAGES_PROTOCOLS)} for Open Images, "
                f"got {protocol!r}."
            )
        self.protocol = OPEN_IMAGES_PROTOCOLS[protocol]
        self.vocabulary = Vocabulary(names=id2predicate)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        names = ("predicates", "scores", "relation_hits", "phrase_hits", "annotated", "is_found")
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}

    def update(self, predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]) -> None:
        """Add images.

        Args:
            predictions: One graph an image.
            references: The annotated graphs of the same images in the same order.

        Raises:
            ValueError: If the lengths or the image sizes differ.
        """
        pairs = pair_graphs(predictions, references)
        for prediction, reference in pairs:
            check_image_sizes(prediction, reference)
        for start in range(0, len(pairs), BATCH_IMAGES):
            part = slice(start, start + BATCH_IMAGES)
            self._add(join_graphs(predictions[part]), join_graphs(references[part]))

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        state = {}
        for name, parts in self._parts.items():
            state[name] = np.concatenate(parts) if parts else np.zeros(0)
            self._parts[name] = [state[name]]
        return state

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what the `state_dict` of another process has gathered."""
        for name, parts in self._parts.items():
            parts.append(state[name])

    def compute(self) -> dict[str, Any]:
        """Return the scores of all images so far.

        Returns:
            "micro_R@50", "wmAP_rel", "wmAP_phr" and "score_wtd" in [0, 1], "per_predicate":
            {"AP_rel" and "AP_phr": {predicate: precision}} of the annotated predicates, "protocol",
            "num_relations" and "num_predicates_annotated".
        """
        state = self.state_dict()
        annotated, counts = np.unique(state["annotated"], return_counts=True)
        num_relations = int(counts.sum())
        recall = int(state["is_found"].sum()) / num_relations if num_relations else math.nan
        report: dict[str, Any] = {f"micro_R@{RECALL_TOP_K}": recall}
        per_predicate = {}
        for hits, short in (("relation_hits", "rel"), ("phrase_hits", "phr")):
            precisions = [
                self._precision(state, hits, predicate, count)
                for predicate, count in zip(annotated.tolist(), counts.tolist(), strict=True)
            ]
            weighted = math.fsum(np.multiply(precisions, counts))
            report[f"wmAP_{short}"] = weighted / num_relations if num_relations else math.nan
            per_predicate[f"AP_{short}"] = {
                self.vocabulary.name(int(predicate)): value
                for predicate, value in zip(annotated, precisions, strict=True)
            }
        report["score_wtd"] = (
            RECALL_WEIGHT * recall
            + RELATION_WEIGHT * report["wmAP_rel"]
            + PHRASE_WEIGHT * report["wmAP_phr"]
        )
        return report | {
            "per_predicate": per_predicate,
            "protocol": asdict(self.protocol),
            "num_relations": num_relations,
            "num_predicates_annotated": len(annotated),
        }

    def _precision(
        self, state: Mapping[str, NDArray[Any]], hits: str, predicate: int, num_annotated: int
    ) -> float:
        is_chosen = state["predicates"] == predicate
        is_hit, scores = state[hits][is_chosen], state["scores"][is_chosen]
        found = np.cumsum(is_hit[np.lexsort((is_hit, -scores))])
        precision = found / np.arange(1, len(found) + 1)
        return average_precision(
            precision, found / num_annotated, early=self.protocol.early_precision
        )

    def _add(self, predicted: GraphBatch, annotated: GraphBatch) -> None:
        said = _best_predictions(predicted, self.protocol.least_score)
        candidates = _candidates(predicted, annotated, said)
        values = {
            "predicates": said.predicates,
            "scores": said.scores,
            "annotated": annotated.relations[:, 2],
            "is_found": _is_found(candidates, said, annotated, self.protocol.recall_overlap),
        }
        for name, is_phrase in (("relation_hits", False), ("phrase_hits", True)):
            overlap = candidates.overlap(self.protocol.precision_overlap, is_phrase=is_phrase)
            values[name] = _hits(candidates, overlap, said)
        for name, value in values.items():
            self._parts[name].append(value)


class _Said(NamedTuple):
    """Predicted triplets that count, best first within their image."""

    rows: IntArray
    """(K,) relations of the batch."""
    predicates: IntArray
    """(K,)."""
    scores: FloatArray
    """(K,)."""
    places: IntArray
    """(K,) rank in the image, from 0."""


class _Candidates(NamedTuple):
    """Predicted and annotated triplets of the same classes."""

    annotated: IntArray
    """(N,) sorted."""
    said: IntArray
    """(N,) positions among the predictions that count."""
    boxes: tuple[NDArray[np.float32], NDArray[np.float32]]
    """(N, 2, 4) boxes of subject and object, predicted and annotated."""

    def overlap(self, kind: Overlap, *, is_phrase: bool) -> FloatArray:
        """(N,) overlap of the worse of both boxes, or of the boxes around both."""
        if not is_phrase:
            worse: FloatArray = box_overlap(*self.boxes, kind).min(axis=1)
            return worse
        around = [
            np.concatenate((boxes[..., :2].min(axis=1), boxes[..., 2:].max(axis=1)), axis=-1)
            for boxes in self.boxes
        ]
        return box_overlap(around[0], around[1], kind)


def _best_predictions(batch: GraphBatch, least_score: float) -> _Said:
    """Let every relation say its likeliest predicates, and keep the best of each image."""
    if batch.distributions is None:
        scores = batch.relation_scores.astype(np.float64)[:, None]
        predicates = batch.relations[:, 2:]
    else:
        predicates = _likeliest(batch.distributions)
        probabilities = np.take_along_axis(batch.distributions, predicates, axis=1)
        scores = triplet_probabilities(batch, probabilities)
    cells, places = best_cells(scores, batch.relation_counts, PREDICTIONS)
    is_enough = scores.ravel()[cells] > least_score
    cells = cells[is_enough]
    return _Said(
        cells // scores.shape[1],
        predicates.ravel()[cells],
        scores.ravel()[cells],
        places[is_enough],
    )


def _likeliest(distributions: NDArray[np.float32]) -> IntArray:
    """(K, 2) columns of the largest entries, or (K, 1) if there is only one column."""
    first = distributions.argmax(axis=1)
    if distributions.shape[1] < PREDICATES_OF_RELATION:
        return first[:, None]
    others = distributions.copy()
    others[np.arange(len(others)), first] = -np.inf
    return np.column_stack((first, others.argmax(axis=1)))


def _candidates(predicted: GraphBatch, annotated: GraphBatch, said: _Said) -> _Candidates:
    relations = predicted.relations[said.rows]
    keys, wanted = (
        triplet_keys(np.column_stack((images, batch.labels[rows[:, :2]])))
        for images, batch, rows in (
            (predicted.relation_images[said.rows], predicted, relations),
            (annotated.relation_images, annotated, annotated.relations),
        )
    )
    positions, predictions = find_equal(keys, wanted)
    is_same = said.predicates[predictions] == annotated.relations[positions, 2]
    positions, predictions = positions[is_same], predictions[is_same]
    boxes = (
        predicted.boxes[relations[predictions, :2]],
        annotated.boxes[annotated.relations[positions, :2]],
    )
    return _Candidates(positions, predictions, boxes)


def _is_found(
    candidates: _Candidates, said: _Said, annotated: GraphBatch, kind: Overlap
) -> BoolArray:
    """(R,) whether each annotated triplet is among the first 50; here half an overlap is enough."""
    is_hit = candidates.overlap(kind, is_phrase=False) >= IOU_THRESHOLD
    is_hit &= said.places[candidates.said] < RECALL_TOP_K
    is_found = np.zeros(len(annotated.relations), dtype=np.bool_)
    is_found[candidates.annotated[is_hit]] = True
    return is_found


def _hits(candidates: _Candidates, overlap: FloatArray, said: _Said) -> BoolArray:
    """(K,) whether each prediction is the first to find its annotated triplet.

    The annotated triplet of a prediction is the one it overlaps most, found before or not.
    """
    is_hit = np.zeros(len(said.rows), dtype=np.bool_)
    # By prediction; of its annotated triplets the one with most overlap first, equal ones in order.
    order = np.lexsort((-overlap, candidates.said))
    predictions, wanted = candidates.said[order], candidates.annotated[order]
    is_best = np.ones(len(order), dtype=np.bool_)
    is_best[1:] = predictions[1:] != predictions[:-1]
    is_best &= overlap[order] > IOU_THRESHOLD
    predictions, wanted = predictions[is_best], wanted[is_best]
    # Predictions of an image are sorted by score, and `unique` returns the first of each.
    is_hit[predictions[np.unique(wanted, return_index=True)[1]]] = True
    return is_hit
