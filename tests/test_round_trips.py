"""What is saved loads again: sharded, in other types of numbers, with other vocabularies."""

import io
import logging
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModel, AutoModelForObjectDetection, ResNetConfig
from transformers.utils import logging as transformers_logging

from conftest import random_labels, small_config, small_detector_config
from recorded_weights import recorded_checkpoint
from sgtr_hf import (
    SgtrDetrForObjectDetection,
    SgtrForSceneGraphGeneration,
    SgtrModel,
)
from sgtr_hf.hub.checkpoint_conversion import convert_checkpoint
from sgtr_hf.training.optimization import make_optimizer
from sgtr_hf.training.recipe import DataSettings, Recipe, TrainingSettings
from sgtr_hf.training.setup_run import make_model
from test_checkpoint_conversion import FIXTURES


@pytest.fixture(scope="module")
def converted_detector():
    """DETR-R50 as it comes from a file of the original."""
    weights = recorded_checkpoint(FIXTURES / "detr_resnet50.keys.json")
    return convert_checkpoint(weights, "detr").model.eval()


@pytest.fixture(scope="module")
def converted_graph_model():
    """SGTR for Visual Genome, with one layer of each stack."""
    weights = recorded_checkpoint(FIXTURES / "sgtr_vg.keys.json", shallow=True)
    return convert_checkpoint(weights, "sgtr-vg150").model.eval()


@pytest.fixture(scope="module", params=["detector", "graph_model"])
def saved(request, tmp_path_factory):
    """A converted model and the folder where it lies in shards."""
    model = request.getfixturevalue(f"converted_{request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="40MB")
    return model, folder


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def test_a_converted_model_survives_shards_and_loading_on_the_meta_device(saved, images):
    model, folder = saved
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = AutoModelForObjectDetection.from_pretrained(folder, device_map="cpu")
    assert type(loaded) is type(model)
    with torch.no_grad():
        expected, found = model(images), loaded(images)
    for name, tensor in expected.items():
        assert tensor.equal(found[name]), name
    # Frozen statistics are buffers, which loading on the meta device must bring back too.
    state = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.equal(state[name]), name


def test_bfloat16_is_a_matter_of_loading(saved, images):
    model, folder = saved
    half = AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = model(images), half(images.to(torch.bfloat16))
    for name, tolerance in (("pred_boxes", 0.02), ("entity_probabilities", 0.002)):
        assert (found[name].float() - expected[name]).abs().mean() < tolerance, name


@pytest.mark.parametrize("config", [small_config, small_detector_config])
def test_saving_again_changes_nothing(config, tmp_path, pixel_values):
    torch.manual_seed(0)
    kind = SgtrForSceneGraphGeneration if config is small_config else SgtrDetrForObjectDetection
    kind(config()).save_pretrained(tmp_path / "first")
    kind.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")
    )
    assert first == second


def test_the_base_model_loads_alone(tmp_path, pixel_values):
    torch.manual_seed(0)
    whole = SgtrForSceneGraphGeneration(small_config()).eval()
    whole.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, SgtrModel)
    with torch.no_grad():
        assert base(pixel_values).predicate_states.equal(whole.model(pixel_values).predicate_states)


def test_new_classes_renew_the_head_of_a_converted_detector_and_say_so(
    converted_detector, tmp_path
):
    converted_detector.save_pretrained(tmp_path)
    with listening() as report:
        loaded = SgtrDetrForObjectDetection.from_pretrained(
            tmp_path, num_labels=7, ignore_mismatched_sizes=True
        )
    lines = report.getvalue().splitlines()
    new = {line.split()[0] for line in lines if "MISMATCH |" in line}
    assert new == {"class_head.weight", "class_head.bias"}
    for name, tensor in converted_detector.state_dict().items():
        if name not in new:
            assert tensor.equal(loaded.state_dict()[name]), name
    assert loaded.class_head.weight.shape == (8, 256)


@contextmanager
def listening():
    """Collect what transformers logs."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    transformers_logging.add_handler(handler)
    try:
        yield text
    finally:
        transformers_logging.remove_handler(handler)


def test_a_new_vocabulary_renews_the_heads_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    model = SgtrForSceneGraphGeneration(small_config())
    model.save_pretrained(tmp_path)
    loaded, info = SgtrForSceneGraphGeneration.from_pretrained(
        tmp_path,
        num_labels=7,
        id2predicate={index: str(index) for index in range(5)},
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    new = {name for name, *_ in info["mismatched_keys"]}
    heads = ("subject_class_head", "object_class_head", "model.detector.class_head")
    assert new == {
        f"{head}.{part}" for head in (*heads, "predicate_head") for part in ("weight", "bias")
    }
    for name, tensor in model.state_dict().items():
        if name not in new:
            assert tensor.equal(loaded.state_dict()[name]), name
    output = loaded(torch.randn(1, 3, 64, 64), labels=random_labels(1, 7, 5))
    assert torch.isfinite(output.loss)
    assert (loaded.config.num_labels, loaded.config.detector.num_labels) == (7, 7)


def test_a_frozen_detector_stays_frozen_when_loaded(tmp_path):
    SgtrForSceneGraphGeneration(small_config(freeze_detector=True)).save_pretrained(tmp_path)
    loaded = SgtrForSceneGraphGeneration.from_pretrained(tmp_path)
    assert trained(loaded)
    assert not any("model.detector." in name for name in trained(loaded))


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (0, ()),
        (1, ("embedder.",)),
        (2, ("embedder.", "encoder.stages.0.")),
        (3, ("embedder.", "encoder.stages.0.", "encoder.stages.1.")),
        (-1, ("",)),
    ],
)
def test_exactly_the_parameters_of_the_recipe_train(stages, frozen, tmp_path):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = small_detector_config(backbone_config=backbone)
    SgtrDetrForObjectDetection(config).save_pretrained(tmp_path)
    # Loading builds the model anew: the freezing must come back.
    model = SgtrDetrForObjectDetection.from_pretrained(tmp_path, frozen_backbone_stages=stages)
    prefix = "model.backbone."
    names = [name for name, _ in model.named_parameters()]
    expected = {
        name
        for name in names
        if not name.startswith(prefix)
        or not any(name.removeprefix(prefix).startswith(part) for part in frozen)
    }
    # The affine part of frozen batch norms never trains.
    expected = {
        name for name in expected if not (name.startswith(prefix) and "normalization" in name)
    }
    assert trained(model) == expected


# What fine-tuning trains: of a detector the last three stages of the backbone (their convolutions;
# DETR's batch norms never train) and all that follows, ...
DETECTOR_TRAINS = (
    "model.backbone.encoder.stages.1.",
    "model.backbone.encoder.stages.2.",
    "model.backbone.encoder.stages.3.",
    "model.input_projections.",
    "model.encoder_layers.",
    "model.query_embedding.",
    "model.decoder.",
    "class_head.",
)
# ... and of a scene graph model on a frozen detector these.
RELATIONS_TRAIN = (
    "model.predicate_node_generator.",
    "predicate_head.",
    "relation_vector_head.",
    "subject_class_head.",
    "subject_box_head.",
    "object_class_head.",
    "object_box_head.",
)
IN_GRAPH_MODEL = tuple(f"model.detector.{part}" for part in DETECTOR_TRAINS)


def names_of(model, parts):
    return {
        name
        for name, _ in model.named_parameters()
        if name.startswith(parts) and not ("backbone" in name and "normalization" in name)
    }


def fine_tuned(folder, task, names, **model_settings):
    """The model that a recipe starts from a trained one, and the names that its optimizer has."""
    training = TrainingSettings(output_dir="unused", epochs=1)
    recipe = Recipe(
        task, DataSettings(path="unused"), training, model_settings, pretrained_model=str(folder)
    )
    model = make_model(recipe, *names).train()
    groups = make_optimizer(model, training).param_groups
    in_optimizer = {id(parameter) for group in groups for parameter in group["params"]}
    assert in_optimizer == {id(p) for p in model.parameters() if p.requires_grad}
    return model


def test_fine_tuning_a_converted_detector_trains_what_the_original_trained(
    converted_detector, tmp_path
):
    converted_detector.save_pretrained(tmp_path)
    names = (converted_detector.config.id2label, {})
    model = fine_tuned(tmp_path, "detection", names)
    assert trained(model) == names_of(model, DETECTOR_TRAINS)
    # As many numbers as the original trains, of 41,524,768.
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368
    model = fine_tuned(tmp_path, "detection", names, frozen_backbone_stages=-1)
    assert trained(model) == names_of(model, DETECTOR_TRAINS[3:])


def test_fine_tuning_a_converted_graph_model_trains_what_the_recipe_says(
    converted_graph_model, tmp_path
):
    converted_graph_model.save_pretrained(tmp_path)
    config = converted_graph_model.config
    names = (config.id2label, config.id2predicate)
    model = fine_tuned(tmp_path, "scene_graph", names, freeze_detector=True)
    assert trained(model) == names_of(model, RELATIONS_TRAIN)
    model = fine_tuned(tmp_path, "scene_graph", names)
    assert trained(model) == names_of(model, RELATIONS_TRAIN + IN_GRAPH_MODEL)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
