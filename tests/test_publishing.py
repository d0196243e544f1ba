"""Cards, mistakes, and folders of other models; test_loading_anywhere.py publishes for real."""

import json
import shutil
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from httpx2 import ConnectError
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import ResNetConfig

import sgtr_hf
from conftest import small_detector_config
from sgtr_hf.auto import LocalPipelines
from sgtr_hf.cli import main
from sgtr_hf.hub.bundling import bundle_code
from sgtr_hf.hub.publication_card import MARK, ModelFacts, make_card, read_facts
from sgtr_hf.hub.publishing import prepare_model, upload


ASSETS = Path(str(resources.files("sgtr_hf"))) / "assets"
PICTURE = ASSETS / "tabletop.jpg"
EXAMPLE = ("print(graph)", "SceneGraph(...)")
RECORD = {
    "command": "scripts/train_sgtr.py recipes/desks.yaml",
    "recipe": {"task": "scene_graph", "data": {"path": "datasets/desks"}},
    "images_seen": 1200,
    "training_minutes": 3.5,
    "processes": 2,
    "threads": 1,
    "seed": 7,
    "commit": "0123456789",
    "processor": "x86_64",
    "versions": {"torch": "2.14.1"},
}


@pytest.fixture
def folder(checkpoint_folder, tmp_path):
    copied = tmp_path / "run" / "final"
    shutil.copytree(checkpoint_folder, copied)
    return copied


def test_the_bundle_holds_the_inference_path_and_imports_its_own_files_alone(folder):
    files = bundle_code(folder)
    names = {file.stem for file in files}
    assert {"modeling_sgtr", "configuration_sgtr", "scene_graph_pipeline", "boxes"} <= names
    for file in files:
        for line in file.read_text().splitlines():
            if line.startswith("from ."):
                assert line.split()[1].removeprefix(".") in names, line
            assert "sgtr_hf import" not in line
    config = json.loads((folder / "config.json").read_text())
    for reference in config["auto_map"].values():
        for one in reference if isinstance(reference, list) else [reference]:
            module, _, name = one.partition(".")
            assert f"class {name}(" in (folder / f"{module}.py").read_text()


def test_bundling_again_replaces_references_to_another_repository(folder):
    bundle_code(folder)
    expected = (folder / "config.json").read_text()
    config = json.loads(expected)
    config["auto_map"]["AutoModel"] = "somebody/else--modeling_sgtr.SgtrModel"
    (folder / "config.json").write_text(json.dumps(config))
    bundle_code(folder)
    assert (folder / "config.json").read_text() == expected


def test_only_models_of_this_package_are_bundled(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "detr"}')
    with pytest.raises(ValueError, match=r"`model_type` must be one of sgtr, .*'detr'"):
        bundle_code(tmp_path)


def test_saved_configurations_keep_their_pipelines(folder, tmp_path):
    bundle_code(folder)
    config = sgtr_hf.SgtrConfig.from_pretrained(folder)
    assert list(config.custom_pipelines) == ["scene-graph"]
    assert "scene-graph" not in config.custom_pipelines
    assert isinstance(config.custom_pipelines, LocalPipelines)
    config.save_pretrained(tmp_path / "saved")
    saved, before = (
        json.loads((place / "config.json").read_text()) for place in (tmp_path / "saved", folder)
    )
    assert saved["custom_pipelines"] == before["custom_pipelines"]
    assert "custom_pipelines" not in sgtr_hf.SgtrConfig().to_dict()


def test_the_card_tells_data_recipe_and_figures(folder):
    (folder.parent / "training.json").write_text(json.dumps(RECORD))
    report = {"data": "datasets/desks", "split": "test", "mode": "sgdet", "images": 9}
    report |= {"version": "1.0", "figures": {"R@20": 0.5, "AP": 0.25, "ceiling_R": 0.75}}
    (folder / "evaluation.json").write_text(json.dumps(report))
    text = make_card(read_facts(folder), "somebody/desks", None, EXAMPLE)
    for words in ("`scripts/train_sgtr.py recipes/desks.yaml`", "1200", "One seed (7)", "0123456"):
        assert words in text
    assert "| ceiling_R | 0.7500 |" in text
    data = ModelCard(text).data
    assert data.license == "unknown"
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "R@20": 0.5,
        "AP": 0.25,
    }


def test_without_a_report_the_card_has_the_figures_of_the_training(folder):
    record = RECORD | {"figures": {"R@20": 0.125, "details": {}}}
    (folder.parent / "training.json").write_text(json.dumps(record))
    text = make_card(read_facts(folder), "somebody/desks", None, EXAMPLE)
    assert "validation split, at the end of training" in text
    assert "| R@20 | 0.1250 |" in text


def test_the_card_of_the_best_model_has_its_own_figures(folder):
    best = {"updates": 300, "figures": {"R@20": 0.25}}
    record = RECORD | {"updates": 500, "figures": {"R@20": 0.125}}
    shutil.copytree(folder, folder.parent / "best")
    for entries, words in ((record | {"best": best}, "0.2500"), (record, "None were measured")):
        (folder.parent / "training.json").write_text(json.dumps(entries))
        text = make_card(read_facts(folder.parent / "best"), "somebody/desks", None, EXAMPLE)
        assert words in text
        assert "0.1250" not in text
        assert ("after update 300 of 500" in text) == ("best" in entries)


def test_figures_of_an_own_card_give_way_to_a_report(folder):
    old = EvalResult("object-detection", "x", "x", "x", metric_name="R@20", metric_value=0.9)
    data = ModelCardData(model_name="desks", eval_results=[old])
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\nMine.")
    report = {"data": "d", "split": "test", "mode": "sgdet", "images": 9, "version": "1.0"}
    (folder / "evaluation.json").write_text(json.dumps(report | {"figures": {"R@20": 0.5}}))
    text = make_card(read_facts(folder), "somebody/desks", None, EXAMPLE)
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [0.5]


@pytest.mark.parametrize("cause", [ConnectError("cut"), ValueError("no")], ids=["passes", "stays"])
def test_a_large_file_that_did_not_arrive_is_sent_again(tmp_path, monkeypatch, cause):
    calls = []

    class Api:
        def create_repo(self, *_, **__):
            pass

        def upload_folder(self, **_):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("Error while uploading") from cause
            return SimpleNamespace(commit_url="there")

    monkeypatch.setattr("sgtr_hf.hub.publishing.time.sleep", lambda _: None)
    if isinstance(cause, ConnectError):
        assert upload(tmp_path, "a/b", "model", private=True, api=Api()) == "there"
        return
    with pytest.raises(OSError, match="was not published"):
        upload(tmp_path, "a/b", "model", private=True, api=Api())


@pytest.mark.parametrize("name", ["evaluation.json", "training.json"])
def test_files_of_something_else_are_an_error(folder, name):
    (folder / name).write_text('{"loss": 1}')
    with pytest.raises(ValueError, match=rf"{name} lacks .*Rename it"):
        read_facts(folder)


def test_the_text_of_an_own_card_stays(folder):
    own = "---\nlicense: mit\ntags: [mine]\n---\n# Written by hand\n\nOf desks.\n"
    (folder / "README.md").write_text(own)
    text = make_card(read_facts(folder), "somebody/desks", None, EXAMPLE)
    assert "# Written by hand\n\nOf desks." in text
    assert "SceneGraph(...)" in text
    assert MARK not in text
    data = ModelCard(text).data
    assert data.license == "mit"
    assert data.library_name == "transformers"
    assert {"mine", "scene-graph-generation"} <= set(data.tags)


def test_a_card_of_ours_is_written_anew():
    facts = ModelFacts({"model_type": "dino_vit", "architectures": ["DinoVitModel"]})
    text = make_card(facts, "somebody/vit", "mit", EXAMPLE)
    assert MARK in text
    assert "says nothing of its training" in text
    assert "None were measured" in text


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, [], "no picture for the example"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), [PICTURE], "processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), [PICTURE], "must be safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), [PICTURE], "no whole"),
        (lambda folder: (folder / "config.json").unlink(), [PICTURE], "neither a model"),
    ],
    ids=["no picture", "no processor", "no weights", "broken weights", "no model"],
)
def test_what_cannot_be_published_is_an_error(folder, capsys, change, arguments, message):
    if change is not None:
        change(folder)
    picture = ["--picture", str(arguments[0])] if arguments else []
    assert main(["push", str(folder), "somebody/tiny", "--dry-run", *picture]) == 2
    assert message in capsys.readouterr().err


def test_a_repository_needs_a_possible_name(folder, capsys):
    assert main(["push", str(folder), "a/b/c", "--dry-run"]) == 2
    assert "Repo id must be" in capsys.readouterr().err


def test_a_data_set_gets_its_card(tmp_path, capsys):
    shutil.copy(ASSETS / "tabletop_sample" / "test-00000-of-00001.parquet", tmp_path)
    assert main(["push", str(tmp_path), "somebody/scenes", "--dry-run"]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert "| test |" in (tmp_path / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detector", "detector on a vision transformer", "classifier"])
def test_other_models_are_published_too(tmp_path, kind):
    torch.manual_seed(0)
    vit = sgtr_hf.DinoVitConfig(
        image_size=64, d_model=32, num_hidden_layers=2, num_attention_heads=4, feed_forward_dim=48
    )
    resnet = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    if kind == "classifier":
        sgtr_hf.DinoVitForImageClassification(vit).save_pretrained(tmp_path / "run")
        sgtr_hf.DinoVitImageProcessor().save_pretrained(tmp_path / "run")
    else:
        backbone = vit if "transformer" in kind else resnet
        config = small_detector_config(backbone_config=backbone)
        sgtr_hf.SgtrDetrForObjectDetection(config).save_pretrained(tmp_path / "run")
        size = {"height": 64, "width": 64}
        sgtr_hf.SgtrImageProcessor(size=size).save_pretrained(tmp_path / "run")
    prepare_model(tmp_path / "run", tmp_path / "tiny", "somebody/tiny", picture=PICTURE)
    card = (tmp_path / "tiny" / "README.md").read_text()
    printed = card.partition("prints\n\n```\n")[2].partition("\n```")[0].splitlines()
    assert printed
    assert all(0 <= float(line.split()[0]) <= 1 for line in printed)
