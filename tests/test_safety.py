"""What comes in a folder, a file or a picture must not run, take all memory, or write elsewhere."""

import ast
import json
import pickle
import resource
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection

import sgtr_hf
from conftest import small_config
from sgtr_hf.cli import main
from sgtr_hf.hub.weight_files import copy_weights, weight_files
from sgtr_hf.image_processing.picture_reading import read_image


PACKAGE = Path(sgtr_hf.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.fixture(scope="module")
def calls():
    """Every call of a method or of a function of a module: file, name, arguments by name."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                keywords = {keyword.arg: keyword.value for keyword in node.keywords}
                owner = getattr(node.func.value, "id", "")
                found.append((path.name, f"{owner}.{node.func.attr}", keywords))
    return found


def test_nothing_is_unpickled(calls):
    for name, function, keywords in calls:
        assert function not in {"pickle.load", "pickle.loads", "pickle.Unpickler"}, name
        assert "allow_pickle" not in keywords, name
        if function == "torch.load":
            assert keywords["weights_only"].value is True, name


def test_no_archive_is_unpacked_into_files(calls):
    """Members of archives are read by name; none gets a path on the disk."""
    for name, function, _ in calls:
        assert not function.endswith((".extractall", ".extract", ".unpack_archive")), name


def test_weights_are_written_as_safetensors_alone(tmp_path):
    sgtr_hf.SgtrForSceneGraphGeneration(small_config()).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_not_opened(checkpoint_folder, tmp_path):
    folder, caught = tmp_path / "model", tmp_path / "caught"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint_folder / "config.json").read_bytes())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(caught)))
    for auto in (AutoModelForObjectDetection, AutoModel):
        with pytest.raises(OSError, match="safetensors"):
            auto.from_pretrained(folder)
    with pytest.raises(ValueError, match="must be safetensors"):
        weight_files(folder)
    assert not caught.exists()


@pytest.mark.parametrize(
    ("field", "value", "model"),
    [
        ("num_predicate_queries", -3, "sgtr"),
        ("num_predicate_queries", 10**9, "sgtr"),
        ("num_labels", 10**9, "sgtr"),
        ("num_queries", 10**9, "sgtr_detr"),
        ("d_model", 2**40, "sgtr_detr"),
        ("num_labels", -1, "sgtr_detr"),
        ("num_hidden_layers", 10**9, "dino_vit"),
        ("head_layers", 10**7, "dino_vit"),
        ("head_hidden_dim", 10**7, "dino_vit"),
        ("image_size", 10**9, "dino_vit"),
    ],
    ids=str,
)
def test_a_configuration_of_impossible_sizes_is_refused_before_memory_is_taken(
    tmp_path, field, value, model
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model, field: value}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for auto in (AutoConfig, AutoModel):
        with pytest.raises((ValueError, StrictDataclassError), match=f"`{field}` must be"):
            auto.from_pretrained(tmp_path)
    # In kilobytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_the_command_says_what_is_wrong_with_a_configuration(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "sgtr", "num_predicate_queries": -1}')
    picture = str(PACKAGE / "assets" / "tabletop.jpg")
    assert main(["predict", picture, "--model", str(tmp_path)]) == 2
    assert "`num_predicate_queries` must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("size", [(11, 10), (30, 30)], ids=["above", "far above"])
def test_pictures_above_the_limit_are_refused(tmp_path, monkeypatch, size, as_file):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture = Image.new("RGB", size)
    picture.save(tmp_path / "large.png")
    with pytest.raises(ValueError, match=r"100 pixels.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "large.png" if as_file else picture)
    read_image(Image.new("RGB", (10, 10)))


def test_a_size_above_the_limit_is_refused():
    processor = sgtr_hf.SgtrImageProcessor(size={"height": 10**6, "width": 10**6})
    with pytest.raises(ValueError, match="is refused: the limit is"):
        processor(images=Image.new("RGB", (8, 8)), return_tensors="pt")


def test_large_weights_are_cut_into_shards_that_load(checkpoint_folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((checkpoint_folder / name).read_bytes())
    files = copy_weights(checkpoint_folder, tmp_path, max_shard_bytes=10**6)
    assert len(files) > 3
    model, expected = (
        AutoModelForObjectDetection.from_pretrained(folder).state_dict()
        for folder in (tmp_path, checkpoint_folder)
    )
    assert model.keys() == expected.keys()
    assert all(torch.equal(model[name], expected[name]) for name in model)


def test_an_index_of_weights_cannot_name_other_folders(tmp_path):
    index = {"metadata": {}, "weight_map": {"weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"elsewhere.*not in its folder"):
        weight_files(tmp_path)
