import math

import numpy as np
import pytest

from sgtr_hf.metrics.open_images import OPEN_IMAGES_PROTOCOLS, OpenImagesScore
from sgtr_hf.metrics.triplet_precision import average_precision
from sgtr_hf.scene_graph import SceneGraph
from slow_evaluation import random_images, slow_iou


def around(first, second):
    return [*np.minimum(first[:2], second[:2]), *np.maximum(first[2:], second[2:])]


def slow_predictions(graph, protocol):
    """(score, subject, object, predicate), best first, of which the best 100 count."""
    entries = []
    for row, (subject, object_, predicate) in enumerate(graph.relations.tolist()):
        if graph.predicate_distributions is None:
            entries.append((float(graph.relation_scores[row]), subject, object_, predicate))
            continue
        probabilities = graph.predicate_distributions[row].tolist()
        likely = sorted(range(len(probabilities)), key=lambda column: -probabilities[column])[:2]
        ends = float(graph.scores[subject]) * float(graph.scores[object_])
        entries += [(ends * probabilities[one], subject, object_, one) for one in likely]
    entries.sort(key=lambda entry: -entry[0])
    return [entry for entry in entries[:100] if entry[0] > protocol.least_score]


def slow_scores(predictions, references, protocol):
    lists = [slow_predictions(graph, protocol) for graph in predictions]
    counts = {}
    for reference in references:
        for predicate in reference.relations[:, 2].tolist():
            counts[predicate] = counts.get(predicate, 0) + 1
    total = sum(counts.values())
    report = {"micro_R@50": slow_micro_recall(lists, predictions, references, protocol) / total}
    for kind in ("rel", "phr"):
        precisions = {
            predicate: slow_precision(
                lists, predictions, references, (predicate, kind, count), protocol
            )
            for predicate, count in counts.items()
        }
        report[f"AP_{kind}"] = precisions
        report[f"wmAP_{kind}"] = sum(
            precisions[predicate] * count / total for predicate, count in counts.items()
        )
    return report


def slow_micro_recall(lists, predictions, references, protocol):
    num_found = 0
    for entries, graph, reference in zip(lists, predictions, references, strict=True):
        for subject, object_, predicate in reference.relations.tolist():
            num_found += any(
                predicate == other
                and all(
                    graph.labels[one] == reference.labels[two]
                    and slow_iou(
                        graph.boxes_xyxy[one].tolist(),
                        reference.boxes_xyxy[two].tolist(),
                        protocol.recall_overlap,
                    )
                    >= 0.5
                    for one, two in ((subject2, subject), (object2, object_))
                )
                for _, subject2, object2, other in entries[:50]
            )
    return num_found


def slow_precision(lists, predictions, references, what, protocol):
    """One prediction after the other over all images, as the definition says."""
    predicate, kind, count = what
    detections = [
        (score, image, (subject, object_))
        for image, entries in enumerate(lists)
        for score, subject, object_, other in entries
        if other == predicate
    ]
    detections.sort(key=lambda row: -row[0])
    taken, hits = set(), []
    for score, image, ends in detections:
        best, overlap = slow_best(
            predictions[image], references[image], ends, (predicate, kind), protocol
        )
        is_hit = overlap > 0.5 and (image, best) not in taken
        hits.append((score, is_hit))
        taken |= {(image, best)} if is_hit else set()
    # Of equal scores, misses first.
    hits = [is_hit for _, is_hit in sorted(hits, key=lambda row: (-row[0], row[1]))]
    # Points of precision over recall, and of each the best precision from there on.
    points = [(0.0, 0.0)]
    for position, found in enumerate(np.cumsum(hits).tolist(), start=1):
        points.append((found / count, found / position))
    points.append((1.0, 0.0))
    area = 0.0
    for position in range(1, len(points)):
        start = position - 1 if protocol.early_precision else position
        height = max(precision for _, precision in points[start:])
        area += (points[position][0] - points[position - 1][0]) * height
    return area


def slow_best(graph, reference, ends, what, protocol):
    predicate, kind = what
    best, best_overlap = None, 0.0
    for number, (subject, object_, other) in enumerate(reference.relations.tolist()):
        same = all(
            graph.labels[one] == reference.labels[two]
            for one, two in zip(ends, (subject, object_), strict=True)
        )
        if other != predicate or not same:
            continue
        ours, theirs = graph.boxes_xyxy[list(ends)], reference.boxes_xyxy[[subject, object_]]
        pairs = list(zip(ours.tolist(), theirs.tolist(), strict=True))
        if kind == "phr":
            pairs = [(around(*ours), around(*theirs))]
        overlap = min(slow_iou(*pair, protocol.precision_overlap) for pair in pairs)
        if overlap > best_overlap:
            best, best_overlap = number, overlap
    return best, best_overlap


@pytest.mark.parametrize("distributions", [False, True])
@pytest.mark.parametrize("name", OPEN_IMAGES_PROTOCOLS)
def test_scores_equal_the_definition_in_loops(name, distributions):
    for seed in range(3):
        predictions, references, _ = random_images(seed, distributions=distributions, num_images=8)
        metric = OpenImagesScore(name)
        metric.update(predictions, references)
        report = metric.compute()
        expected = slow_scores(predictions, references, OPEN_IMAGES_PROTOCOLS[name])
        for figure in ("micro_R@50", "wmAP_rel", "wmAP_phr"):
            assert report[figure] == pytest.approx(expected[figure], abs=1e-12), figure
        for kind in ("AP_rel", "AP_phr"):
            by_predicate = {str(number): value for number, value in expected[kind].items()}
            assert report["per_predicate"][kind] == pytest.approx(by_predicate, abs=1e-12)
        score = 0.2 * report["micro_R@50"] + 0.4 * report["wmAP_rel"] + 0.4 * report["wmAP_phr"]
        assert report["score_wtd"] == pytest.approx(score)
        assert report["protocol"]["name"] == name


def test_processes_together_give_the_bits_of_one():
    predictions, references, _ = random_images(2, distributions=True, num_images=70)
    whole, first, second = OpenImagesScore(), OpenImagesScore(), OpenImagesScore()
    whole.update(predictions, references)
    first.update(predictions[::2], references[::2])
    second.update(predictions[1::2], references[1::2])
    second.merge_state(first.state_dict())
    assert second.compute() == whole.compute()
    second.reset()
    second.update(predictions, references)
    assert second.compute() == whole.compute()


def test_precision_at_its_limits():
    steps = np.array([1.0, 0.5])
    assert average_precision(np.ones(2), steps[::-1].copy()) == 1
    assert average_precision(np.array([0, 0.5]), np.array([0, 1.0])) == 0.5
    assert average_precision(np.zeros(0), np.zeros(0)) == 0
    # Precision 1 up to recall .5, then .75 up to 1: the later step has the earlier precision.
    areas = [
        average_precision(np.array([1, 0.75]), np.array([0.5, 1.0]), early=early)
        for early in (False, True)
    ]
    assert areas == [0.875, 1.0]
    assert all(math.isnan(OpenImagesScore().compute()[name]) for name in ("wmAP_rel", "score_wtd"))
    with pytest.raises(ValueError, match=r"strict, egtr, as_emitted.*'scene_graph_benchmark'"):
        OpenImagesScore("scene_graph_benchmark")


def test_each_relation_says_its_two_likeliest_predicates():
    graph = SceneGraph(
        boxes_xyxy=[[0, 0, 10, 10], [20, 20, 30, 30]],
        labels=[0, 1],
        scores=[1.0, 0.5],
        relations=[[0, 1, 2], [1, 0, 0]],
        relation_scores=[0.5, 0.4],
        image_size=(50, 50),
        predicate_distributions=[[0.1, 0.3, 0.9], [0.8, 0.2, 0.1]],
    )
    metric = OpenImagesScore()
    metric.update([graph], [graph])
    state = metric.state_dict()
    assert state["predicates"].tolist() == [2, 0, 1, 1]
    np.testing.assert_allclose(state["scores"], [0.45, 0.4, 0.15, 0.1], rtol=1e-6)
    assert metric.compute()["wmAP_rel"] == 1
