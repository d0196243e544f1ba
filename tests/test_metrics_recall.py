import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from sgtr_hf.metrics.detector_ceiling import DetectorCeiling
from sgtr_hf.metrics.evaluation_protocols import PROTOCOLS, STRICT, RecallProtocol
from sgtr_hf.metrics.recall import BATCH_IMAGES, Measured, SceneGraphRecall, without_constraint
from sgtr_hf.metrics.recall_report import harmonic_mean
from sgtr_hf.metrics.training_triplets import TrainingTriplets, count_training_triplets
from sgtr_hf.metrics.triplet_matching import rank_of_first_hit, reachable_triplets
from sgtr_hf.scene_graph import SceneGraph
from slow_evaluation import (
    random_images,
    slow_constrained_list,
    slow_free_list,
    slow_ranks,
    slow_recalls,
)


TOP_K = (1, 3, 20)
TWO_BOXES = [[10, 10, 30, 30], [50, 50, 90, 90]]


def make_graph(boxes, labels, relations, **fields):
    relations = np.array(relations, dtype=np.int64).reshape(-1, 3)
    return SceneGraph(
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        scores=fields.pop("scores", np.ones(len(labels))),
        relations=relations,
        relation_scores=fields.pop("relation_scores", np.linspace(1.0, 0.1, len(relations))),
        image_size=(100, 120),
        **fields,
    )


def two_things(relations, **fields):
    return make_graph(TWO_BOXES, [0, 1], relations, **fields)


def measure(predictions, references, **arguments):
    metric = SceneGraphRecall(**arguments)
    metric.update(predictions, references)
    return metric.compute()


@pytest.mark.parametrize("distributions", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_recalls_equal_plain_loops(name, distributions):
    protocol = PROTOCOLS[name]
    for seed in range(5):
        predictions, references, num_predicates = random_images(
            seed, distributions=distributions, num_images=8
        )
        report = measure(
            predictions, references, top_k=TOP_K, protocol=name, num_predicates=num_predicates
        )
        pairs = list(zip(predictions, references, strict=True))
        rows = [slow_constrained_list(graph, protocol) for graph in predictions]
        free = [slow_free_list(graph, protocol, max(TOP_K)) for graph in predictions]
        kinds = {
            "": [slow_ranks(row, *pair, protocol) for row, pair in zip(rows, pairs, strict=True)],
            "ng-": [
                slow_ranks(row, *pair, protocol) for row, pair in zip(free, pairs, strict=True)
            ],
            "pair_": [
                slow_ranks(row, *pair, protocol, any_predicate=True)
                for row, pair in zip(rows, pairs, strict=True)
            ],
        }
        for prefix, ranks in kinds.items():
            for k in TOP_K:
                expected = slow_recalls(ranks, references, predictions, k, protocol, num_predicates)
                check_figures(report, prefix, k, expected)


def check_figures(report, prefix, k, expected):
    assert report[f"{prefix}R@{k}"] == pytest.approx(expected["R"], abs=1e-12)
    if prefix == "pair_":
        return
    assert report[f"{prefix}mR@{k}"] == pytest.approx(expected["mR"], abs=1e-12)
    assert report[f"{prefix}micro_R@{k}"] == pytest.approx(expected["micro_R"], abs=1e-12)
    mean = harmonic_mean(expected["R"], expected["mR"])
    assert report[f"{prefix}F@{k}"] == pytest.approx(mean, abs=1e-12)
    by_predicate = {str(number): value for number, value in expected["by_predicate"].items()}
    assert report["per_predicate"][f"{prefix}R@{k}"] == pytest.approx(by_predicate, abs=1e-12)


@pytest.mark.parametrize("overlap", ["exact", "pixels", "inflated"])
@pytest.mark.parametrize("iou_threshold", [0.5, 0.8])
def test_rank_of_first_hit_equals_plain_loops(overlap, iou_threshold):
    protocol = RecallProtocol(iou_threshold=iou_threshold, overlap=overlap)
    found = []
    for seed in range(6):
        for prediction, reference in zip(
            *random_images(seed, distributions=False)[:2], strict=True
        ):
            rows = slow_constrained_list(prediction, protocol)
            expected = slow_ranks(rows, prediction, reference, protocol)
            ranks = rank_of_first_hit(prediction, reference, protocol)
            assert ranks.dtype == np.int64
            assert ranks.tolist() == expected
            found += expected
    # The comparison means something: misses, first places and later ones occur.
    assert {-1, 0, 5} <= set(found)


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
    reference = two_things([[0, 1, 2]])
    assert rank_of_first_hit(make_graph(boxes, labels, [relation]), reference).tolist() == [-1]


def test_overlap_of_exactly_the_threshold_hits():
    reference = make_graph([[0, 0, 10, 10], [50, 50, 90, 90]], [0, 1], [[0, 1, 0]])
    prediction = make_graph([[0, 0, 10, 5], [50, 50, 90, 90]], [0, 1], [[0, 1, 0]])
    assert rank_of_first_hit(prediction, reference).tolist() == [0]
    # 11 x 6 of 11 x 11 pixels; with one pixel more in the intersection alone 66 of 84.
    for overlap, threshold in (("pixels", 66 / 121), ("inflated", 66 / 84)):
        protocol = RecallProtocol(iou_threshold=threshold, overlap=overlap)
        assert rank_of_first_hit(prediction, reference, protocol).tolist() == [0]
        exact = RecallProtocol(iou_threshold=threshold)
        assert rank_of_first_hit(prediction, reference, exact).tolist() == [-1]


def test_image_sizes_must_agree():
    reference = two_things([[0, 1, 2]])
    other = dataclasses.replace(reference, image_size=(50, 60))
    with pytest.raises(ValueError, match=r"image_size.*target_sizes"):
        rank_of_first_hit(other, reference)
    with pytest.raises(ValueError, match=r"image_size.*target_sizes"):
        SceneGraphRecall().update([other], [reference])


# The stated answers to edge cases, one test each; docs/evaluation.md lists them.


def test_images_without_annotation_are_left_out():
    report = measure([two_things([[0, 1, 0]])], [two_things([])])
    assert (report["num_images"], report["num_images_without_relations"]) == (0, 1)
    assert all(math.isnan(report[name]) for name in ("R@20", "mR@20", "ng-R@20", "micro_R@20"))
    assert math.isnan(SceneGraphRecall().compute()["R@100"])


@pytest.mark.parametrize(
    ("protocol", "recall", "num_images"),
    [("strict", 0.5, 2), ("egtr", 0.5, 2), ("scene_graph_benchmark", 1, 1), ("as_emitted", 1, 1)],
)
def test_images_without_prediction(protocol, recall, num_images):
    reference = two_things([[0, 1, 0]])
    nothing = SceneGraph.empty((100, 120))
    report = measure([reference, nothing], [reference] * 2, protocol=protocol, num_predicates=4)
    assert (report["R@20"], report["num_images"]) == (recall, num_images)
    assert report["num_images_without_predictions"] == 1
    # Of four predicates one is annotated; the published protocols divide by all.
    assert report["mR@20"] == (recall if protocol == "strict" else recall / 4)
    assert (report["mR_occurring@20"], report["mR_all@20"]) == (recall, recall / 4)
    assert report["num_predicates"] == (1 if protocol == "strict" else 4)
    assert report["num_predicates_annotated"] == 1


def test_fewer_predictions_than_k_are_all_looked_at():
    report = measure([two_things([[1, 0, 0], [0, 1, 0]])], [two_things([[0, 1, 0]])], top_k=(1, 9))
    assert (report["R@1"], report["R@9"]) == (0, 1)


def test_ties_keep_the_order_of_the_list():
    reference = two_things([[0, 1, 0]])
    prediction = two_things([[1, 0, 0], [0, 1, 0]], relation_scores=[0.5, 0.5])
    assert rank_of_first_hit(prediction, reference).tolist() == [1]
    distributions = [[0.5, 0.5], [0.5, 0.5]]
    prediction = dataclasses.replace(prediction, predicate_distributions=distributions)
    report = measure([prediction], [reference], top_k=(2, 3))
    assert (report["ng-R@2"], report["ng-R@3"]) == (0, 1)


def test_order_by_score_or_as_listed():
    reference = two_things([[0, 1, 0]])
    prediction = two_things([[1, 0, 0], [0, 1, 0]], relation_scores=[0.2, 0.9])
    assert rank_of_first_hit(prediction, reference).tolist() == [0]
    for name in ("scene_graph_benchmark", "egtr", "as_emitted"):
        assert rank_of_first_hit(prediction, reference, PROTOCOLS[name]).tolist() == [1]


def test_several_predicates_on_a_pair():
    reference = two_things([[0, 1, 1]])
    prediction = two_things([[0, 1, 0], [0, 1, 1], [1, 0, 1]])
    for name, ranks in (("strict", [-1]), ("as_emitted", [1]), ("egtr", [1])):
        assert rank_of_first_hit(prediction, reference, PROTOCOLS[name]).tolist() == ranks
    report = measure([prediction], [reference], top_k=(2,))
    assert (report["R@2"], report["ng-R@2"], report["pair_R@2"]) == (0, 1, 1)
    # A row that knows all probabilities says the likeliest, where the protocol takes row by row.
    likely = [[0.1, 0.2], [0.8, 0.3], [0.5, 0.4]]
    prediction = dataclasses.replace(prediction, predicate_distributions=likely)
    for name, ranks in (("strict", [-1]), ("as_emitted", [1]), ("egtr", [0])):
        assert rank_of_first_hit(prediction, reference, PROTOCOLS[name]).tolist() == ranks


def test_duplicates_are_counted_and_take_places_only_in_published_protocols():
    reference = two_things([[0, 1, 1], [0, 1, 1], [1, 0, 0]])
    prediction = two_things(
        [[0, 1, 0], [0, 1, 0], [1, 0, 0]],
        predicate_distributions=[[0.9, 0.1], [0.9, 0.8], [0.7, 0.1]],
    )
    report = measure([prediction], [reference], top_k=(2,))
    assert (report["num_repeated_annotations"], report["num_repeated_predictions"]) == (1, 1)
    # Without repeats: (0, 1, 0) .9, (0, 1, 1) .8, (1, 0, 0) .7. Both annotations of one count.
    assert report["ng-R@2"] == pytest.approx(2 / 3)
    assert report["R@2"] == pytest.approx(1 / 3)
    report = measure([prediction], [reference], top_k=(2,), protocol="egtr", num_predicates=2)
    assert report["ng-R@2"] == 0
    assert report["R@2"] == 0


def test_one_prediction_may_hit_several_annotations_and_the_other_way_round():
    reference = make_graph(TWO_BOXES * 2, [0, 1] * 2, [[0, 1, 2], [2, 3, 2]])
    prediction = make_graph(TWO_BOXES * 2, [0, 1] * 2, [[0, 1, 2], [2, 3, 2]])
    assert rank_of_first_hit(prediction, reference).tolist() == [0, 0]


def test_scores_that_are_not_numbers_are_an_error():
    for field in ("scores", "relation_scores"):
        with pytest.raises(ValueError, match=f"`{field}` must be finite"):
            two_things([[0, 1, 0], [1, 0, 0]], **{field: [np.nan, 1.0]})
    with pytest.raises(ValueError, match="`predicate_distributions` must be finite"):
        two_things([[0, 1, 0]], predicate_distributions=[[np.nan, 1.0]])


def test_hand_made_case():
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
    groups = {"head": [0], "rare": [3, 1]}
    report = measure(
        predictions, references, top_k=(1, 2), id2predicate={0: "on"}, predicate_groups=groups
    )
    assert report["R@1"] == pytest.approx((0.5 + 0.0) / 2)
    assert report["R@2"] == pytest.approx((1.0 + 0.0) / 2)
    per_predicate = report["per_predicate"]
    assert per_predicate["R@1"] == {"on": 0.0, "3": 1.0}
    assert per_predicate["R@2"] == {"on": 0.5, "3": 1.0}
    assert (report["mR@1"], report["mR@2"]) == (0.5, 0.75)
    assert report["F@2"] == pytest.approx(0.6)
    assert (report["mR_head@2"], report["mR_rare@2"]) == (0.5, 1.0)
    # Two annotations of predicate 0, one of predicate 3.
    assert report["wR@2"] == pytest.approx((2 * 0.5 + 1.0) / 3)
    assert (report["num_images"], report["num_predicates"], report["num_relations"]) == (2, 2, 3)
    assert (report["protocol"]["name"], report["mode"], report["unit"]) == (
        ("strict", "sgdet", "decimal")
    )
    assert report["num_predictions"] == 3
    json.dumps(report)


def test_groups_follow_the_frequency_of_annotations():
    relations = [[0, 1, 0]] * 6 + [[0, 1, 1]] * 3 + [[0, 1, 2]]
    reference = two_things(relations)
    prediction = two_things([[0, 1, 1], [0, 1, 2]])
    report = measure([prediction], [reference], protocol="as_emitted", num_predicates=4)
    # Predicates 0, 1 and 2; number 3 is never annotated and counts as 0.
    assert (report["mR_head@20"], report["mR_body@20"], report["mR_tail@20"]) == (0, 1, 0.5)
    report = measure([prediction], [reference])
    assert (report["mR_head@20"], report["mR_body@20"]) == (0, 1)


def test_unseen_and_rare_triplets():
    seen = count_training_triplets(iter([two_things([[0, 1, 0]] * 3)]))
    assert seen.count(np.array([[0, 1, 0], [1, 0, 1]])).tolist() == [3, 0]
    assert seen.predicate_counts(2) == [3, 0]
    first, second = two_things([[0, 1, 0], [1, 0, 1]]), two_things([[0, 1, 0]])
    report = measure(
        [two_things([[1, 0, 1]]), second], [first, second], top_k=(5,), seen_triplets=seen
    )
    # The second image has nothing unseen and does not count.
    assert (report["zR@5"], report["ng-zR@5"], report["R@5"]) == (1, 1, 0.75)
    assert report["rarity_R@5"] == pytest.approx((1 + 1 / 4) / (1 + 1 / 4 + 1 / 4))
    report = measure([second], [second], top_k=(5,), seen_triplets=np.array([[0, 1, 0]]))
    assert math.isnan(report["zR@5"])
    assert "rarity_R@5" not in report
    listed = TrainingTriplets(np.zeros((0, 3)), unseen=np.array([[0, 1, 0]]))
    report = measure([second], [first], top_k=(5,), seen_triplets=listed)
    assert (report["zR@5"], report["R@5"]) == (1, 0.5)


def test_given_entities():
    reference = two_things([[0, 1, 0]])
    # Boxes and classes are wrong; the relation is not.
    prediction = make_graph([[0, 0, 5, 5], [6, 6, 9, 9]], [1, 1], [[0, 1, 0]])
    rightly_named = make_graph([[0, 0, 5, 5], [6, 6, 9, 9]], [0, 1], [[0, 1, 0]])
    for mode, graph, recall in (
        ("sgdet", prediction, 0), ("sgcls", prediction, 0), ("sgcls", rightly_named, 1),
        ("predcls", prediction, 1),
    ):  # fmt: skip
        report = measure([graph], [reference], measured=Measured(mode=mode))
        assert (report["R@20"], report["mode"]) == (recall, mode)
    # The classes are given, and so is that they are sure of them.
    unsure = two_things(
        [[0, 1, 0], [1, 0, 0]], scores=[0.1, 1.0], predicate_distributions=[[0.5, 0.9], [0.7, 0]]
    )
    report = measure([unsure], [reference], top_k=(3,), measured=Measured(mode="predcls"))
    assert report["ng-R@3"] == 1
    with pytest.raises(ValueError, match=r"predcls.*has 3, annotated are 2"):
        measure(
            [make_graph([*TWO_BOXES, TWO_BOXES[0]], [0, 1, 1], [])],
            [reference],
            measured=Measured(mode="predcls"),
        )


def test_masks_instead_of_boxes():
    masks = np.zeros((2, 100, 120), dtype=bool)
    masks[0, 10:30, 10:30], masks[1, 50:90, 50:90] = True, True
    reference = two_things([[0, 1, 0]], masks=masks)
    half, less = masks.copy(), masks.copy()
    half[0, 10:20] = False
    less[0, 10:21] = False
    protocol = RecallProtocol(overlap="masks")
    assert rank_of_first_hit(two_things([[0, 1, 0]], masks=half), reference, protocol) == [0]
    assert rank_of_first_hit(two_things([[0, 1, 0]], masks=less), reference, protocol) == [-1]
    with pytest.raises(ValueError, match="prediction has no `masks`"):
        SceneGraphRecall(protocol=protocol).update([two_things([])], [reference])


def test_masks_equal_plain_loops():
    generator = np.random.default_rng(5)
    protocol = RecallProtocol(overlap="masks", iou_threshold=0.4)
    predictions, references, _ = random_images(1, distributions=False)
    predictions, references = (
        [
            dataclasses.replace(graph, masks=generator.random((graph.num_entities, 100, 100)) < 0.6)
            for graph in graphs
        ]
        for graphs in (predictions, references)
    )
    report = measure(predictions, references, top_k=TOP_K, protocol=protocol)
    ranks = [
        slow_ranks(slow_constrained_list(prediction, protocol), prediction, reference, protocol)
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    for k in TOP_K:
        expected = slow_recalls(ranks, references, predictions, k, protocol, None)
        check_figures(report, "", k, expected)
    assert 0 < report["R@1"] < report["R@20"]


@pytest.mark.parametrize("distributions", [False, True])
def test_processes_together_give_the_bits_of_one(distributions):
    predictions, references, num_predicates = random_images(
        3, distributions=distributions, num_images=BATCH_IMAGES + 20
    )
    arguments = {
        "top_k": TOP_K,
        "num_predicates": num_predicates,
        "seen_triplets": count_training_triplets(references[:5]),
        "measured": Measured(precision=True),
    }
    whole = measure(predictions, references, **arguments)
    first, second, third = (SceneGraphRecall(**arguments) for _ in range(3))
    for metric, part in ((second, slice(1, None, 3)), (first, slice(0, None, 3))):
        metric.update(predictions[part], references[part])
    for prediction, reference in zip(predictions[2::3], references[2::3], strict=True):
        third.update([prediction], [reference])
    third.merge(first)
    third.merge_state(pickle.loads(pickle.dumps(second.state_dict())))
    assert as_bits(third.compute()) == as_bits(whole)
    # What a metric gave away stays its own.
    first.update(predictions[:1], references[:1])
    assert as_bits(third.compute()) == as_bits(whole)
    third.reset()
    third.update(predictions, references)
    assert as_bits(third.compute()) == as_bits(whole)


def as_bits(report):
    return json.dumps(report)


def test_state_is_small():
    predictions, references, _ = random_images(3, distributions=True, num_images=50)
    metric = SceneGraphRecall()
    metric.update(predictions, references)
    num_relations = sum(graph.num_relations for graph in references)
    assert sum(array.nbytes for array in metric.state_dict().values()) < 30 * num_relations + 1000


def test_without_constraint_a_pair_may_say_everything():
    graph = dataclasses.replace(
        two_things([[0, 1, 0], [1, 0, 0]]),
        scores=[1.0, 0.5],
        predicate_distributions=[[0.9, 0.2], [0.3, 0.8]],
    )
    free = without_constraint(graph, top_k=3)
    assert free.relations.tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(free.relation_scores, [0.45, 0.4, 0.15], rtol=1e-6)
    with pytest.raises(ValueError, match="predicate_distributions"):
        without_constraint(two_things([[0, 1, 0]]))


def test_arguments_are_checked():
    graph = two_things([[0, 1, 7]])
    for call, words in (
        (lambda: SceneGraphRecall(top_k=()), "top_k"),
        (lambda: SceneGraphRecall(top_k=(0, 20)), "top_k"),
        (lambda: SceneGraphRecall(protocol="other"), r"one of strict, .*'other'"),
        (lambda: SceneGraphRecall(protocol="egtr"), "num_predicates"),
        (lambda: SceneGraphRecall(num_predicates=7).update([graph], [graph]), "predicate 7"),
        (lambda: SceneGraphRecall().update([graph], []), "one graph for each image"),
        (lambda: RecallProtocol(overlap="circles"), r"overlap.*exact.*circles"),
        (lambda: RecallProtocol(iou_threshold=0), "iou_threshold"),
        (lambda: Measured(mode="sg"), r"mode.*predcls.*'sg'"),
        (lambda: TrainingTriplets(np.zeros((2, 4))), r"triplets.*\(n, 3\)"),
        (lambda: TrainingTriplets(np.zeros((2, 3)), np.ones(3)), "counts"),
        (lambda: SceneGraphRecall().merge_state({"ranks": np.zeros(0)}), "state lacks"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    other = SceneGraphRecall(protocol="egtr", num_predicates=9)
    with pytest.raises(ValueError, match="protocol"):
        SceneGraphRecall().merge(other)


def test_distributions_must_be_everywhere_or_nowhere():
    graph = two_things([[0, 1, 0]])
    known = dataclasses.replace(graph, predicate_distributions=[[0.5, 0.5]])
    with pytest.raises(ValueError, match="in all predictions or in none"):
        SceneGraphRecall().update([graph, known], [graph, graph])
    nothing = SceneGraph.empty(graph.image_size)
    assert measure([nothing, known], [graph, graph])["ng-R@20"] == 0.5
    without = Measured(no_constraint=False)
    assert "ng-R@20" not in measure([graph, known], [graph, graph], measured=without)
    with pytest.raises(ValueError, match=r"2 columns.*predicate 3"):
        measure([known], [two_things([[0, 1, 3]])])


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
    ceiling = DetectorCeiling()
    ceiling.update(detections, references)
    report = ceiling.compute()
    assert report["R"] == pytest.approx((0.5 + 0.0) / 2)
    assert report["per_predicate"] == {"0": 0.5, "3": 0.0}
    assert report["mR"] == pytest.approx(0.25)
    assert report["num_images"] == 2


def test_no_recall_is_above_the_detector_ceiling():
    predictions, references, _ = random_images(7, distributions=False, num_images=30)
    for prediction, reference in zip(predictions, references, strict=True):
        ranks = rank_of_first_hit(prediction, reference)
        assert (reachable_triplets(prediction, reference) | (ranks < 0)).all()
    parts = DetectorCeiling(), DetectorCeiling()
    for part, images in zip(parts, (slice(20), slice(20, None)), strict=True):
        part.update(predictions[images], references[images])
    parts[0].merge_state(parts[1].state_dict())
    whole = DetectorCeiling()
    whole.update(predictions, references)
    assert parts[0].compute() == whole.compute()
    assert measure(predictions, references)["R@100"] < whole.compute()["R"] < 1
    assert STRICT.name == "strict"
