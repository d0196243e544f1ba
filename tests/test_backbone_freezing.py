import pytest
import torch
from torch import nn
from transformers import AutoBackbone, ResNetConfig, SwinConfig

from conftest import random_labels, small_backbone, small_detector_config
from sgtr_hf import SgtrDetrForObjectDetection
from sgtr_hf.modeling.backbone_freezing import freeze_backbone


def resnet(**fields):
    return ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[2, 1, 1, 1],
        layer_type="bottleneck",
        out_features=["stage4"],
        **fields,
    )


def trainable(backbone):
    return {name for name, p in backbone.named_parameters() if p.requires_grad}


def frozen_parts(config, stages):
    backbone = AutoBackbone.from_config(config)
    everything = trainable(backbone)
    freeze_backbone(backbone, stages)
    return everything - trainable(backbone), everything


@pytest.mark.parametrize("stride_in_first", [False, True])
def test_resnet_freezes_stem_and_first_stage(stride_in_first):
    frozen, everything = frozen_parts(resnet(downsample_in_bottleneck=stride_in_first), 2)
    expected = {n for n in everything if n.startswith(("embedder.", "encoder.stages.0."))}
    assert frozen == expected


def test_resnet_stem_alone():
    frozen, everything = frozen_parts(resnet(), 1)
    assert frozen == {name for name in everything if name.startswith("embedder.")}


def test_timm_freezes_up_to_stride_eight():
    frozen, everything = frozen_parts(small_backbone(), 3)
    parts = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2.")
    expected = {n for n in everything if n.removeprefix("_backbone.").startswith(parts)}
    assert frozen == expected


def test_swin_freezes_by_stage():
    config = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage4"],
    )
    frozen, everything = frozen_parts(config, 2)
    expected = {n for n in everything if ".embeddings." in n or ".encoder.layers.0." in n}
    assert frozen == expected


@pytest.mark.parametrize(("stages", "share"), [(0, 0.0), (-1, 1.0)])
def test_none_and_all(stages, share):
    frozen, everything = frozen_parts(resnet(), stages)
    assert len(frozen) == share * len(everything)


def test_too_many_stages_is_an_error():
    with pytest.raises(ValueError, match="5 stages"):
        frozen_parts(resnet(), 9)


def test_batch_norm_stays_as_loaded_while_training():
    torch.manual_seed(0)
    model = SgtrDetrForObjectDetection(small_detector_config()).train()
    norms = [m for m in model.model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    before = [norm.running_mean.clone() for norm in norms]
    model(torch.randn(2, 3, 64, 64), labels=random_labels()).loss.backward()
    assert all(torch.equal(b, n.running_mean) for b, n in zip(before, norms, strict=True))
    assert not any(p.requires_grad for norm in norms for p in norm.parameters())


def test_batch_norm_trains_when_asked():
    config = small_detector_config(freeze_batch_norm=False, frozen_backbone_stages=0)
    model = SgtrDetrForObjectDetection(config).train()
    norms = [m for m in model.model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training for norm in norms)


def test_gradients_reach_exactly_the_open_stages():
    torch.manual_seed(0)
    config = small_detector_config(backbone_config=resnet(), frozen_backbone_stages=2)
    model = SgtrDetrForObjectDetection(config).train()
    model(torch.randn(2, 3, 64, 64), labels=random_labels()).loss.backward()
    with_gradient = {
        name.split(".layers")[0]
        for name, p in model.model.backbone.named_parameters()
        if p.grad is not None
    }
    assert with_gradient == {f"encoder.stages.{stage}" for stage in (1, 2, 3)}
