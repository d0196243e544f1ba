"""The recalls of the original evaluator (Scene-Graph-Benchmark.pytorch, which SGTR uses)."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sgtr_hf.metrics.recall import SceneGraphRecall
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
    metric = SceneGraphRecall(TOP_K, "sgtr", num_predicates=50)
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


@pytest.mark.fidelity
def test_recall_without_constraint_equals_the_original():
    folder = os.environ.get("SGTR_GOLDEN_DIR")
    if folder is None:
        pytest.skip("SGTR_GOLDEN_DIR does not name the folder of recorded figures.")
    arrays = load_file(Path(folder) / "metrics.safetensors")
    figures = json.loads((Path(folder) / "metrics.json").read_text())["scene_graph_benchmark"]
    predictions = read_graphs(arrays, "prediction", best_pairs_and_predicates(arrays))
    report = compute(predictions, read_graphs(arrays, "truth", read_relations(arrays, "truth")))
    for k in TOP_K:
        assert report[f"R@{k}"] == pytest.approx(figures[f"sgdet_recall_nogc@{k}"], abs=1e-9)
        assert report[f"mR@{k}"] == pytest.approx(figures[f"sgdet_ng_mean_recall@{k}"], abs=1e-9)
