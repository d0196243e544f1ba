"""Which parts of a model get the attention backend that is asked for."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import ResNetConfig, SwinConfig

from conftest import small_config, small_detector_config
from sgtr_hf import DinoVitConfig, SgtrDetrForObjectDetection, SgtrForSceneGraphGeneration
from sgtr_hf.modeling.backbone_freezing import supported_attention
from sgtr_hf.modeling.graph_nodes import EntityNodes, TripletAnchors, TripletStates
from sgtr_hf.modeling.spatial_aware_decoder import SpatialAwareDecoder


def resnet():
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )


def swin():
    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage4"],
    )


def dino_vit():
    return DinoVitConfig(
        d_model=16, num_hidden_layers=2, num_attention_heads=2, out_features=["stage2"]
    )


def backends(model):
    detector = getattr(model.config, "detector_config", model.config)
    configs = (model.config, detector, detector.backbone_config)
    return [config._attn_implementation for config in configs]


def make_graph_model(backbone, **fields):
    config = small_config({"backbone_config": backbone}, **fields)
    return SgtrForSceneGraphGeneration(config).eval()


# Backbone, what is asked for, and what the backbone gets.
CASES = [
    (resnet, "sdpa", "eager"),
    (resnet, "flex_attention", "eager"),
    (resnet, "eager", "eager"),
    (swin, "eager", "eager"),
    (swin, "sdpa", "sdpa"),
    (swin, "flex_attention", "sdpa"),
    (dino_vit, "eager", "eager"),
    (dino_vit, "flex_attention", "flex_attention"),
]


@pytest.mark.parametrize(("backbone", "asked", "given"), CASES)
def test_a_backbone_is_loaded_with_what_it_supports(tmp_path, backbone, asked, given):
    config = small_detector_config(backbone_config=backbone())
    SgtrDetrForObjectDetection(config).save_pretrained(tmp_path)
    model = SgtrDetrForObjectDetection.from_pretrained(tmp_path, attn_implementation=asked)
    assert backends(model) == [asked, asked, given]


@pytest.mark.parametrize(("backbone", "asked", "given"), CASES)
def test_a_backbone_is_switched_to_what_it_supports(backbone, asked, given):
    model = make_graph_model(backbone())
    model.set_attn_implementation("eager")
    assert backends(model) == ["eager"] * 3
    model.set_attn_implementation(asked)
    assert backends(model) == [asked, asked, given]


def test_parts_are_switched_alone():
    model = make_graph_model(swin())
    model.set_attn_implementation({"": "eager"})
    assert backends(model) == ["eager", "sdpa", "sdpa"]
    model.set_attn_implementation({"detector_config": {"backbone_config": "eager"}})
    assert backends(model) == ["eager", "sdpa", "eager"]
    model.set_attn_implementation({"detector_config": "eager"})
    assert backends(model) == ["eager", "eager", "eager"]


def test_the_other_parts_of_a_model_with_convolutions_can_be_switched():
    model = make_graph_model(resnet())
    model.set_attn_implementation({"": "eager"})
    assert backends(model) == ["eager", "sdpa", "eager"]


def test_flash_attention_is_for_those_that_support_it():
    model = make_graph_model(resnet())
    backbone = type(model.model.detector.model.backbone)
    assert supported_attention(backbone, "flash_attention_2") == "eager"
    assert supported_attention(type(model), "flash_attention_2") == "flash_attention_2"


@pytest.mark.parametrize("asked", ["fast", {"detector_config": {"backbone_config": "fast"}}])
def test_an_unknown_backend_is_an_error(asked):
    with pytest.raises(ValueError, match='attn_implementation="fast"` is not supported'):
        make_graph_model(resnet()).set_attn_implementation(asked)


def test_an_unknown_backend_is_an_error_when_loading(tmp_path):
    config = small_detector_config(backbone_config=resnet())
    SgtrDetrForObjectDetection(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='attn_implementation="fast"` is not supported'):
        SgtrDetrForObjectDetection.from_pretrained(tmp_path, attn_implementation="fast")


@pytest.mark.parametrize(
    "backend", ["flex_attention", "flash_attention_2", "kernels-community/flash-attn2"]
)
def test_gaussian_maps_need_a_backend_that_takes_a_bias(backend):
    config = small_config()
    decoder = SpatialAwareDecoder(config)
    # Without the model around it, whose other layers would be compiled, or need a GPU.
    config._attn_implementation = backend
    states = TripletStates(*torch.zeros(3, 1, 2, 32))
    boxes = torch.zeros(1, 2, 4)
    image = {"memory": torch.zeros(1, 2, 32), "memory_position": None, "memory_mask": None}
    message = rf"`gaussian_attention`.*'{backend}'.*sdpa.*eager.*`gaussian_attention=False`"
    with pytest.raises(ValueError, match=message):
        decoder(
            states,
            TripletAnchors(boxes, boxes),
            image,
            boxes,
            EntityNodes(image["memory"], boxes, boxes),
            entity_mask=None,
        )


@pytest.mark.parametrize(
    "override", [{"frozen_backbone_stages": -5}, {"dropout": 2.0}, {"box_loss_weight": -5.0}]
)
def test_overrides_of_a_detector_are_checked(tmp_path, override):
    SgtrDetrForObjectDetection(small_detector_config()).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=next(iter(override))):
        SgtrDetrForObjectDetection.from_pretrained(tmp_path, **override)


def test_overrides_of_a_graph_model_are_checked(tmp_path):
    SgtrForSceneGraphGeneration(small_config()).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="predicate_loss_weight"):
        SgtrForSceneGraphGeneration.from_pretrained(tmp_path, predicate_loss_weight=-5.0)
