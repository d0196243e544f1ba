"""The guide to fine-tuning, followed on two pictures with labels of their own."""

from pathlib import Path

import yaml
from transformers import pipeline

import dataset_files as files
import sgtr_hf
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.cli import main
from sgtr_hf.training.command import run_recipe


ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "fine_tuning.md"
RECIPE = ROOT / "recipes" / "fine_tuning.yaml"


def test_the_guide_shows_the_recipe_that_ships():
    shown = GUIDE.read_text().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(shown) == yaml.safe_load(RECIPE.read_text())
    entries = [line for line in RECIPE.read_text().splitlines() if not line.startswith("#")]
    assert len(entries) <= 10


def test_the_guide_works_when_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = files.write_coco_rel(tmp_path / "annotations")
    mine = tmp_path / "mine"
    for split in ("train", "validation"):
        assert main(["convert", str(source), str(mine), "--split", split]) == 0
    assert main(["validate", str(mine), "--split", "train"]) == 0
    assert main(["stats", str(mine), "--split", "train"]) == 0
    monkeypatch.chdir(ROOT)
    overrides = [
        f"data.path={mine}", f"training.output_dir={tmp_path / 'run'}", "training.epochs=2",
        "training.batch_size=2", "training.num_threads=1",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["train_sgtr.py", str(RECIPE), *overrides])
    run_recipe("Train.", task="scene_graph")
    trained = SgtrForSceneGraphGeneration.from_pretrained(tmp_path / "run" / "best")
    assert list(trained.config.id2label.values()) == files.NAMES
    assert list(trained.config.id2predicate.values()) == files.PREDICATES
    # What does not depend on the labels came with the model.
    shipped = SgtrForSceneGraphGeneration.from_pretrained(
        Path(sgtr_hf.__file__).parent / "assets" / "sgtr-tabletop"
    )
    (after, before) = (
        model.model.detector.model.input_projections.state_dict() for model in (trained, shipped)
    )
    for name, tensor in after.items():
        assert (tensor - before[name]).abs().max() < 1e-2, name
    capsys.readouterr()
    picture = str(source / "a.jpg")
    assert main(["predict", picture, "--model", str(tmp_path / "run" / "best")]) == 0
    graph = pipeline("scene-graph", model=str(tmp_path / "run" / "best"))(picture, threshold=0.0)
    assert set(graph.id2label.values()) == set(files.NAMES)
    assert len(graph.relations) > 0
