import dataclasses

import pytest
import torch

from conftest import random_labels, small_config
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.training.detector_cache import CachedDetectorDataset
from sgtr_hf.training.loop import Trainer
from tiny_training_run import losses_by_update, make_recipe, train, write_squares


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def detector(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    train(data, folder, epochs=1)
    return str(folder / "final")


def make_cached_recipe(data, detector, folder, cached_epochs, **training):
    recipe = make_recipe(data, folder, task="scene_graph", **training)
    del recipe.model["detector_config"]
    model = recipe.model | {"freeze_detector": True, "dropout": 0.0}
    settings = dataclasses.replace(recipe.training, cached_epochs=cached_epochs)
    return dataclasses.replace(recipe, detector=detector, model=model, training=settings)


def run(data, detector, folder, cached_epochs=0, **training):
    Trainer(make_cached_recipe(data, detector, folder, cached_epochs, **training)).run()
    return losses_by_update(folder)


def test_features_give_what_images_give(pixel_values):
    torch.manual_seed(0)
    model = SgtrForSceneGraphGeneration(small_config(freeze_detector=True)).eval()
    labels = random_labels()
    with torch.no_grad():
        features = model.detector_features(pixel_values)
        cached = model(detector_features=features, labels=labels)
        direct = model(pixel_values, labels=labels)
    assert cached.loss.equal(direct.loss)
    assert cached.subject_scores.equal(direct.subject_scores)
    with pytest.raises(ValueError, match="either `pixel_values` or `detector_features`"):
        model(pixel_values, detector_features=features)
    with pytest.raises(ValueError, match="either"):
        model(labels=labels)
    trained = SgtrForSceneGraphGeneration(small_config())
    with pytest.raises(ValueError, match="freeze_detector=True"):
        trained(detector_features=features)


def test_a_cached_run_learns_what_an_uncached_one_does(data, detector, tmp_path, monkeypatch):
    plain = run(data, detector, tmp_path / "plain", epochs=2)
    cached = run(data, detector, tmp_path / "cached", epochs=2, cached_epochs=2)
    assert cached.keys() == plain.keys()
    # Features are kept in half precision.
    assert list(cached.values()) == pytest.approx(list(plain.values()), rel=5e-3)

    def fail(*_):
        raise AssertionError("the cache is there, and fits")

    monkeypatch.setattr(CachedDetectorDataset, "_compute", fail)
    Trainer(make_cached_recipe(data, detector, tmp_path / "cached", 2, epochs=2))
    with pytest.raises(AssertionError, match="fits"):
        Trainer(make_cached_recipe(data, detector, tmp_path / "cached", 1, epochs=2))


def test_a_cache_needs_a_frozen_detector(data, tmp_path):
    with pytest.raises(ValueError, match=r"model\.freeze_detector"):
        make_recipe(data, tmp_path, task="scene_graph", cached_epochs=1)


def test_a_cache_needs_images_of_one_size(data, detector, tmp_path):
    recipe = make_cached_recipe(data, detector, tmp_path, 1)
    recipe.image_processor["pad_size"] = {"height": 96, "width": 96}
    with pytest.raises(ValueError, match="images of one size"):
        Trainer(recipe)
