"""What transformers' common tests found, kept; tests/transformers_common_tests.py runs them all."""

import pytest
import torch

import sgtr_hf
from conftest import random_labels, small_config, small_detector_config


def vit_config(**fields):
    sizes = {"image_size": 32, "d_model": 32, "num_attention_heads": 4, "feed_forward_dim": 48}
    return sgtr_hf.DinoVitConfig(num_hidden_layers=2, num_labels=3, **(sizes | fields))


def make(kind):
    torch.manual_seed(0)
    models = {
        "scene graphs": lambda: sgtr_hf.SgtrForSceneGraphGeneration(small_config()),
        "detector": lambda: sgtr_hf.SgtrDetrForObjectDetection(small_detector_config()),
        "classifier": lambda: sgtr_hf.DinoVitForImageClassification(vit_config(drop_path=0.1)),
        "tokens": lambda: sgtr_hf.DinoVitModel(vit_config()),
    }
    return models[kind]().eval()


@pytest.mark.parametrize("kind", ["scene graphs", "detector", "classifier", "tokens"])
def test_outputs_become_tuples_on_request(kind, pixel_values):
    model = make(kind)
    with torch.no_grad():
        expected = model(pixel_values)
        found = model(pixel_values, return_dict=False)
    assert isinstance(found, tuple)
    assert len(found) == len(expected.to_tuple())
    first = found[0], expected.to_tuple()[0]
    torch.testing.assert_close(*first)


@pytest.mark.parametrize("kind", ["scene graphs", "detector"])
def test_losses_come_first_and_by_name(kind, pixel_values):
    model = make(kind)
    output = model(pixel_values, labels=random_labels())
    assert output[0] is output["loss"] is output.loss
    assert output["loss_dict"] is output.loss_dict
    loss, *_ = model(pixel_values, labels=random_labels(), return_dict=False)
    torch.testing.assert_close(loss, output.loss)


def test_a_vision_transformer_is_made_without_memory():
    with torch.device("meta"):
        model = make("classifier")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_configuration_decides_what_is_returned(pixel_values):
    config = vit_config(output_hidden_states=True, output_attentions=True)
    config._attn_implementation = "eager"
    model = sgtr_hf.DinoVitForImageClassification(config).eval()
    output = model(pixel_values)
    assert (len(output.hidden_states), len(output.attentions)) == (3, 2)
    assert model(pixel_values, output_hidden_states=False).hidden_states is None


@pytest.mark.parametrize(
    ("problem", "labels", "loss"),
    [
        (None, torch.tensor([0, 2]), torch.nn.functional.cross_entropy),
        (
            "multi_label_classification",
            torch.tensor([[1.0, 0, 1], [0, 0, 1]]),
            torch.nn.functional.binary_cross_entropy_with_logits,
        ),
        ("regression", torch.rand(2, 3), torch.nn.functional.mse_loss),
    ],
    ids=["one class", "several classes", "numbers"],
)
def test_a_classifier_knows_three_kinds_of_labels(pixel_values, problem, labels, loss):
    torch.manual_seed(0)
    model = sgtr_hf.DinoVitForImageClassification(vit_config(problem_type=problem))
    output = model(pixel_values, labels=labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
