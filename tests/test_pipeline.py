import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForObjectDetection,
    pipeline,
)
from transformers.pipelines.pt_utils import KeyDataset

import sgtr_hf


def make_picture(width=120, height=80, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def generate(checkpoint_folder):
    return pipeline("scene-graph", model=str(checkpoint_folder))


def test_auto_classes_find_everything(checkpoint_folder):
    assert isinstance(AutoConfig.from_pretrained(checkpoint_folder), sgtr_hf.SgtrConfig)
    for auto in (AutoModelForObjectDetection, sgtr_hf.AutoModelForSceneGraphGeneration):
        model = auto.from_pretrained(checkpoint_folder)
        assert isinstance(model, sgtr_hf.SgtrForSceneGraphGeneration)
    assert isinstance(AutoModel.from_pretrained(checkpoint_folder), sgtr_hf.SgtrModel)
    processor = AutoImageProcessor.from_pretrained(checkpoint_folder)
    assert isinstance(processor, sgtr_hf.SgtrImageProcessor)
    pil = AutoImageProcessor.from_pretrained(checkpoint_folder, backend="pil")
    assert isinstance(pil, sgtr_hf.SgtrImageProcessorPil)


def test_one_picture_in_every_form(generate, tmp_path):
    picture = make_picture()
    picture.save(tmp_path / "picture.png")
    expected = generate(picture)
    assert isinstance(expected, sgtr_hf.SceneGraph)
    assert expected.image_size == (80, 120)
    assert expected.id2predicate == {0: "on", 1: "inside"}
    assert generate(str(tmp_path / "picture.png")) == expected
    assert generate(tmp_path / "picture.png") == expected
    assert generate(np.asarray(picture)) == expected


def test_many_pictures(generate):
    pictures = [make_picture(seed=seed) for seed in range(3)]
    expected = [generate(picture) for picture in pictures]
    assert generate(pictures) == expected
    assert generate(tuple(pictures)) == expected
    assert list(generate(picture for picture in pictures)) == expected
    assert list(generate(iter(pictures))) == expected
    assert generate([]) == []
    rows = [{"image": picture} for picture in pictures]
    assert list(generate(Dataset.from_list(rows)["image"])) == expected
    with pytest.raises(ValueError, match=r'dataset\["image"\]'):
        list(generate(Dataset.from_list([row | {"name": "x"} for row in rows])))
    assert list(generate(KeyDataset(rows, "image"))) == expected


def test_batches_of_one_size_equal_single_pictures(generate):
    pictures = [make_picture(seed=seed) for seed in range(3)]
    for batched, single in zip(
        generate(pictures, batch_size=3), [generate(p) for p in pictures], strict=True
    ):
        np.testing.assert_allclose(batched.scores, single.scores, atol=1e-5)
        np.testing.assert_allclose(batched.relation_scores, single.relation_scores, atol=1e-5)


def test_batches_of_mixed_sizes_work(generate):
    pictures = [make_picture(120, 80), make_picture(60, 90), make_picture(90, 90)]
    graphs = generate(pictures, batch_size=3)
    assert [graph.image_size for graph in graphs] == [(80, 120), (90, 60), (90, 90)]
    for graph in graphs:
        assert (graph.boxes_xyxy[:, 2] <= graph.image_size[1] + 1e-3).all()


def test_arguments_reach_the_results(generate):
    picture = make_picture()
    assert generate(picture, top_k=2).num_relations <= 2
    assert (generate(picture, threshold=0.001).relation_scores >= 0.001).all()
    constrained = generate(picture, graph_constraint=True).relations[:, :2].tolist()
    assert len(constrained) == len({tuple(pair) for pair in constrained})


def test_an_unknown_argument_is_an_error(generate):
    with pytest.raises(TypeError, match=r"treshold.*threshold"):
        generate(make_picture(), treshold=0.5)


@pytest.mark.parametrize("source", ["missing.png", 7])
def test_what_is_no_picture_is_an_error(generate, source):
    with pytest.raises((ValueError, TypeError)):
        generate(source)


def test_other_precision(checkpoint_folder):
    generate = pipeline("scene-graph", model=str(checkpoint_folder), dtype=torch.bfloat16)
    assert generate(make_picture()).image_size == (80, 120)


def test_nan_in_the_weights_is_a_clear_error(checkpoint_folder):
    generate = pipeline("scene-graph", model=str(checkpoint_folder))
    generate.model.predicate_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        generate(make_picture())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": ["cup"]}, ValueError, "`boxes`"),
        ({"boxes": [[0, 0, 9, 9]], "labels": "cup"}, TypeError, "list of names"),
        ({"boxes": [[0, 0, 9, 9]], "labels": 5}, TypeError, "list of names"),
        ({"boxes": [[0, 0, 9, 9]], "labels": [None]}, TypeError, "whole numbers"),
        ({"boxes": [[0, 0, 9, 9]], "labels": [1.7]}, TypeError, "whole numbers"),
        ({"boxes": [[0, 0, 9, 9]], "labels": [True]}, TypeError, "whole numbers"),
        ({"boxes": [[0, 0, 9, 9]], "labels": ["dog"]}, ValueError, "'dog'"),
        ({"boxes": "x"}, ValueError, "four numbers"),
    ],
)
def test_given_entities_are_checked(generate, arguments, error, words):
    with pytest.raises(error, match=words):
        generate(make_picture(), **arguments)


def test_a_damaged_file_of_weights_is_a_clear_error(checkpoint_folder, tmp_path):
    folder = shutil.copytree(checkpoint_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged or cut off"):
        sgtr_hf.SgtrForSceneGraphGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    "arguments", [{"top_k": "a"}, {"top_k": 1.5}, {"threshold": None}, {"graph_constraint": "no"}]
)
def test_arguments_are_checked_before_the_model_runs(checkpoint_folder, arguments):
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(arguments))}`"):
        pipeline("scene-graph", model=str(checkpoint_folder), **arguments)


def test_the_content_of_a_file_is_a_picture(generate, tmp_path):
    make_picture().save(tmp_path / "picture.png")
    assert generate((tmp_path / "picture.png").read_bytes()) == generate(make_picture())
