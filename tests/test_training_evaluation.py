import json
import subprocess
import sys
from pathlib import Path

import pytest

from sgtr_hf import SgtrDetrConfig
from sgtr_hf.data.training_dataset import Collator, SceneGraphDataset, load_split
from sgtr_hf.metrics.frequency_baseline import FrequencyBaseline
from sgtr_hf.training.evaluation import Evaluator, check_vocabularies, evaluate, format_figures
from sgtr_hf.training.setup_run import make_image_processor, make_model
from tiny_training_run import ENTITIES, PREDICATES, make_recipe, write_squares


LABELS, PREDICATE_NAMES = dict(enumerate(ENTITIES)), dict(enumerate(PREDICATES))
SCRIPT = Path(__file__).parents[1] / "scripts" / "evaluate_model.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def figures(data):
    recipe = make_recipe(data, "run", task="scene_graph")
    processor = make_image_processor(recipe)
    train = SceneGraphDataset(load_split(data, "train"))
    baseline = FrequencyBaseline(3, 3).fit(train.references())
    evaluator = Evaluator(processor, LABELS, PREDICATE_NAMES, baseline)
    validation = SceneGraphDataset(load_split(data, "validation"))
    collate = Collator(processor)
    batches = [collate([validation[index] for index in part]) for part in ((0, 1, 2), (3, 4))]
    evaluate(make_model(recipe, LABELS, PREDICATE_NAMES), batches, evaluator)
    return evaluator.compute()


def test_true_entities_leave_the_baseline_one_guess(figures):
    # The first square is left of the second: a pair of classes seen in training is found.
    assert figures["baseline_true_entities_R@20"] >= 0.8
    assert figures["details"]["model"]["num_images"] == 5
    assert figures["R@20"] <= figures["ceiling_R"]


def test_figures_are_plain_json(figures):
    flat = {name: value for name, value in figures.items() if name != "details"}
    assert json.loads(json.dumps(flat)) == flat


def test_the_table_has_a_row_for_each_comparison(figures):
    table = format_figures(figures | {"R@50": None, "baseline_mR@100": 0.12345})
    lines = table.splitlines()
    assert lines[0].startswith("detection  AP ")
    assert lines[2].split() == ["R@20", "mR@20", "R@50", "mR@50", "R@100", "mR@100"]
    rows = {line[:40].strip(): line[40:].split() for line in lines[3:8]}
    assert rows["model"][2] == "-"
    assert rows["frequency baseline, one predicate a pair"][-1] == "0.123"
    assert len(rows) == 5
    assert lines[8].startswith("reachable with these detections")
    assert len(format_figures({"AP": 0.5, "AP50": 0.75, "AP75": None}).splitlines()) == 1


def test_data_with_another_vocabulary_is_an_error(data):
    dataset = SceneGraphDataset(load_split(data, "validation"))
    check_vocabularies(SgtrDetrConfig(id2label=LABELS), dataset)
    swapped = SgtrDetrConfig(id2label={0: "green", 1: "red", 2: "blue"})
    with pytest.raises(ValueError, match=r"id2label.*green"):
        check_vocabularies(swapped, dataset)


@pytest.mark.slow
def test_the_script_prints_the_table_and_writes_the_report(data, tmp_path):
    recipe = make_recipe(data, "run", task="scene_graph")
    make_model(recipe, LABELS, PREDICATE_NAMES).save_pretrained(tmp_path / "model")
    make_image_processor(recipe).save_pretrained(tmp_path / "model")
    command = [sys.executable, SCRIPT, tmp_path / "model", data, "--split", "validation"]
    done = subprocess.run(
        [*command, "--output", tmp_path / "report.json"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "frequency baseline, true entities" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 5
    assert {"R@20", "mR@100", "AP50", "ceiling_R"} <= report["figures"].keys()
