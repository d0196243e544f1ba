"""The scores of the Open Images visual relationship challenge, gathered image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..boxes import box_iou
from ..scene_graph import SceneGraph
from .recall import SceneGraphRecall, labelled_triplets
from .triplet_matching import BoolArray, IntArray


FloatArray = NDArray[np.float64]
# Of the weighted score; they add up to 1.
RECALL_WEIGHT, RELATION_WEIGHT, PHRASE_WEIGHT = 0.2, 0.4, 0.4
RECALL_TOP_K = 50
_KINDS = ("relation", "phrase")


class OpenImagesScore:
    """micro R@50, weighted mean average precision of relations and of phrases, weighted score.

    A predicted triplet finds an annotated one of the same three classes if both boxes (relation),
    or the boxes around both (phrase), overlap by more than one half; each annotated triplet is
    found once. Precision averages over predicates, weighted by how often they are annotated.

    Args:
        iou_threshold: Overlap that must be exceeded, in (0, 1).
        id2predicate: Names for the report.

    Source:
        `sgg_oi_evaluation.py:400` of the released SGTR, which lets each relation say its two best
        predicates first (`best_predicates`).
    """

    def __init__(
        self, iou_threshold: float = 0.5, id2predicate: Mapping[int, str] | None = None
    ) -> None:
        if not 0 < iou_threshold < 1:
            raise ValueError(f"`iou_threshold` must be in (0, 1), got {iou_threshold}.")
        self.iou_threshold = iou_threshold
        self.id2predicate = dict(id2predicate or {})
        self._recall = SceneGraphRecall((RECALL_TOP_K,), "clean")
        names = ("predicates", "scores", "relation_hits", "phrase_hits", "annotated")
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}

    def update(self, predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]) -> None:
        """Add images.

        Args:
            predictions: One graph an image; of relations with `relation_scores`.
            references: The annotated graphs of the same images in the same order.

        Raises:
            ValueError: If the lengths or the image sizes differ.
        """
        self._recall.update(predictions, references)
        for prediction, reference in zip(predictions, references, strict=True):
            order = np.argsort(-prediction.relation_scores, kind="stable")
            ranked = replace(
                prediction,
                relations=prediction.relations[order],
                relation_scores=prediction.relation_scores[order],
                predicate_distributions=None,
            )
            hits = (self._hits(ranked, reference, kind) for kind in _KINDS)
            self._add(
                ranked.relations[:, 2],
                ranked.relation_scores.astype(np.float64),
                *hits,
                reference.relations[:, 2],
            )

    def state_dict(self) -> dict[str, Any]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        state: dict[str, Any] = {name: _joined(parts) for name, parts in self._parts.items()}
        return state | {"recall": self._recall.state_dict()}

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add what the `state_dict` of another process has gathered."""
        self._recall.merge_state(state["recall"])
        for name, parts in self._parts.items():
            parts.append(state[name])

    def compute(self) -> dict[str, Any]:
        """Return the scores of all images so far.

        Returns:
            "micro_R@50", "wmAP_rel", "wmAP_phr" and "score_wtd" in [0, 1], and "per_predicate":
            {"AP_rel" and "AP_phr": {predicate: precision}} of the annotated predicates.
        """
        state = self.state_dict()
        predicates, counts = np.unique(state["annotated"], return_counts=True)
        report: dict[str, Any] = {"micro_R@50": self._recall.compute()["micro_R@50"]}
        report["per_predicate"] = {}
        for kind, short in zip(_KINDS, ("rel", "phr"), strict=True):
            precisions = []
            for predicate, count in zip(predicates, counts, strict=True):
                chosen = state["predicates"] == predicate
                order = np.argsort(-state["scores"][chosen], kind="stable")
                is_hit = state[f"{kind}_hits"][chosen][order]
                precisions.append(average_precision(is_hit, int(count)))
            mean = float(np.average(precisions, weights=counts)) if len(counts) else float("nan")
            report[f"wmAP_{short}"] = mean
            report["per_predicate"][f"AP_{short}"] = {
                self.id2predicate.get(int(number), str(number)): value
                for number, value in zip(predicates, precisions, strict=True)
            }
        report["score_wtd"] = (
            RECALL_WEIGHT * report["micro_R@50"]
            + RELATION_WEIGHT * report["wmAP_rel"]
            + PHRASE_WEIGHT * report["wmAP_phr"]
        )
        return report

    def _hits(self, prediction: SceneGraph, reference: SceneGraph, kind: str) -> BoolArray:
        """(K,) whether each triplet, best first, is the first to find its annotated one."""
        is_hit = np.zeros(len(prediction.relations), dtype=np.bool_)
        if not len(is_hit) or not len(reference.relations):
            return is_hit
        predicted, annotated = labelled_triplets(prediction), labelled_triplets(reference)
        overlap = _overlap(prediction, reference, kind)
        overlap[(predicted[:, None] != annotated[None]).any(-1)] = -1
        best = overlap.argmax(axis=1)
        candidates = np.flatnonzero(overlap.max(axis=1) > self.iou_threshold)
        # `unique` returns the first of each, which has the best score.
        first = np.unique(best[candidates], return_index=True)[1]
        is_hit[candidates[first]] = True
        return is_hit

    def _add(self, *values: NDArray[Any]) -> None:
        for parts, value in zip(self._parts.values(), values, strict=True):
            parts.append(value)


def best_predicates(graph: SceneGraph, count: int = 2, top_k: int = 100) -> SceneGraph:
    """Let every relation say its best predicates, as the evaluation of Open Images does.

    Args:
        graph: With `predicate_distributions`.
        count: Predicates a relation.
        top_k: Relations to keep, by subject score x object score x probability.

    Raises:
        ValueError: If the graph has no distributions.
    """
    distributions = graph.predicate_distributions
    if distributions is None:
        raise ValueError("`graph.predicate_distributions` are needed, this graph has none.")
    best: IntArray = np.argsort(-distributions, axis=1, kind="stable")[:, :count]
    pairs = graph.relations[:, :2]
    scores = graph.scores[pairs].prod(axis=1)[:, None] * np.take_along_axis(
        distributions, best, axis=1
    )
    order = np.argsort(-scores, axis=None, kind="stable")[:top_k]
    rows = order // best.shape[1]
    return replace(
        graph,
        relations=np.column_stack((pairs[rows], best.ravel()[order])).astype(np.int64),
        relation_scores=scores.ravel()[order],
        predicate_distributions=distributions[rows],
    )


def average_precision(is_hit: BoolArray, num_annotated: int) -> float:
    """Area under the envelope of precision over recall.

    Args:
        is_hit: (K,) predictions, best first.
        num_annotated: Annotated triplets that could be found.
    """
    hits = np.cumsum(is_hit)
    recall = np.concatenate(([0.0], hits / num_annotated, [1.0]))
    precision = np.concatenate(([0.0], hits / np.arange(1, len(is_hit) + 1), [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall) * envelope[1:]))


def _overlap(prediction: SceneGraph, reference: SceneGraph, kind: str) -> FloatArray:
    """(K, R) overlap of the worse of both boxes, or of the boxes around both."""
    ends = [graph.boxes_xyxy[graph.relations[:, :2]] for graph in (prediction, reference)]
    if kind == "phrase":
        ends = [
            np.concatenate((boxes[..., :2].min(1), boxes[..., 2:].max(1)), axis=-1)[:, None]
            for boxes in ends
        ]
    predicted, annotated = (torch.from_numpy(boxes.astype(np.float64)) for boxes in ends)
    overlap: FloatArray = box_iou(predicted[:, None], annotated[None]).amin(-1).numpy()
    return overlap


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0)
