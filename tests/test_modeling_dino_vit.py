import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
)

from conftest import random_labels, small_detector_config
from sgtr_hf import (
    DinoVitConfig,
    DinoVitForImageClassification,
    DinoVitImageProcessor,
    DinoVitImageProcessorPil,
    DinoVitModel,
    SgtrDetrForObjectDetection,
)
from sgtr_hf.modeling.transformer_layers import DropPath


def small_vit_config(**fields):
    defaults = {
        "image_size": 32, "patch_size": 8, "d_model": 24, "num_hidden_layers": 3,
        "num_attention_heads": 3, "feed_forward_dim": 40,
    }  # fmt: skip
    return DinoVitConfig(**(defaults | fields))


def images(height=32, width=32, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_outputs_hold_what_was_asked_for():
    model = DinoVitModel(small_vit_config(attn_implementation="eager", num_registers=2)).eval()
    with torch.no_grad():
        output = model(images(), output_hidden_states=True, output_attentions=True)
        plain = model(images())
    assert output.last_hidden_state.shape == (2, 1 + 2 + 16, 24)
    assert output.pooler_output.equal(output.last_hidden_state[:, 0])
    assert len(output.hidden_states) == 4
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 3, 19, 19)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 3, 19))
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert plain.last_hidden_state.equal(output.last_hidden_state)


def test_fused_attention_has_no_weights_to_show():
    model = DinoVitModel(small_vit_config(attn_implementation="sdpa"))
    with pytest.raises(ValueError, match="attn_implementation='eager'"):
        model(images(), output_attentions=True)


def test_registers_take_no_place():
    config = small_vit_config(num_registers=3)
    model = DinoVitModel(config)
    tokens = model.embedding(images())
    expected = model.embedding.registers.expand(2, -1, -1)
    assert tokens[:, 1:4].equal(expected)


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("size", [(24, 56), (96, 96), (33, 39)])
def test_any_size_has_a_place_for_every_patch(offset, size):
    model = DinoVitModel(small_vit_config(interpolation_offset=offset))
    rows, columns = size[0] // 8, size[1] // 8
    assert model.embedding.interpolate_position(rows, columns).shape == (1, 1 + rows * columns, 24)
    assert model(images(*size)).last_hidden_state.shape[1] == 1 + rows * columns


def test_images_smaller_than_a_patch_are_an_error():
    with pytest.raises(ValueError, match="at least one patch"):
        DinoVitModel(small_vit_config())(images(7, 32))


def test_stochastic_depth_rises_over_the_layers():
    model = DinoVitModel(small_vit_config(drop_path=0.2))
    assert [layer.drop_path.probability for layer in model.layers] == pytest.approx([0, 0.1, 0.2])


def test_drop_path_drops_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = DropPath(0.25)(torch.ones(20000, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped[:, 0].equal(dropped[:, 1])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert DropPath(0.25).eval()(torch.ones(4, 2)).equal(torch.ones(4, 2))


def test_the_classifier_trains_and_reads_the_layers_it_should():
    torch.manual_seed(0)
    config = small_vit_config(num_classification_layers=2, num_labels=4)
    model = DinoVitForImageClassification(config)
    assert model.classifier.in_features == 48
    output = model(images(), labels=torch.tensor([0, 3]))
    output.loss.backward()
    assert output.logits.shape == (2, 4)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_vision_transformer_feeds_the_detector():
    torch.manual_seed(0)
    backbone = small_vit_config(out_features=["stage2", "stage3"])
    config = small_detector_config(backbone_config=backbone, frozen_backbone_stages=0)
    model = SgtrDetrForObjectDetection(config)
    output = model(images(32, 48), labels=random_labels())
    output.loss.backward()
    gradients = [p.grad for p in model.model.backbone.parameters()]
    assert all(gradient is not None for gradient in gradients)


def test_the_backbone_returns_maps_of_patches():
    torch.manual_seed(0)
    config = small_vit_config(out_features=["stage1", "stage3"], num_registers=1)
    backbone = AutoBackbone.from_config(config).eval()
    pixel_values = images(24, 40)
    with torch.no_grad():
        maps = backbone(pixel_values).feature_maps
        tokens = backbone.model(pixel_values).last_hidden_state
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 24, 3, 5)] * 2
    assert backbone.channels == [24, 24]
    torch.testing.assert_close(maps[1][:, :, 1, 2], tokens[:, 2 + 5 + 2])


def test_auto_classes_load_what_was_saved(tmp_path):
    torch.manual_seed(0)
    model = DinoVitForImageClassification(small_vit_config(num_labels=4)).eval()
    model.save_pretrained(tmp_path)
    DinoVitImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert loaded(images()).logits.equal(model(images()).logits)
    # The backbone alone: the classifier is left out.
    assert isinstance(AutoModel.from_pretrained(tmp_path), DinoVitModel)
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size == {"height": 32, "width": 32}


def test_both_image_processors_agree():
    picture = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    picture = torch.nn.functional.avg_pool2d(picture.float(), 9, 1, 4).to(torch.uint8)
    torchvision = DinoVitImageProcessor()(picture, return_tensors="pt")["pixel_values"]
    pil = DinoVitImageProcessorPil()(picture, return_tensors="pt")["pixel_values"]
    assert torchvision.shape == (1, 3, 224, 224)
    assert (torchvision - pil).abs().max() < 0.05


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"d_model": 25}, "divisible by `num_attention_heads`"),
        ({"patch_size": 64}, "`image_size` must be at least `patch_size`"),
        ({"num_classification_layers": 4}, "num_classification_layers"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"num_registers": -1}, "num_registers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"interpolation_offset": 1.0}, "interpolation_offset"),
    ],
)
def test_wrong_sizes_are_errors(fields, words):
    with pytest.raises(Exception, match=words):
        small_vit_config(**fields)
