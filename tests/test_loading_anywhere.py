"""A model is published to a server on loopback, and loaded in fresh processes of both users."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig

import sgtr_hf
from conftest import small_config
from hub_server import TOKEN, serve
from sgtr_hf.hub.publication_card import MARK


HERE = Path(__file__).parent
REPO_ID = "somebody/tiny"


def tiny_backbone():
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )


def run(script, server, home, *arguments):
    environment = os.environ | {
        "HF_ENDPOINT": server.address,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    finished = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=1200,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def server():
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3))
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return tmp_path_factory.mktemp("published") / "tiny"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three annotated pictures."""
    sample = Path(sgtr_hf.__file__).parent / "assets" / "tabletop_sample"
    table = pq.read_table(sample / "validation-00000-of-00001.parquet").slice(0, 3)
    folder = tmp_path_factory.mktemp("shards")
    pq.write_table(table, folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("annotated") / "graphs"


@pytest.fixture(scope="module")
def package_user(server, picture, published, shards, output, tmp_path_factory):
    """What a user with the package found, while uploads were interrupted twice."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run") / "final"
    config = small_config(detector={"backbone_config": tiny_backbone()})
    sgtr_hf.SgtrForSceneGraphGeneration(config).save_pretrained(folder)
    processor = sgtr_hf.SgtrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    processor.save_pretrained(folder)
    report = {"data": "datasets/desks", "split": "test", "mode": "sgdet", "images": 7}
    report |= {"version": sgtr_hf.__version__, "figures": {"R@20": 0.25, "mR@20": None}}
    (folder / "evaluation.json").write_text(json.dumps(report))
    (folder / "optimizer.bin").write_bytes(b"not to be published")
    server.state.failures = {"/upload/": 1, "/commit/": 1}
    home = tmp_path_factory.mktemp("home")
    arguments = (folder, published, picture, shards, output)
    return run("package_user.py", server, home, *arguments)


@pytest.fixture(scope="module")
def remote_code_user(package_user, server, picture, published, tmp_path_factory):
    """What a user without the package found."""
    home = tmp_path_factory.mktemp("home")
    return run("remote_code_user.py", server, home, picture, published, REPO_ID)


def test_the_package_is_used_by_those_who_have_it_whatever_they_trust(package_user):
    for source, count in ((REPO_ID, 5 + 4), ("folder", 5 + 10 + 1)):
        found = {name: value for name, value in package_user[source].items() if name != "graph"}
        assert len(found) == count
        assert all(module.startswith("sgtr_hf.") for module in found.values()), found


def test_without_the_package_the_published_code_is_used(remote_code_user, published):
    assert remote_code_user["package"] == ["sgtr_hf"]
    for source in (str(published), REPO_ID):
        found = remote_code_user[source]
        assert found["AutoConfig"] == "SgtrConfig"
        assert found["AutoModel"] == "SgtrModel"
        assert found["AutoModelForObjectDetection"] == "SgtrForSceneGraphGeneration"
        assert found["AutoImageProcessor"] == "SgtrImageProcessor"
        assert found["pil"] == "SgtrImageProcessorPil"
        for name in ("task", "no task"):
            assert found[name]["class"] == "SceneGraphPipeline"
            assert found[name]["module"].startswith("transformers_modules.")


def test_both_users_get_the_same_graph(package_user, remote_code_user, published):
    expected = package_user["folder"]["graph"]
    assert expected["relations"]
    assert package_user[REPO_ID]["graph"] == expected
    for source in (str(published), REPO_ID):
        for name in ("task", "no task"):
            assert remote_code_user[source][name]["graph"] == expected


def test_without_trust_the_refusal_names_the_argument(remote_code_user):
    messages = remote_code_user["refusals"]
    assert len(messages) == 8
    for message in messages.values():
        assert "trust_remote_code=True" in message


def test_interrupted_uploads_are_finished(package_user, server):
    assert package_user["code"] == 0
    assert server.state.failures == {"/upload/": 0, "/commit/": 0}
    commits = server.state.repositories["models", REPO_ID].commits
    assert len(commits) == 3
    files = list(commits.values())[1]
    names = {"config.json", "preprocessor_config.json", "README.md", "model.safetensors"}
    names |= {"sample.jpg", "sample_graph.png", "evaluation.json", "modeling_sgtr.py"}
    assert names <= set(files)
    assert {Path(name).suffix for name in files} <= {
        ".json", ".md", ".safetensors", ".jpg", ".png", ".py", ""
    }  # fmt: skip
    assert "optimizer.bin" not in files


def test_large_files_are_sent_once(package_user, server):
    sent = [path for method, path in server.state.requests if method == "PUT"]
    # One was cut off and sent again; the second commit sent none.
    assert len(sent) == len(set(sent)) + 1


def test_revisions_stay(package_user):
    assert package_user["first model"] == small_config().num_predicate_queries
    assert (package_user["first"], package_user["second"]) == (False, True)


def test_a_bad_token_is_refused(package_user):
    assert REPO_ID in package_user["refused upload"]
    assert package_user["refused download"] is not None


def test_a_data_set_is_published_with_its_card(package_user, server):
    assert package_user["data set"] == 0
    files = list(server.state.repositories["datasets", "somebody/scenes"].commits.values())[-1]
    assert set(files) == {"README.md", "train-00000-of-00001.parquet"}
    assert b"| train | 3 |" in files["README.md"]


def test_a_data_set_on_the_hub_is_streamed_and_annotated(package_user, output):
    assert package_user["annotation"] == 0
    table = pq.read_table(output)
    assert len(set(table["image_id"].to_pylist())) == 3
    assert set(table["model"].to_pylist()) == {REPO_ID}
    assert set(table["revision"].to_pylist()) == {package_user["revision"]}


def test_the_card_is_filled_from_the_folder(package_user, published):
    card = package_user["card"]
    assert card["license"] == "apache-2.0"
    assert card["library_name"] == "transformers"
    result = card["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 0.25
    text = (published / "README.md").read_text()
    assert MARK in text
    for words in ("SceneGraph(", "cup, table, box", "on, inside", "datasets/desks", "@inprocee"):
        assert words in text
    with Image.open(published / "sample_graph.png") as drawing:
        assert drawing.width > 100
