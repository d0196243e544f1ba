import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from sgtr_hf.metrics.recall import (
    DetectorCeiling,
    RecallProtocol,
    SceneGraphRecall,
    detector_ceiling,
    distinct_triplets,
    harmonic_mean,
    without_constraint,
)
from sgtr_hf.metrics.triplet_matching import rank_of_first_hit, reachable_triplets
from sgtr_hf.scene_graph import SceneGraph


IMAGE_SIZE = (100, 120)


def make_graph(boxes, labels, relations):
    relations = np.array(relations, dtype=np.int64).reshape(-1, 3)
    return SceneGraph(
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        scores=np.ones(len(labels), dtype=np.float32),
        relations=relations,
        relation_scores=np.linspace(1.0, 0.1, len(relations), dtype=np.float32),
        image_size=IMAGE_SIZE,
    )


def random_graph(generator, num_entities, num_relations, num_labels=3, num_predicates=4):
    corner = generator.integers(0, 60, (num_entities, 2))
    size = generator.integers(5, 40, (num_entities, 2))
    relations = [
        (*generator.choice(num_entities, 2, replace=False), generator.integers(num_predicates))
        for _ in range(num_relations)
    ]
    labels = generator.integers(0, num_labels, num_entities)
    return make_graph(np.concatenate((corner, corner + size), axis=1), labels, relations)


def disturb(generator, graph, num_relations, num_predicates=4):
    """Predictions near the annotation: moved boxes, some labels and predicates wrong."""
    boxes = np.concatenate([graph.boxes_xyxy] * 2)
    boxes[:, :2] += generator.integers(-4, 5, (len(boxes), 2))
    boxes[:, 2:] = np.maximum(boxes[:, :2] + 1, boxes[:, 2:])
    labels = np.concatenate([graph.labels] * 2)
    labels[generator.random(len(labels)) < 0.1] = 0
    relations = []
    for _ in range(num_relations):
        subject, object_, predicate = graph.relations[generator.integers(len(graph.relations))]
        if generator.random() < 0.4:
            predicate = generator.integers(num_predicates)
        shift = len(graph.labels) * generator.integers(0, 2, 2)
        relations.append((subject + shift[0], object_ + shift[1], predicate))
    return make_graph(boxes, labels, relations)


def slow_iou(first, second, extra):
    width = min(first[2], second[2]) - max(first[0], second[0]) + extra
    height = min(first[3], second[3]) - max(first[1], second[1]) + extra
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (first, second)]
    return shared / (areas[0] + areas[1] - shared)


def slow_ranks(prediction, reference, iou_threshold=0.5, extra=0):
    ranks = []
    for subject, object_, predicate in reference.relations.tolist():
        found = -1
        for rank, (subject2, object2, predicate2) in enumerate(prediction.relations.tolist()):
            ends = ((subject, subject2), (object_, object2))
            if predicate == predicate2 and all(
                reference.labels[one] == prediction.labels[two]
                and slow_iou(
                    reference.boxes_xyxy[one].tolist(), prediction.boxes_xyxy[two].tolist(), extra
                )
                >= iou_threshold
                for one, two in ends
            ):
                found = rank
                break
        ranks.append(found)
    return ranks


def slow_recall(ranks_of_images, references, k):
    """Mean over images, and mean over predicates of means over images, by plain loops."""
    shares, by_predicate = [], {}
    for ranks, reference in zip(ranks_of_images, references, strict=True):
        if not len(reference.relations):
            continue
        hits = [0 <= rank < k for rank in ranks]
        shares.append(sum(hits) / len(hits))
        predicates = reference.relations[:, 2].tolist()
        for predicate in set(predicates):
            own = [hit for hit, other in zip(hits, predicates, strict=True) if other == predicate]
            by_predicate.setdefault(predicate, []).append(sum(own) / len(own))
    means = {predicate: sum(values) / len(values) for predicate, values in by_predicate.items()}
    return sum(shares) / len(shares), sum(means.values()) / len(means), means


@pytest.fixture
def data_set():
    generator = np.random.default_rng(3)
    references = [random_graph(generator, 6, int(generator.integers(1, 9))) for _ in range(40)]
    predictions = [disturb(generator, graph, 20) for graph in references]
    # One image of each kind that needs a rule.
    references[5] = make_graph([[0, 0, 9, 9]], [0], [])
    predictions[7] = make_graph([[0, 0, 9, 9]], [0], [])
    predictions[8] = make_graph([], [], [])
    return predictions, references


TWO_BOXES = [[10, 10, 30, 30], [50, 50, 90, 90]]


@pytest.mark.parametrize("add_one_pixel", [False, True])
@pytest.mark.parametrize("iou_threshold", [0.5, 0.8])
def test_rank_of_first_hit_agrees_with_plain_loops(data_set, add_one_pixel, iou_threshold):
    found = []
    for prediction, reference in zip(*data_set, strict=True):
        ranks = rank_of_first_hit(prediction, reference, iou_threshold, add_one_pixel=add_one_pixel)
        assert ranks.dtype == np.int64
        expected = slow_ranks(prediction, reference, iou_threshold, int(add_one_pixel))
        assert ranks.tolist() == expected
        found += expected
    # The comparison means something: misses, first places and later ones occur.
    assert {-1, 0, 5} <= set(found)


def test_rank_of_first_hit_takes_first_of_duplicates():
    reference = make_graph(TWO_BOXES, [0, 1], [[0, 1, 2], [0, 1, 2], [1, 0, 2]])
    prediction = make_graph(TWO_BOXES, [0, 1], [[0, 1, 1], [0, 1, 2], [0, 1, 2]])
    assert rank_of_first_hit(prediction, reference).tolist() == [1, 1, -1]


@pytest.mark.parametrize(
    ("boxes", "labels", "relation"),
    [
        pytest.param(TWO_BOXES, [0, 1], [1, 0, 2], id="direction"),
        pytest.param(TWO_BOXES, [0, 2], [0, 1, 2], id="object label"),
        pytest.param(TWO_BOXES, [1, 1], [0, 1, 2], id="subject label"),
        pytest.param(TWO_BOXES, [0, 1], [0, 1, 3], id="predicate"),
        pytest.param([[10, 10, 30, 19], TWO_BOXES[1]], [0, 1], [0, 1, 2], id="subject box"),
        pytest.param([TWO_BOXES[0], [71, 50, 90, 90]], [0, 1], [0, 1, 2], id="object box"),
    ],
)
def test_rank_of_first_hit_with_one_thing_wrong_misses(boxes, labels, relation):
    reference = make_graph(TWO_BOXES, [0, 1], [[0, 1, 2]])
    assert rank_of_first_hit(make_graph(boxes, labels, [relation]), reference).tolist() == [-1]


def test_overlap_of_exactly_the_threshold_hits():
    reference = make_graph([[0, 0, 10, 10], [50, 50, 90, 90]], [0, 1], [[0, 1, 0]])
    prediction = make_graph([[0, 0, 10, 5], [50, 50, 90, 90]], [0, 1], [[0, 1, 0]])
    assert rank_of_first_hit(prediction, reference).tolist() == [0]
    # 11 x 6 of 11 x 11 pixels.
    higher = 66 / 121
    assert rank_of_first_hit(prediction, reference, higher).tolist() == [-1]
    assert rank_of_first_hit(prediction, reference, higher, add_one_pixel=True).tolist() == [0]


def test_rank_of_first_hit_of_other_image_size_is_an_error():
    reference = make_graph(TWO_BOXES, [0, 1], [[0, 1, 2]])
    other = dataclasses.replace(reference, image_size=(50, 60))
    with pytest.raises(ValueError, match=r"image_size.*target_sizes"):
        rank_of_first_hit(other, reference)


@pytest.mark.parametrize("iou_threshold", [0.0, 1.5, -0.5])
def test_iou_threshold_out_of_range_is_an_error(iou_threshold):
    graph = make_graph(TWO_BOXES, [0, 1], [[0, 1, 2]])
    for call in (
        lambda: rank_of_first_hit(graph, graph, iou_threshold),
        lambda: RecallProtocol(iou_threshold=iou_threshold),
        lambda: DetectorCeiling(iou_threshold),
    ):
        with pytest.raises(ValueError, match="iou_threshold"):
            call()


def test_recall_agrees_with_plain_loops(data_set):
    predictions, references = data_set
    metric = SceneGraphRecall(top_k=(1, 5, 20))
    metric.update(predictions, references)
    report = metric.compute()
    ranks = [slow_ranks(*pair) for pair in zip(predictions, references, strict=True)]
    for k in (1, 5, 20):
        recall, mean_recall, means = slow_recall(ranks, references, k)
        assert report[f"R@{k}"] == pytest.approx(recall, abs=1e-12)
        assert report[f"mR@{k}"] == pytest.approx(mean_recall, abs=1e-12)
        expected = 2 * recall * mean_recall / (recall + mean_recall)
        assert report[f"F@{k}"] == pytest.approx(expected, abs=1e-12)
        expected = {str(predicate): value for predicate, value in means.items()}
        assert report["per_predicate"][f"R@{k}"] == pytest.approx(expected, abs=1e-12)
    assert report["num_images"] == 39
    assert report["num_images_without_relations"] == 1
    assert report["num_images_without_predictions"] == 2
    assert report["num_relations"] == sum(len(graph.relations) for graph in references)
    assert 0 < report["R@1"] < report["R@5"] < report["R@20"] < 1
    json.dumps(report)


def hand_made():
    """First image: 1 of 2 found at once, the other second. Second image: nothing predicted."""
    boxes, labels = [*TWO_BOXES, [0, 60, 20, 99]], [0, 1, 2]
    references = [
        make_graph(boxes, labels, [[0, 1, 0], [1, 2, 3]]),
        make_graph(boxes, labels, [[0, 1, 0]]),
        make_graph(boxes, labels, []),
    ]
    predictions = [
        make_graph(boxes, labels, [[1, 2, 3], [0, 1, 0]]),
        make_graph(boxes, labels, []),
        make_graph(boxes, labels, [[0, 1, 0]]),
    ]
    return predictions, references


def test_recall_of_hand_made_case():
    metric = SceneGraphRecall(top_k=(1, 2), id2predicate={0: "on", 1: "in"})
    metric.update(*hand_made())
    report = metric.compute()
    assert report["R@1"] == pytest.approx((0.5 + 0.0) / 2)
    assert report["R@2"] == pytest.approx((1.0 + 0.0) / 2)
    assert report["per_predicate"] == {"R@1": {"on": 0.0, "3": 1.0}, "R@2": {"on": 0.5, "3": 1.0}}
    assert report["mR@1"] == pytest.approx(0.5)
    assert report["mR@2"] == pytest.approx(0.75)
    assert report["F@2"] == pytest.approx(0.6)
    assert (report["num_images"], report["num_predicates"]) == (2, 2)
    assert report["num_predicates_annotated"] == 2


def test_recall_with_published_protocol_skips_and_averages_over_all_predicates():
    metric = SceneGraphRecall(top_k=(1, 2), protocol="sgtr", num_predicates=5)
    metric.update(*hand_made())
    report = metric.compute()
    assert report["R@1"] == pytest.approx(0.5)
    assert report["R@2"] == pytest.approx(1.0)
    assert report["mR@1"] == pytest.approx(1 / 5)
    assert report["mR@2"] == pytest.approx(2 / 5)
    assert (report["num_images"], report["num_images_without_predictions"]) == (1, 1)
    assert (report["num_predicates"], report["num_predicates_annotated"]) == (5, 2)


def test_recall_in_parts_equals_recall_at_once(data_set):
    predictions, references = data_set
    whole, first, second, third = (SceneGraphRecall() for _ in range(4))
    whole.update(predictions, references)
    first.update(predictions[:6], references[:6])
    second.update(predictions[6:20], references[6:20])
    for prediction, reference in zip(predictions[20:], references[20:], strict=True):
        third.update([prediction], [reference])
    first.merge(second)
    first.merge_state(pickle.loads(pickle.dumps(third.state_dict())))
    assert first.compute() == whole.compute()
    second.update(predictions[:1], references[:1])
    assert first.compute() == whole.compute()


def test_recall_without_any_annotation_is_nan():
    metric = SceneGraphRecall()
    metric.update([make_graph(TWO_BOXES, [0, 1], [[0, 1, 0]])], [make_graph([], [], [])])
    report = metric.compute()
    assert all(math.isnan(report[name]) for name in ("R@20", "mR@20", "F@20"))
    assert report["num_images"] == 0
    assert report["num_images_without_relations"] == 1
    assert math.isnan(SceneGraphRecall().compute()["R@100"])


def test_recall_arguments_are_checked():
    graph = make_graph(TWO_BOXES, [0, 1], [[0, 1, 7]])
    with pytest.raises(ValueError, match="top_k"):
        SceneGraphRecall(top_k=())
    with pytest.raises(ValueError, match="top_k"):
        SceneGraphRecall(top_k=(0, 20))
    with pytest.raises(ValueError, match=r"one of.*clean.*'other'"):
        SceneGraphRecall(protocol="other")
    with pytest.raises(ValueError, match="num_predicates"):
        SceneGraphRecall(protocol="sgtr")
    with pytest.raises(ValueError, match=r"num_predicates.*predicate 7"):
        SceneGraphRecall(num_predicates=7).update([graph], [graph])
    with pytest.raises(ValueError, match="one graph for each image"):
        SceneGraphRecall().update([graph], [])
    with pytest.raises(ValueError, match="protocol"):
        SceneGraphRecall().merge(SceneGraphRecall(protocol="sgtr", num_predicates=9))


def test_harmonic_mean_of_zeros_is_zero():
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.5, 1.0) == pytest.approx(2 / 3)


def test_detector_ceiling_of_hand_made_case():
    boxes, labels = [*TWO_BOXES, [0, 60, 20, 99]], [0, 1, 2]
    references = [
        make_graph(boxes, labels, [[0, 1, 0], [1, 2, 3]]),
        make_graph(boxes, labels, [[0, 1, 0]]),
        make_graph(boxes, labels, []),
    ]
    detections = [
        make_graph([TWO_BOXES[1], TWO_BOXES[0], [0, 60, 20, 99]], [1, 0, 1], []),
        make_graph(TWO_BOXES, [0, 2], []),
        make_graph([], [], []),
    ]
    assert reachable_triplets(detections[0], references[0]).tolist() == [True, False]
    report = detector_ceiling(detections, references)
    assert report["R"] == pytest.approx((0.5 + 0.0) / 2)
    assert report["per_predicate"] == {"0": 0.5, "3": 0.0}
    assert report["mR"] == pytest.approx(0.25)
    assert report["num_images"] == 2


def test_no_recall_is_above_the_detector_ceiling(data_set):
    predictions, references = data_set
    for prediction, reference in zip(predictions, references, strict=True):
        ranks = rank_of_first_hit(prediction, reference)
        assert (reachable_triplets(prediction, reference) | (ranks < 0)).all()
    parts = DetectorCeiling(), DetectorCeiling()
    for part, images in zip(parts, (slice(20), slice(20, None)), strict=True):
        part.update(predictions[images], references[images])
    parts[0].merge_state(parts[1].state_dict())
    whole = detector_ceiling(predictions, references)
    assert parts[0].compute() == whole
    metric = SceneGraphRecall()
    metric.update(predictions, references)
    assert metric.compute()["R@100"] < whole["R"] < 1


def test_pairs_count_whatever_is_said_of_them():
    reference = two_things(relations=[[0, 1, 0], [1, 0, 1]])
    prediction = two_things(relations=[[0, 1, 1], [1, 0, 1]])
    metric = SceneGraphRecall((1, 2))
    metric.update([prediction], [reference])
    report = metric.compute()
    assert (report["R@1"], report["R@2"]) == (0, 0.5)
    assert (report["pair_R@1"], report["pair_R@2"]) == (0.5, 1)
    assert report["micro_R@2"] == 0.5


def test_zero_shot_recall_looks_at_unseen_triplets_alone():
    seen = distinct_triplets([two_things(relations=[[0, 1, 0]])])
    assert seen.tolist() == [[0, 1, 0]]
    first = two_things(relations=[[0, 1, 0], [1, 0, 1]])
    second = two_things(relations=[[0, 1, 0]])
    metric = SceneGraphRecall((5,), seen_triplets=seen)
    metric.update([two_things(relations=[[1, 0, 1]]), second], [first, second])
    report = metric.compute()
    # The second image has nothing unseen and does not count.
    assert report["zR@5"] == 1
    assert report["R@5"] == 0.75
    metric = SceneGraphRecall((5,), seen_triplets=seen)
    metric.update([second], [second])
    assert np.isnan(metric.compute()["zR@5"])


def test_without_constraint_a_pair_may_say_everything():
    graph = dataclasses.replace(
        two_things(relations=[[0, 1, 0], [1, 0, 0]]),
        scores=[1.0, 0.5],
        predicate_distributions=[[0.9, 0.2], [0.3, 0.8]],
    )
    free = without_constraint(graph, top_k=3)
    assert free.relations.tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(free.relation_scores, [0.45, 0.4, 0.15], rtol=1e-6)
    with pytest.raises(ValueError, match="predicate_distributions"):
        without_constraint(two_things(relations=[[0, 1, 0]]))


def two_things(relations):
    return SceneGraph(
        boxes_xyxy=[[0, 0, 10, 10], [20, 20, 40, 40]],
        labels=[0, 1],
        scores=[1.0, 1.0],
        relations=relations,
        relation_scores=np.linspace(1, 0.5, len(relations)),
        image_size=(64, 64),
    )
