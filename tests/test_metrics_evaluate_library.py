import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sgtr_hf
from sgtr_hf.metrics.recall import Measured, SceneGraphRecall
from sgtr_hf.metrics.record_input import graphs_of_records, record_of_graph
from slow_evaluation import random_images


evaluate = pytest.importorskip("evaluate")

# What one of several processes does with its share of the images.
WORKER = """
import json, sys
import evaluate, sgtr_hf
sys.path.insert(0, sys.argv[1])
from slow_evaluation import random_images
from sgtr_hf.metrics.record_input import record_of_graph

rank, cache = int(sys.argv[2]), sys.argv[3]
predictions, references, num_predicates = random_images(2, distributions=True, num_images=21)
metric = evaluate.load(
    sgtr_hf.metrics.path("scene_graph_recall"),
    cache_dir=cache, num_process=2, process_id=rank, experiment_id="pair",
)
for number in range(rank, 21, 2):
    metric.add_batch(
        predictions=[record_of_graph(predictions[number])],
        references=[record_of_graph(references[number])],
    )
print(json.dumps(metric.compute(protocol="egtr", num_predicates=num_predicates)))
"""


def load(tmp_path):
    path = sgtr_hf.metrics.path("scene_graph_recall")
    return evaluate.load(path, cache_dir=str(tmp_path))


def records(graphs):
    return [record_of_graph(graph) for graph in graphs]


@pytest.mark.parametrize("distributions", [False, True])
def test_the_metric_loads_offline_and_gives_the_same(tmp_path, distributions):
    predictions, references, num_predicates = random_images(
        0, distributions=distributions, num_images=70
    )
    metric = load(tmp_path)
    for start in range(0, 70, 30):
        part = slice(start, start + 30)
        metric.add_batch(
            predictions=records(predictions[part]), references=records(references[part])
        )
    seen = [[0, 1, 0]]
    settings = {"top_k": (5, 20), "num_predicates": num_predicates}
    report = metric.compute(precision=True, seen_triplets=seen, **settings)
    own = SceneGraphRecall(
        **settings, seen_triplets=np.array(seen), measured=Measured(precision=True)
    )
    own.update(predictions, references)
    assert json.dumps(report) == json.dumps(own.compute())
    # Used again, it has forgotten.
    metric.add(prediction=record_of_graph(predictions[0]), reference=record_of_graph(references[0]))
    assert metric.compute(protocol="as_emitted", num_predicates=num_predicates)["num_images"] <= 1


def test_records_need_not_have_every_entry(tmp_path):
    prediction = {
        "width": 50, "height": 40,
        "objects": [
            {"bbox": [0, 0, 9, 9], "label": 0, "score": 0.9},
            {"bbox": [20, 20, 39, 39], "label": 1, "score": 0.8},
        ],
        "relations": [{"subject": 0, "object": 1, "predicate": 2, "score": 0.5}],
    }  # fmt: skip
    reference = json.loads(json.dumps(prediction))
    for entry in (*reference["objects"], *reference["relations"]):
        del entry["score"]
    report = load(tmp_path).compute(predictions=[prediction], references=[reference])
    assert report["R@20"] == 1


def test_wrong_records_are_named(tmp_path):
    graph = random_images(0, distributions=False)[0][0]
    good = record_of_graph(graph)
    bad = json.loads(json.dumps(good))
    bad["relations"][0]["subject"] = 99
    with pytest.raises(ValueError, match=r"Record 1: `relations` holds 99.* 1 good records"):
        list(graphs_of_records([good, bad]))
    bad = json.loads(json.dumps(good))
    del bad["objects"][0]["label"]
    with pytest.raises(ValueError, match=r"Record 0: 'label'"):
        list(graphs_of_records([bad]))
    assert next(graphs_of_records([good])) == graph


def test_other_names_are_an_error():
    with pytest.raises(ValueError, match=r"one of scene_graph_recall, got 'recall'"):
        sgtr_hf.metrics.path("recall")


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    arguments = [sys.executable, "-c", WORKER, str(Path(__file__).parent)]
    workers = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    predictions, references, num_predicates = random_images(2, distributions=True, num_images=21)
    own = SceneGraphRecall(protocol="egtr", num_predicates=num_predicates)
    own.update(predictions, references)
    assert json.loads(outputs[0]) == json.loads(json.dumps(own.compute()))
    assert json.loads(outputs[1]) is None
