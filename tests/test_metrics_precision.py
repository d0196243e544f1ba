import json
import math

import numpy as np
import pytest

from sgtr_hf.metrics.evaluation_protocols import STRICT
from sgtr_hf.metrics.recall import Measured, SceneGraphRecall
from sgtr_hf.metrics.triplet_precision import report_calibration, report_precision
from sgtr_hf.visualization.evaluation_plots import (
    draw_precision_recall,
    draw_predicate_recalls,
    draw_reliability_diagram,
)
from slow_evaluation import random_images, slow_constrained_list, slow_ranks


def slow_precision(predictions, references, threshold):
    """Precision and recall of the triplets with at least this score, one image after the other."""
    num_said = num_right = num_found = num_annotated = 0
    for prediction, reference in zip(predictions, references, strict=True):
        if not reference.num_relations:
            continue
        rows = slow_constrained_list(prediction, STRICT)
        scores = sorted_scores(prediction, rows)
        ranks = slow_ranks(rows, prediction, reference, STRICT)
        enough = [score >= threshold for score in scores]
        num_said += sum(enough)
        num_right += len({rank for rank in ranks if rank >= 0 and enough[rank]})
        num_found += sum(rank >= 0 and enough[rank] for rank in ranks)
        num_annotated += len(ranks)
    return num_right / num_said if num_said else math.nan, num_found / num_annotated


def sorted_scores(prediction, rows):
    """Scores of the rows that stay: the best of each pair."""
    best = {}
    for (subject, object_, _), score in zip(
        prediction.relations.tolist(), prediction.relation_scores.tolist(), strict=True
    ):
        best[subject, object_] = max(score, best.get((subject, object_), -1))
    return [best[row[:2]] for row in rows]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.875])
def test_precision_and_recall_equal_plain_loops(threshold):
    predictions, references, _ = random_images(4, distributions=False, num_images=20)
    measured = Measured(precision=True, threshold=threshold)
    metric = SceneGraphRecall(measured=measured)
    metric.update(predictions, references)
    report = metric.compute()["precision"]
    precision, recall = slow_precision(predictions, references, threshold)
    assert (report["precision"], report["recall"]) == pytest.approx((precision, recall))
    assert report["F1"] == pytest.approx(2 * precision * recall / (precision + recall))
    scores = sorted({score for one in predictions for score in one.relation_scores.tolist()})
    by_threshold = {score: slow_precision(predictions, references, score) for score in scores}
    best = max(
        (2 * one * two / (one + two) if one + two else 0.0) for one, two in by_threshold.values()
    )
    assert report["best_F1"] == pytest.approx(best)
    for score, one, two in zip(*report["curve"].values(), strict=True):
        assert by_threshold[score] == pytest.approx((one, two))


def slow_area(points):
    """Each step of recall counts with the best precision from there on."""
    area, before = 0.0, 0.0
    for number, (_, recall) in enumerate(points):
        area += (recall - before) * max(precision for precision, _ in points[number:])
        before = recall
    return area


def slow_calibration_error(scores, is_right, num_bins):
    error = 0.0
    for number in range(num_bins):
        # The last bin includes 1.
        chosen = [
            (score, right)
            for score, right in zip(scores, is_right, strict=True)
            if number <= score * num_bins < number + 1 or (score == 1 and number == num_bins - 1)
        ]
        if chosen:
            mean, share = (sum(values) / len(chosen) for values in zip(*chosen, strict=True))
            error += len(chosen) / len(scores) * abs(mean - share)
    return error


def test_average_precision_and_calibration_equal_plain_loops():
    for seed in range(20):
        generator = np.random.default_rng(seed)
        count = int(generator.integers(1, 60))
        # Sixteenths, so that there are ties; some scores are 1.
        scores = generator.integers(0, 17, count) / 16
        hits = generator.integers(0, 3, count) * (generator.random(count) < scores)
        num_annotated = int(hits.sum()) + int(generator.integers(1, 10))
        report = report_precision(scores, hits, num_annotated)
        points = []
        for threshold in sorted(set(scores.tolist()), reverse=True):
            chosen = hits[scores >= threshold]
            points.append(((chosen > 0).sum() / len(chosen), chosen.sum() / num_annotated))
        assert report["AP"] == pytest.approx(slow_area(points), abs=1e-12)
        error = slow_calibration_error(scores.tolist(), (hits > 0).tolist(), 15)
        assert report["calibration"]["ECE"] == pytest.approx(error, abs=1e-12)


def test_hand_made_curve():
    # Right, wrong, right for two annotations at once, wrong; five are annotated.
    report = report_precision(np.array([0.9, 0.7, 0.6, 0.2]), np.array([1, 0, 2, 0]), 5, 0.6)
    assert report["precision"] == pytest.approx(2 / 3)
    assert report["recall"] == pytest.approx(3 / 5)
    assert report["best_F1"] == pytest.approx(report["F1"])
    assert report["best_threshold"] == pytest.approx(0.6)
    assert report["AP"] == pytest.approx(1 / 5 * 1 + 2 / 5 * 2 / 3)
    assert (report["num_predictions"], report["num_right"], report["num_annotated"]) == (4, 2, 5)


def test_equal_scores_count_together_in_any_order():
    scores, hits = np.array([0.5, 0.5, 0.5, 0.9]), np.array([0, 1, 0, 1])
    report = report_precision(scores, hits, 2)
    assert report["curve"]["threshold"] == [0.9, 0.5]
    for order in ([2, 1, 0, 3], [3, 0, 1, 2]):
        again = report_precision(scores[order], hits[order], 2)
        assert json.dumps(again) == json.dumps(report)


def test_nothing_predicted_or_annotated():
    nothing = np.zeros(0), np.zeros(0, dtype=np.int64)
    report = report_precision(*nothing, 3)
    assert (report["recall"], report["F1"], report["AP"]) == (0, 0, 0)
    assert math.isnan(report["precision"])
    report = report_precision(np.array([0.5]), np.array([0]), 0)
    assert report["precision"] == 0
    assert all(math.isnan(report[name]) for name in ("recall", "F1", "best_F1", "AP"))


def test_calibration_error_of_hand_made_case():
    scores = np.array([1.0, 0.9, 0.9, 0.2])
    report = report_calibration(scores, np.array([True, True, False, False]), num_bins=10)
    # The last bin holds three: mean .9333, two thirds right; the third one: .2, none right.
    assert report["ECE"] == pytest.approx((3 * abs(2.8 / 3 - 2 / 3) + 0.2) / 4)
    assert report["bins"]["count"] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 3]
    calibrated = np.repeat([0.75, 0.25], 4)
    is_right = np.array([True, True, True, False, True, False, False, False])
    assert report_calibration(calibrated, is_right)["ECE"] == pytest.approx(0)
    for beyond in (np.array([2.0, 0.5]), np.array([0.5, -0.1]), np.zeros(0)):
        assert math.isnan(report_calibration(beyond, np.zeros(len(beyond), dtype=bool))["ECE"])


def test_plots_are_drawn(tmp_path):
    generator = np.random.default_rng(0)
    scores = generator.random(500)
    report = report_precision(scores, (generator.random(500) < scores).astype(np.int64), 600)
    draw_reliability_diagram(report, tmp_path / "reliability.png")
    draw_precision_recall(report, tmp_path / "curve.png")
    recalls, counts = {"on": 0.5, "in": 0.2}, {"on": 3, "in": 8}
    draw_predicate_recalls(recalls, counts, {"head": ["in"]}, "R@50", tmp_path / "bars.png")
    for name in ("reliability", "curve", "bars"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    beyond = report_precision(scores * 9, np.zeros(500, dtype=np.int64), 1)
    with pytest.raises(ValueError, match="no calibration to draw"):
        draw_reliability_diagram(beyond, tmp_path / "none.png")
