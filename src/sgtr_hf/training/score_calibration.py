"""Fits the temperature and the offset that make the score of a triplet a probability.

K emitted triplets of all images, P predicates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from ..configuration.configuration_sgtr import SgtrConfig
from ..metrics.evaluation_protocols import RecallProtocol
from ..metrics.triplet_matching import MISSED, rank_of_first_hit
from ..metrics.triplet_precision import report_calibration
from ..scene_graph import SceneGraph


FloatArray = NDArray[np.float64]
# Probabilities of exactly 0 or 1 have no logit.
SMALLEST = 1e-9
# All that is emitted has a score that must mean something.
EMITTED = RecallProtocol("emitted", graph_constraint="none")


class Calibration(NamedTuple):
    """What was fitted, and what it changed."""

    score_temperature: float
    score_offset: float
    before: dict[str, Any]
    """Calibration of the scores as they were: "ECE" and "bins"."""
    after: dict[str, Any]
    num_triplets: int


class EmittedTriplets(NamedTuple):
    """Triplets of all images."""

    predicate_logits: FloatArray
    """(K,) before temperature and offset."""
    other_factors: FloatArray
    """(K,) product of all else in the score."""
    is_right: NDArray[np.bool_]
    """(K,) whether it is the first to hit an annotated triplet."""

    def scores(self, temperature: float, offset: float) -> FloatArray:
        """Return the scores (K,) that these settings give."""
        result: FloatArray = self.other_factors * _sigmoid(
            self.predicate_logits / temperature + offset
        )
        return result


def fit_calibration(
    config: SgtrConfig, predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]
) -> Calibration:
    """Fit both settings by maximum likelihood on images that training has not seen.

    Args:
        config: Of the model that made the predictions, with its present settings.
        predictions: Graphs as the model emits them.
        references: Annotated graphs of the same images.

    Raises:
        ValueError: If the head is not focal, or no triplet, or every triplet, is right.

    Source:
        Temperature scaling (Guo et al., ICML 2017) with an offset as in Platt scaling; of the
        predicate alone, since the other factors are probabilities already.
    """
    if config.predicate_classification != "focal":
        raise ValueError(
            "Calibration is for sigmoid heads, `predicate_classification` is "
            f"{config.predicate_classification!r}."
        )
    emitted = read_emitted_triplets(config, predictions, references)
    if emitted.is_right.all() or not emitted.is_right.any():
        raise ValueError(
            f"Calibration needs right and wrong triplets, got {int(emitted.is_right.sum())} right "
            f"of {len(emitted.is_right)}; use more images, or a trained model."
        )
    present = (float(config.score_temperature), float(config.score_offset))

    def negative_log_likelihood(settings: FloatArray) -> float:
        scores = emitted.scores(float(np.exp(settings[0])), float(settings[1]))
        scores = scores.clip(SMALLEST, 1 - SMALLEST)
        return float(-np.where(emitted.is_right, np.log(scores), np.log1p(-scores)).mean())

    found = minimize(
        negative_log_likelihood, np.array([np.log(present[0]), present[1]]), method="Nelder-Mead"
    )
    temperature, offset = float(np.exp(found.x[0])), float(found.x[1])
    return Calibration(
        temperature,
        offset,
        _reliability(emitted.scores(*present), emitted.is_right),
        _reliability(emitted.scores(temperature, offset), emitted.is_right),
        len(emitted.is_right),
    )


def read_emitted_triplets(
    config: SgtrConfig, predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]
) -> EmittedTriplets:
    """Take the scores of graphs apart, and find out which triplets are right."""
    logits, factors, rights = [], [], []
    for prediction, reference in zip(predictions, references, strict=True):
        distributions = prediction.predicate_distributions
        if distributions is None:
            raise ValueError("The predicted graphs must hold `predicate_distributions`.")
        rows = np.arange(len(prediction.relations))
        probability = distributions[rows, prediction.relations[:, 2]].astype(np.float64)
        probability = probability.clip(SMALLEST, 1 - SMALLEST)
        logit = np.log(probability / (1 - probability)) - config.score_offset
        logits.append(logit * config.score_temperature)
        factors.append((prediction.relation_scores / probability).clip(0, 1))
        ranks = rank_of_first_hit(prediction, reference, EMITTED)
        right = np.zeros(len(rows), dtype=np.bool_)
        right[ranks[ranks != MISSED]] = True
        rights.append(right)
    return EmittedTriplets(np.concatenate(logits), np.concatenate(factors), np.concatenate(rights))


def _reliability(scores: FloatArray, is_right: NDArray[np.bool_]) -> dict[str, Any]:
    order = np.argsort(scores, kind="stable")
    return report_calibration(scores[order], is_right[order])


def _sigmoid(values: FloatArray) -> FloatArray:
    result: FloatArray = 1 / (1 + np.exp(-values))
    return result
