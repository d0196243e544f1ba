"""Precision, F1 and calibration of predicted triplets, over all images together.

A prediction is right if it is the first to hit an annotated triplet: what says the same again, or
hits nothing, is wrong. What annotators left out counts as wrong too, so that precision is a lower
bound. K predictions of all images, those that the graph constraint keeps.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .entity_overlap import FloatArray, IntArray
from .recall_report import harmonic_mean


CALIBRATION_BINS = 15
CURVE_POINTS = 200


def report_precision(
    scores: NDArray[np.floating],
    num_first_hits: NDArray[np.integer],
    num_annotated: int,
    threshold: float = 0.5,
) -> dict[str, Any]:
    """Return precision, recall and F1 of what reaches a threshold, curve and calibration.

    Predictions of equal score count together, so that the order of images changes no bit.

    Args:
        scores: (K,) of the predictions.
        num_first_hits: (K,) of how many annotated triplets each is the first hit.
        num_annotated: Annotated triplets that could be found.
        threshold: Least score that counts.

    Returns:
        "threshold", and "precision", "recall" and "F1" of predictions with at least that score;
        "best_F1" and the "best_threshold" that gives it; "AP", area under the envelope of precision
        over recall; "curve": at most 200 of its points, as lists "threshold", "precision",
        "recall"; "calibration": see `report_calibration`; and the counts "num_predictions",
        "num_right" and "num_annotated". NaN where there is nothing to divide by.
    """
    order = np.argsort(-scores, kind="stable")
    ranked: FloatArray = scores[order].astype(np.float64)
    found: IntArray = num_first_hits[order].astype(np.int64)
    # Where a run of equal scores ends.
    ends = np.flatnonzero(np.diff(ranked, append=-np.inf))
    thresholds = ranked[ends]
    precision: FloatArray = np.cumsum(found > 0)[ends] / (ends + 1)
    recall: FloatArray = np.cumsum(found)[ends] / max(num_annotated, 1)
    f1 = _f1(precision, recall)
    # Points whose threshold is high enough come first.
    reached = int(np.searchsorted(-thresholds, -threshold, side="right"))
    report: dict[str, Any] = {"threshold": threshold, **_at(reached, precision, recall)}
    best = int(np.argmax(f1)) if len(f1) else None
    report |= {
        "best_F1": math.nan if best is None else float(f1[best]),
        "best_threshold": math.nan if best is None else float(thresholds[best]),
        "AP": average_precision(precision, recall),
    }
    if not num_annotated:
        report |= dict.fromkeys(("recall", "F1", "best_F1", "best_threshold", "AP"), math.nan)
    return report | {
        "curve": _curve(thresholds, precision, recall),
        "calibration": report_calibration(ranked, found > 0),
        "num_predictions": len(ranked),
        "num_right": int((found > 0).sum()),
        "num_annotated": num_annotated,
    }


def report_calibration(
    scores: FloatArray, is_right: NDArray[np.bool_], num_bins: int = CALIBRATION_BINS
) -> dict[str, Any]:
    """Return how well scores say how often predictions are right (Guo et al., ICML 2017).

    Args:
        scores: (K,) sorted, probabilities.
        is_right: (K,).
        num_bins: Of equal width.

    Returns:
        "ECE": expected calibration error, the mean distance of score and share of right predictions
        over bins, weighted by their size; "bins": lists "count", "mean_score", "share_right" of all
        bins. NaN without predictions, or if a score is not in [0, 1].
    """
    if not len(scores) or scores.min() < 0 or scores.max() > 1:
        return {"ECE": math.nan, "bins": {"count": [], "mean_score": [], "share_right": []}}
    # A score of exactly 1 belongs to the last bin.
    bins: IntArray = np.minimum((scores * num_bins).astype(np.int64), num_bins - 1)
    counts, right = (
        np.bincount(bins, weights=weights, minlength=num_bins) for weights in (None, is_right)
    )
    # The scores are sorted, so that sums do not depend on the order of images.
    sums = np.bincount(bins, weights=scores, minlength=num_bins)
    means, shares = (
        np.divide(values, counts, out=np.full(num_bins, math.nan), where=counts > 0)
        for values in (sums, right)
    )
    gaps = np.abs(np.nan_to_num(means - shares)) * counts
    return {
        "ECE": math.fsum(gaps) / len(scores),
        "bins": {
            "count": counts.tolist(),
            "mean_score": means.tolist(),
            "share_right": shares.tolist(),
        },
    }


def average_precision(precision: FloatArray, recall: FloatArray, *, early: bool = False) -> float:
    """Return the area under the envelope of precision over recall.

    Args:
        precision: Of the best predictions, more and more of them.
        recall: Of the same predictions.
        early: Let each step of recall have the precision before it, which is never lower, as the
            evaluation of Open Images in the released SGTR does (`sgg_oi_evaluation.py:910`).
    """
    steps = np.concatenate(([0.0], recall, [1.0]))
    heights = np.concatenate(([0.0], precision, [0.0]))
    envelope = np.maximum.accumulate(heights[::-1])[::-1]
    return math.fsum(np.diff(steps) * (envelope[:-1] if early else envelope[1:]))


def _at(count: int, precision: FloatArray, recall: FloatArray) -> dict[str, float]:
    """Precision, recall and F1 of the first `count` points together."""
    if not count:
        return {"precision": math.nan, "recall": 0.0, "F1": 0.0}
    chosen = float(precision[count - 1]), float(recall[count - 1])
    return {"precision": chosen[0], "recall": chosen[1], "F1": harmonic_mean(*chosen)}


def _f1(precision: FloatArray, recall: FloatArray) -> FloatArray:
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0)


def _curve(thresholds: FloatArray, precision: FloatArray, recall: FloatArray) -> dict[str, Any]:
    chosen = np.unique(np.linspace(0, len(thresholds) - 1, CURVE_POINTS).astype(np.int64))
    chosen = chosen[chosen >= 0] if len(thresholds) else chosen[:0]
    return {
        name: values[chosen].tolist()
        for name, values in (
            ("threshold", thresholds),
            ("precision", precision),
            ("recall", recall),
        )
    }
