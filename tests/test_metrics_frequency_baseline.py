import dataclasses
from collections import Counter

import numpy as np
import pytest

from sgtr_hf.metrics.frequency_baseline import FrequencyBaseline
from sgtr_hf.metrics.recall import SceneGraphRecall
from sgtr_hf.scene_graph import SceneGraph


def make_graph(labels, relations=(), scores=None, boxes=None):
    num_entities = len(labels)
    corners = np.arange(num_entities)[:, None] * 10.0 + [0.0, 0.0, 8.0, 8.0]
    return SceneGraph(
        boxes_xyxy=corners if boxes is None else boxes,
        labels=labels,
        scores=np.ones(num_entities) if scores is None else scores,
        relations=list(relations),
        relation_scores=np.ones(len(relations)),
        image_size=(400, 400),
    )


CUP, TABLE, BALL = 0, 1, 2
ON, UNDER, NEAR = 0, 1, 2


@pytest.fixture
def baseline():
    """Cups are on tables in 2 of 4 pairs, near them in 1; two balls are near each other."""
    graphs = [
        make_graph([CUP, TABLE, CUP], [[0, 1, ON], [2, 1, ON], [0, 1, NEAR], [1, 0, UNDER]]),
        make_graph([TABLE, CUP], []),
        make_graph([CUP, TABLE], []),
        make_graph([BALL, BALL], [[0, 1, NEAR], [0, 1, NEAR]]),
    ]
    return FrequencyBaseline(num_labels=3, num_predicates=3).fit(graph for graph in graphs)


def test_fit_counts_pairs_and_triplets(baseline):
    assert baseline.pair_counts.tolist() == [[2, 4, 0], [4, 0, 0], [0, 0, 2]]
    assert baseline.triplet_counts[CUP, TABLE].tolist() == [2, 0, 1]
    assert baseline.triplet_counts[TABLE, CUP].tolist() == [0, 1, 0]
    assert baseline.triplet_counts[BALL, BALL].tolist() == [0, 0, 1]
    assert baseline.triplet_counts.sum() == 5
    assert baseline.probabilities(CUP, TABLE).tolist() == [0.5, 0.0, 0.25]
    assert baseline.probabilities(BALL, CUP).tolist() == [0.0, 0.0, 0.0]


def test_fit_leaves_out_relations_of_an_entity_with_itself():
    baseline = FrequencyBaseline(3, 3).fit([make_graph([CUP, TABLE], [[0, 0, ON]])])
    assert baseline.triplet_counts.sum() == 0


def test_predict_multiplies_scores_and_frequency(baseline):
    entities = make_graph([TABLE, CUP, CUP, BALL], scores=[0.5, 0.8, 1.0, 0.9])
    graph = baseline.predict(entities)
    assert graph.relations.tolist() == [[2, 0, ON], [1, 0, ON], [0, 2, UNDER], [0, 1, UNDER]]
    assert graph.relation_scores == pytest.approx([0.25, 0.2, 0.125, 0.1])
    assert graph.labels.tolist() == entities.labels.tolist()
    assert np.array_equal(graph.boxes_xyxy, entities.boxes_xyxy)


def test_predict_without_constraint_adds_other_predicates(baseline):
    entities = make_graph([TABLE, CUP], scores=[1.0, 1.0])
    constrained = baseline.predict(entities)
    graph = baseline.predict(entities, graph_constraint=False)
    assert constrained.relations.tolist() == [[1, 0, ON], [0, 1, UNDER]]
    # Equal scores in the order of subject, object and predicate.
    assert graph.relations.tolist() == [[1, 0, ON], [0, 1, UNDER], [1, 0, NEAR]]
    best = baseline.predict(entities, top_k=2, graph_constraint=False)
    assert best.relations.tolist() == [[1, 0, ON], [0, 1, UNDER]]


@pytest.mark.parametrize("graph_constraint", [True, False])
def test_predict_agrees_with_plain_loops(graph_constraint):
    generator = np.random.default_rng(5)
    graphs = []
    for _ in range(30):
        pairs = [generator.choice(6, 2, replace=False) for _ in range(8)]
        relations = [(*pair, generator.integers(4)) for pair in pairs]
        graphs.append(make_graph(generator.integers(0, 5, 6), relations))
    baseline = FrequencyBaseline(5, 4).fit(graphs)

    pair_counts, triplet_counts = Counter(), Counter()
    for graph in graphs:
        labels = graph.labels.tolist()
        for one, label in enumerate(labels):
            pair_counts.update((label, other) for two, other in enumerate(labels) if one != two)
        for subject, object_, predicate in set(map(tuple, graph.relations.tolist())):
            triplet_counts[labels[subject], labels[object_], predicate] += 1

    entities = make_graph(generator.integers(0, 5, 12), scores=generator.random(12))
    labels, scores = entities.labels.tolist(), entities.scores.tolist()
    expected = {}
    for subject in range(12):
        for object_ in set(range(12)) - {subject}:
            ends = labels[subject], labels[object_]
            entity_score = scores[subject] * scores[object_]
            of_pair = {
                (subject, object_, predicate): entity_score
                * triplet_counts[(*ends, predicate)]
                / pair_counts[ends]
                for predicate in range(4)
                if triplet_counts[(*ends, predicate)]
            }
            if graph_constraint and of_pair:
                of_pair = dict([max(of_pair.items(), key=lambda item: item[1])])
            expected |= of_pair
    graph = baseline.predict(entities, 1000, graph_constraint=graph_constraint)
    found = dict(
        zip(map(tuple, graph.relations.tolist()), graph.relation_scores.tolist(), strict=True)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert (np.diff(graph.relation_scores) <= 0).all()
    best = baseline.predict(entities, 7, graph_constraint=graph_constraint)
    assert best.relations.tolist() == graph.relations[:7].tolist()


def test_predict_replaces_what_belongs_to_old_relations(baseline):
    annotated = dataclasses.replace(
        make_graph([TABLE, CUP], [[0, 1, NEAR]]), predicate_distributions=np.ones((1, 3))
    )
    graph = baseline.predict(annotated)
    assert graph.relations.tolist() == [[1, 0, ON], [0, 1, UNDER]]
    assert graph.predicate_distributions is None


@pytest.mark.parametrize("labels", [[], [CUP]], ids=["none", "one"])
@pytest.mark.parametrize("graph_constraint", [True, False])
def test_predict_with_too_few_entities_is_empty(baseline, labels, graph_constraint):
    graph = baseline.predict(make_graph(labels), graph_constraint=graph_constraint)
    assert graph.relations.shape == (0, 3)


def test_baseline_with_true_boxes_goes_through_the_same_recall(baseline):
    reference = make_graph([CUP, TABLE], [[0, 1, ON], [1, 0, NEAR]])
    metric = SceneGraphRecall(top_k=(1, 20))
    metric.update([baseline.predict(reference)], [reference])
    assert metric.compute()["R@20"] == pytest.approx(0.5)


def test_saved_baseline_is_the_same(baseline, tmp_path):
    # A name without the usual ending is kept.
    path = tmp_path / "counts"
    baseline.save(path)
    loaded = FrequencyBaseline.load(path)
    assert np.array_equal(loaded.triplet_counts, baseline.triplet_counts)
    assert np.array_equal(loaded.pair_counts, baseline.pair_counts)
    loaded.fit([make_graph([CUP, TABLE], [[0, 1, ON]])])
    assert loaded.probabilities(CUP, TABLE)[ON] == pytest.approx(3 / 5)


def test_baseline_arguments_are_checked(baseline):
    with pytest.raises(ValueError, match="num_labels"):
        FrequencyBaseline(0, 3)
    with pytest.raises(ValueError, match="num_predicates"):
        FrequencyBaseline(3, 0)
    with pytest.raises(ValueError, match="top_k"):
        baseline.predict(make_graph([CUP]), top_k=0)
    with pytest.raises(ValueError, match=r"labels.*3.*num_labels"):
        baseline.predict(make_graph([CUP, 3]))
    with pytest.raises(ValueError, match=r"relations.*num_predicates"):
        baseline.fit([make_graph([CUP, TABLE], [[0, 1, 3]])])
