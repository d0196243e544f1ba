"""The recalls of the original evaluator (Scene-Graph-Benchmark.pytorch, which SGTR uses)."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sgtr_hf.metrics.open_images import OpenImagesScore
from sgtr_hf.metrics.training_triplets import labelled_triplets
from sgtr_hf.metrics.recall import SceneGraphRecall, without_constraint
from sgtr_hf.scene_graph import SceneGraph


FIXTURES = Path(__file__).parent / "fixtures"
TOP_K = (20, 50, 100)


@pytest.fixture(scope="module")
def recorded():
    return load_file(FIXTURES / "recall.safetensors")


@pytest.fixture(scope="module")
def expected():
    return json.loads((FIXTURES / "recall.json").read_text())


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


def compute(predictions, references):
    metric = SceneGraphRecall(TOP_K, "scene_graph_benchmark", num_predicates=50)
    metric.update(predictions, references)
    return metric.compute()


def all_graphs(arrays):
    return [
        read_graphs(arrays, side, read_relations(arrays, side)) for side in ("prediction", "truth")
    ]


def test_recall_equals_the_recorded_one(recorded, expected):
    report = compute(*all_graphs(recorded))
    for k in TOP_K:
        assert report[f"R@{k}"] == pytest.approx(expected[f"R@{k}"], abs=1e-9)
        assert report[f"mR@{k}"] == pytest.approx(expected[f"mR@{k}"], abs=1e-9)
    by_predicate = [report["per_predicate"]["R@100"].get(str(number), 0.0) for number in range(50)]
    assert by_predicate == pytest.approx(expected["R@100 per predicate"], abs=1e-9)


def best_pairs_and_predicates(arrays):
    """The best 100 of all pairs with all predicates, without the background in column 0."""
    best_of_images = []
    for pairs, scores, entity_scores in zip(
        split(arrays, "prediction", "pairs", "pairs"),
        split(arrays, "prediction", "predicate_scores", "pairs"),
        split(arrays, "prediction", "entity_scores", "entities"),
        strict=True,
    ):
        products = entity_scores[pairs].prod(axis=1)[:, None] * scores[:, 1:]
        best = np.argsort(-products, axis=None, kind="stable")[:100]
        rows, predicates = np.unravel_index(best, products.shape)
        best_of_images.append(np.column_stack((pairs[rows], predicates)))
    return best_of_images


def with_distributions(arrays, graphs):
    """The recorded predictions: every pair with its distribution, background in column 0."""
    return [
        dataclasses.replace(
            graph,
            scores=entity_scores,
            relations=np.column_stack((pairs, scores[:, 1:].argmax(axis=1))),
            relation_scores=np.zeros(len(pairs)),
            predicate_distributions=scores[:, 1:],
        )
        for graph, pairs, scores, entity_scores in zip(
            graphs,
            split(arrays, "prediction", "pairs", "pairs"),
            split(arrays, "prediction", "predicate_scores", "pairs"),
            split(arrays, "prediction", "entity_scores", "entities"),
            strict=True,
        )
    ]


@pytest.mark.fidelity
def test_all_recalls_equal_the_original():
    folder = Path(os.environ["SGTR_GOLDEN_DIR"])
    arrays = load_file(folder / "metrics.safetensors")
    figures = json.loads((folder / "metrics.json").read_text())["scene_graph_benchmark"]
    unseen = arrays["zero_shot_triplets_subject_object_predicate"] - 1
    references = read_graphs(arrays, "truth", read_relations(arrays, "truth"))
    # What is not unseen has been seen.
    all_triplets = {
        tuple(row)
        for row in np.unique(
            np.concatenate([labelled_triplets(g) for g in references]), axis=0
        ).tolist()
    }
    seen = np.array(sorted(all_triplets - {tuple(row) for row in unseen.tolist()}))
    no_relations = [np.zeros((0, 3), dtype=np.int64)] * len(references)
    pairs = with_distributions(arrays, read_graphs(arrays, "prediction", no_relations))
    emitted = [graph_of_best_predicates(graph) for graph in pairs]
    free = [without_constraint(graph) for graph in pairs]
    names = {"R": "recall", "mR": "mean_recall", "zR": "zeroshot_recall"}
    for predictions, prefix in ((emitted, ""), (free, "ng_")):
        metric = SceneGraphRecall(
            TOP_K, "scene_graph_benchmark", num_predicates=50, seen_triplets=seen
        )
        metric.update(predictions, references)
        report = metric.compute()
        for k in TOP_K:
            for ours, original in names.items():
                key = f"sgdet_{prefix}{original}@{k}"
                if (prefix, ours) == ("ng_", "R"):
                    key = f"sgdet_recall_nogc@{k}"
                assert report[f"{ours}@{k}"] == pytest.approx(figures[key], abs=1e-9), key


def graph_of_best_predicates(graph):
    """Pairs in the recorded order, each with its best predicate."""
    return dataclasses.replace(graph, relation_scores=np.linspace(1.0, 0.0, len(graph.relations)))


@pytest.mark.fidelity
def test_open_images_scores_equal_the_original():
    folder = Path(os.environ["SGTR_GOLDEN_DIR"])
    arrays = load_file(folder / "metrics.safetensors")
    figures = json.loads((folder / "metrics.json").read_text())["open_images"]
    references = read_graphs(arrays, "truth", read_relations(arrays, "truth"))
    no_relations = [np.zeros((0, 3), dtype=np.int64)] * len(references)
    pairs = with_distributions(arrays, read_graphs(arrays, "prediction", no_relations))
    metric = OpenImagesScore("egtr")
    metric.update(pairs, references)
    report = metric.compute()
    for ours, original in (
        ("micro_R@50", "microR@50"), ("wmAP_rel", "w_rel_mAP"), ("wmAP_phr", "w_phr_mAP"),
        ("score_wtd", "score"),
    ):  # fmt: skip
        assert report[ours] == pytest.approx(figures[original], abs=1e-9), ours
