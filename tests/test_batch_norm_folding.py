import copy

import pytest
import torch
from torch import nn
from transformers import ResNetConfig

from conftest import small_backbone, small_config
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.modeling.batch_norm_folding import FoldedInference


def resnet():
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[2, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage3", "stage4"],
    )


def model_with_statistics(backbone=resnet):
    """A model whose batch norms do something, as after training."""
    torch.manual_seed(0)
    config = small_config({"backbone_config": backbone()})
    model = SgtrForSceneGraphGeneration(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def backbone_of(model):
    return model.model.detector.model.backbone


def count_norms(module):
    return sum(isinstance(part, nn.BatchNorm2d) for part in module.modules())


def folded_backbone(infer):
    return infer._last[1]


def assert_same(model, infer, pixel_values):
    with torch.no_grad():
        expected, found = model(pixel_values), infer(model, pixel_values)
    for name in ("logits", "pred_boxes", "predicate_logits"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backbone", [resnet, small_backbone], ids=["resnet", "timm"])
def test_folding_changes_nothing_but_rounding(backbone, pixel_values):
    model = model_with_statistics(backbone)
    infer = FoldedInference()
    assert_same(model, infer, pixel_values)
    assert count_norms(folded_backbone(infer)) == 0
    assert count_norms(backbone_of(model)) > 0


def test_the_model_itself_stays_as_it_is(pixel_values):
    model = model_with_statistics()
    before = copy.deepcopy(model.state_dict())
    FoldedInference()(model, pixel_values)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model(pixel_values).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in backbone_of(model).parameters())


def replace_parameter(model):
    convolution = next(
        module for module in backbone_of(model).modules() if isinstance(module, nn.Conv2d)
    )
    convolution.weight = nn.Parameter(convolution.weight.detach() * 2)


def step(model):
    optimizer = torch.optim.SGD(backbone_of(model).parameters(), lr=0.1)
    for parameter in backbone_of(model).parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load_other_weights(model):
    model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def replace_module(model):
    for parent in backbone_of(model).modules():
        for name, module in parent._modules.items():
            if isinstance(module, nn.BatchNorm2d):
                parent._modules[name] = nn.Identity()


@pytest.mark.parametrize(
    "change",
    [step, replace_parameter, load_other_weights, replace_module, nn.Module.double],
    ids=["step", "parameter", "load", "module", "dtype"],
)
def test_a_changed_backbone_is_folded_again(change, pixel_values):
    model = model_with_statistics()
    infer = FoldedInference()
    assert_same(model, infer, pixel_values)
    with torch.no_grad():
        before = model(pixel_values).logits
    change(model)
    pixel_values = pixel_values.to(model.dtype)
    with torch.no_grad():
        assert not torch.equal(model(pixel_values).logits, before)
    assert_same(model, infer, pixel_values)


def test_an_unchanged_backbone_is_folded_once(pixel_values):
    model = model_with_statistics()
    infer = FoldedInference()
    infer(model, pixel_values)
    folded = folded_backbone(infer)
    infer(model, pixel_values + 1)
    assert folded_backbone(infer) is folded


class NormFirst(nn.Module):
    """Lists a convolution before the batch norm that it runs after."""

    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.norm.running_mean.fill_(0.5)

    def forward(self, features):
        return self.convolution(self.norm(features))


def test_a_misleading_order_of_modules_is_found_out(pixel_values):
    model = model_with_statistics()
    embedder = backbone_of(model).embedder
    channels = embedder.embedder.convolution.out_channels
    embedder.pooler = nn.Sequential(embedder.pooler, NormFirst(channels)).eval()
    infer = FoldedInference()
    assert_same(model, infer, pixel_values)
    assert folded_backbone(infer) is None


def test_modules_with_hooks_run_as_they_are(pixel_values):
    model = model_with_statistics()
    norm = next(
        module for module in backbone_of(model).modules() if isinstance(module, nn.BatchNorm2d)
    )
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(True))
    infer = FoldedInference()
    assert_same(model, infer, pixel_values)
    assert count_norms(folded_backbone(infer)) == 1
    calls.clear()
    infer(model, pixel_values)
    assert len(calls) == 1


def test_norms_in_training_are_left_alone(pixel_values):
    model = model_with_statistics()
    backbone_of(model).train()
    infer = FoldedInference()
    infer(model, pixel_values)
    assert folded_backbone(infer) is None


def test_a_model_without_batch_norms_is_called_as_it_is(pixel_values):
    model = model_with_statistics()
    replace_module(model)
    infer = FoldedInference()
    assert_same(model, infer, pixel_values)
    assert folded_backbone(infer) is None
