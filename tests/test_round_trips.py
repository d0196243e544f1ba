"""What is saved loads again: sharded, in other types of numbers, with other vocabularies."""

import pytest
import torch
from transformers import AutoModel, ResNetConfig

from conftest import random_labels, small_config, small_detector_config
from recorded_weights import recorded_checkpoint
from sgtr_hf import (
    SgtrDetrForObjectDetection,
    SgtrForSceneGraphGeneration,
    SgtrModel,
)
from sgtr_hf.hub.checkpoint_conversion import convert_checkpoint
from test_checkpoint_conversion import FIXTURES


@pytest.fixture(scope="module")
def converted():
    """DETR-R50 as it comes from a file of the original."""
    weights = recorded_checkpoint(FIXTURES / "detr_resnet50.keys.json")
    return convert_checkpoint(weights, "detr").model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def test_a_converted_model_survives_shards_and_loading_on_the_meta_device(
    converted, images, tmp_path
):
    converted.save_pretrained(tmp_path, max_shard_size="40MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded = SgtrDetrForObjectDetection.from_pretrained(tmp_path, device_map="cpu")
    with torch.no_grad():
        expected, found = converted(images), loaded(images)
    assert found.logits.equal(expected.logits)
    assert found.pred_boxes.equal(expected.pred_boxes)
    # Frozen statistics are buffers, which loading on the meta device must bring back too.
    for name, tensor in converted.state_dict().items():
        assert tensor.equal(loaded.state_dict()[name]), name


def test_bfloat16_is_a_matter_of_loading(converted, images, tmp_path):
    converted.save_pretrained(tmp_path)
    half = SgtrDetrForObjectDetection.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        found = half(images.to(torch.bfloat16)).pred_boxes.float()
        expected = converted(images).pred_boxes
    assert (found - expected).abs().mean() < 0.02


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


@pytest.mark.filterwarnings("ignore")
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


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


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


def test_fine_tuning_a_converted_file_trains_what_the_original_trained(converted):
    backbone = {name for name in trained(converted) if name.startswith("model.backbone.")}
    assert {name.split(".")[4] for name in backbone} == {"1", "2", "3"}
    assert sum(p.numel() for n, p in converted.named_parameters() if n in backbone) == 23_232_512
    others = {name for name, _ in converted.named_parameters() if "backbone" not in name}
    assert others <= trained(converted)
