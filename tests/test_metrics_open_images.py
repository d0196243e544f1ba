import numpy as np
import pytest

from sgtr_hf.metrics.open_images import OpenImagesScore, average_precision, best_predicates
from sgtr_hf.scene_graph import SceneGraph


def random_graph(generator, num_entities, num_relations, *, scored):
    corners = generator.integers(0, 40, (num_entities, 2))
    sizes = generator.integers(15, 60, (num_entities, 2))
    relations = np.array(
        [
            [*generator.choice(num_entities, 2, replace=False), generator.integers(3)]
            for _ in range(num_relations)
        ]
    ).reshape(-1, 3)
    return SceneGraph(
        boxes_xyxy=np.concatenate((corners, corners + sizes), axis=1),
        labels=generator.integers(0, 2, num_entities),
        scores=np.ones(num_entities),
        relations=relations,
        relation_scores=generator.random(num_relations) if scored else np.ones(num_relations),
        image_size=(100, 100),
    )


def iou(first, second):
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    inside = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return inside / (sum(areas) - inside)


def around(first, second):
    return [*np.minimum(first[:2], second[:2]), *np.maximum(first[2:], second[2:])]


def slow_precision(predictions, references, predicate, kind):
    """One detection after the other over all images, as the definition says."""
    detections = [
        (score, image, relation)
        for image, graph in enumerate(predictions)
        for score, relation in zip(graph.relation_scores, graph.relations, strict=True)
        if relation[2] == predicate
    ]
    detections.sort(key=lambda row: -row[0])
    taken, hits = set(), []
    for _, image, (subject, object_, _) in detections:
        graph, reference = predictions[image], references[image]
        best, best_overlap = None, 0.0
        for number, (other_subject, other_object, other) in enumerate(reference.relations):
            same = graph.labels[subject] == reference.labels[other_subject]
            same &= graph.labels[object_] == reference.labels[other_object]
            if other != predicate or not same:
                continue
            ours = graph.boxes_xyxy[[subject, object_]]
            theirs = reference.boxes_xyxy[[other_subject, other_object]]
            if kind == "rel":
                overlap = min(iou(ours[0], theirs[0]), iou(ours[1], theirs[1]))
            else:
                overlap = iou(around(*ours), around(*theirs))
            if overlap > best_overlap:
                best, best_overlap = (image, number), overlap
        is_hit = best_overlap > 0.5 and best not in taken
        hits.append(is_hit)
        taken |= {best} if is_hit else set()
    count = sum(int((graph.relations[:, 2] == predicate).sum()) for graph in references)
    area, found = 0.0, np.cumsum(hits)
    for position, is_hit in enumerate(hits):
        if is_hit:
            later = [found[p] / (p + 1) for p in range(position, len(hits))]
            area += max(later) / count
    return area, count


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_the_definition_in_loops(seed):
    generator = np.random.default_rng(seed)
    references = [random_graph(generator, 5, 4, scored=False) for _ in range(8)]
    predictions = [random_graph(generator, 7, 12, scored=True) for _ in range(8)]
    # Some predictions are right.
    predictions[:3] = [
        SceneGraph(
            graph.boxes_xyxy, graph.labels, graph.scores, graph.relations,
            generator.random(len(graph.relations)), graph.image_size,
        )
        for graph in references[:3]
    ]  # fmt: skip
    metric = OpenImagesScore()
    metric.update(predictions, references)
    report = metric.compute()
    for kind in ("rel", "phr"):
        expected = {
            predicate: slow_precision(predictions, references, predicate, kind)
            for predicate in range(3)
        }
        found = report["per_predicate"][f"AP_{kind}"]
        for predicate, (area, _) in expected.items():
            assert found[str(predicate)] == pytest.approx(area, abs=1e-9)
        areas, counts = zip(*expected.values(), strict=True)
        assert report[f"wmAP_{kind}"] == pytest.approx(np.average(areas, weights=counts))
    score = 0.2 * report["micro_R@50"] + 0.4 * report["wmAP_rel"] + 0.4 * report["wmAP_phr"]
    assert report["score_wtd"] == pytest.approx(score)


def test_processes_together_equal_one():
    generator = np.random.default_rng(0)
    references = [random_graph(generator, 5, 4, scored=False) for _ in range(6)]
    predictions = [random_graph(generator, 6, 9, scored=True) for _ in range(6)]
    whole, first, second = OpenImagesScore(), OpenImagesScore(), OpenImagesScore()
    whole.update(predictions, references)
    first.update(predictions[:2], references[:2])
    second.update(predictions[2:], references[2:])
    first.merge_state(second.state_dict())
    assert first.compute() == whole.compute()


def test_precision_at_its_limits():
    assert average_precision(np.array([True, True]), 2) == 1
    assert average_precision(np.array([False, True]), 1) == 0.5
    assert average_precision(np.zeros(0, dtype=np.bool_), 3) == 0
    assert np.isnan(OpenImagesScore().compute()["wmAP_rel"])
    with pytest.raises(ValueError, match="iou_threshold"):
        OpenImagesScore(iou_threshold=1.0)


def test_each_relation_says_its_best_predicates():
    graph = SceneGraph(
        boxes_xyxy=[[0, 0, 10, 10], [20, 20, 30, 30]],
        labels=[0, 1],
        scores=[1.0, 0.5],
        relations=[[0, 1, 2], [1, 0, 0]],
        relation_scores=[0.5, 0.4],
        image_size=(50, 50),
        predicate_distributions=[[0.1, 0.3, 0.9], [0.8, 0.2, 0.1]],
    )
    more = best_predicates(graph, count=2, top_k=3)
    assert more.relations.tolist() == [[0, 1, 2], [1, 0, 0], [0, 1, 1]]
    np.testing.assert_allclose(more.relation_scores, [0.45, 0.4, 0.15], rtol=1e-6)
