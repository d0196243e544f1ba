"""The recorded figures of the published evaluators, which SGTR and EGTR use."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sgtr_hf.metrics.open_images import OpenImagesScore
from sgtr_hf.metrics.recall import SceneGraphRecall, without_constraint
from sgtr_hf.metrics.training_triplets import TrainingTriplets
from sgtr_hf.scene_graph import SceneGraph


FIXTURES = Path(__file__).parent / "fixtures"
TOP_K = (20, 50, 100)
NUM_PREDICATES = 50
# Every recorded image has predictions, and rows are pairs with their likeliest predicate, so that
# the published protocols agree here.
PUBLISHED = ("scene_graph_benchmark", "egtr", "as_emitted")


def split(arrays, side, name, count):
    ends = np.cumsum(arrays[f"{side}.num_{count}"].astype(np.int64))
    return np.split(arrays[f"{side}.{name}"], ends[:-1])


def read_graphs(arrays, side, relations_of_images):
    """Graphs of recorded arrays; labels count from 1 there."""
    return [
        SceneGraph(
            boxes_xyxy=boxes,
            labels=labels.astype(np.int64) - 1,
            scores=np.ones(len(labels)),
            relations=relations,
            relation_scores=np.linspace(1.0, 0.0, len(relations)),
            image_size=(1024, 1024),
        )
        for boxes, labels, relations in zip(
            split(arrays, side, "boxes_xyxy", "entities"),
            split(arrays, side, "labels", "entities"),
            relations_of_images,
            strict=True,
        )
    ]


def read_relations(arrays, side):
    relations = split(arrays, side, "relations", "relations")
    return [part.astype(np.int64) - [0, 0, 1] for part in relations]


def compute(predictions, references, protocol, **arguments):
    metric = SceneGraphRecall(TOP_K, protocol, NUM_PREDICATES, **arguments)
    metric.update(predictions, references)
    return metric.compute()


@pytest.mark.parametrize("protocol", PUBLISHED)
def test_recall_equals_the_recorded_one(protocol):
    arrays = load_file(FIXTURES / "recall.safetensors")
    expected = json.loads((FIXTURES / "recall.json").read_text())
    graphs = [
        read_graphs(arrays, side, read_relations(arrays, side)) for side in ("prediction", "truth")
    ]
    report = compute(*graphs, protocol)
    for k in TOP_K:
        assert report[f"R@{k}"] == pytest.approx(expected[f"R@{k}"], abs=1e-9)
        assert report[f"mR@{k}"] == pytest.approx(expected[f"mR@{k}"], abs=1e-9)
    by_predicate = report["per_predicate"]["R@100"]
    found = [by_predicate.get(str(number), 0.0) for number in range(NUM_PREDICATES)]
    assert found == pytest.approx(expected["R@100 per predicate"], abs=1e-9)


@pytest.fixture(scope="module")
def recorded():
    """The figures, predictions with the scores of all predicates, annotations, all arrays."""
    folder = Path(os.environ["SGTR_GOLDEN_DIR"])
    arrays = load_file(folder / "metrics.safetensors")
    figures = json.loads((folder / "metrics.json").read_text())
    references = read_graphs(arrays, "truth", read_relations(arrays, "truth"))
    no_relations = [np.zeros((0, 3), dtype=np.int64)] * len(references)
    predictions = [
        dataclasses.replace(
            graph,
            scores=entity_scores,
            relations=np.column_stack((pairs, scores[:, 1:].argmax(axis=1))),
            relation_scores=np.linspace(1.0, 0.0, len(pairs)),
            # Column 0 is background.
            predicate_distributions=scores[:, 1:],
        )
        for graph, pairs, scores, entity_scores in zip(
            read_graphs(arrays, "prediction", no_relations),
            split(arrays, "prediction", "pairs", "pairs"),
            split(arrays, "prediction", "predicate_scores", "pairs"),
            split(arrays, "prediction", "entity_scores", "entities"),
            strict=True,
        )
    ]
    return figures, predictions, references, arrays


RECORDED_NAMES = {
    "R": "recall", "mR": "mean_recall", "zR": "zeroshot_recall", "ng-R": "recall_nogc",
    "ng-mR": "ng_mean_recall", "ng-zR": "ng_zeroshot_recall",
}  # fmt: skip


@pytest.mark.fidelity
@pytest.mark.parametrize("protocol", PUBLISHED)
def test_all_recalls_equal_the_original(recorded, protocol):
    figures, predictions, references, arrays = recorded
    unseen = arrays["zero_shot_triplets_subject_object_predicate"] - 1
    published = TrainingTriplets(np.zeros((0, 3)), unseen=unseen)
    report = compute(predictions, references, protocol, seen_triplets=published)
    for k in TOP_K:
        for ours, original in RECORDED_NAMES.items():
            expected = figures["scene_graph_benchmark"][f"sgdet_{original}@{k}"]
            assert report[f"{ours}@{k}"] == pytest.approx(expected, abs=1e-9), (ours, k)
    by_predicate = report["per_predicate"]["R@100"]
    found = [by_predicate.get(str(number), 0.0) for number in range(NUM_PREDICATES)]
    expected = figures["scene_graph_benchmark_recall_per_predicate@100"]
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.fidelity
def test_a_list_made_without_constraint_gives_the_same(recorded):
    figures, predictions, references, _ = recorded
    free = [without_constraint(graph) for graph in predictions]
    report = compute(free, references, "as_emitted")
    for k in TOP_K:
        expected = figures["scene_graph_benchmark"][f"sgdet_recall_nogc@{k}"]
        assert report[f"R@{k}"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.fidelity
def test_open_images_scores_equal_the_original(recorded):
    figures, predictions, references, _ = recorded
    metric = OpenImagesScore("egtr")
    metric.update(predictions, references)
    report = metric.compute()
    for ours, original in (
        ("micro_R@50", "microR@50"), ("wmAP_rel", "w_rel_mAP"), ("wmAP_phr", "w_phr_mAP"),
        ("score_wtd", "score"),
    ):  # fmt: skip
        expected = figures["open_images"][original]
        assert report[ours] == pytest.approx(expected, abs=1e-9), ours
