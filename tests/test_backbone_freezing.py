import pytest
import torch
from torch import nn
from transformers import (
    AutoBackbone,
    BeitConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    PvtV2Config,
    ResNetConfig,
    SwinConfig,
    TimmBackboneConfig,
)

from conftest import random_labels, small_backbone, small_detector_config
from sgtr_hf import DinoVitConfig, SgtrDetrForObjectDetection
from sgtr_hf.modeling.backbone_freezing import freeze_backbone
from sgtr_hf.modeling.detector_backbone import make_backbone


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
    backbone = make_backbone(small_detector_config(backbone_config=config))
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


# Of each model: what lies in and before its first two stages, and what comes right after.
TIMM = {
    "convnext_atto": ("stem_0 stem_1 stages_0 stages_1", "stages_2"),
    "swin_tiny_patch4_window7_224": ("patch_embed layers_0 layers_1", "layers_2"),
    "vit_tiny_patch16_224": (
        "model.cls_token model.pos_embed model.patch_embed model.blocks.0 model.blocks.1",
        "model.blocks.2",
    ),
    "edgenext_xx_small": ("stem_0 stem_1 stages_0 stages_1", "stages_2"),
    "hgnetv2_b0": ("stem stages_0 stages_1", "stages_2"),
    "fastvit_t8": ("stem_0 stem_1 stem_2 stages_0 stages_1", "stages_2"),
    "repvgg_a0": ("stem stages_0", "stages_1"),
    "efficientvit_b0": ("stem_in_conv stem_res0 stages_0 stages_1", "stages_2"),
    "mobileone_s0": ("stem stages_0", "stages_1"),
    "densenet121": ("features_conv0 features_norm0 features_denseblock1", "features_transition1"),
    "ese_vovnet19b_dw": ("stem_0 stem_1 stem_2 stages_0", "stages_1"),
}


def within(name, parts):
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_freeze_two_stages(name):
    leading, following = TIMM[name]
    config = TimmBackboneConfig(backbone=name, use_pretrained_backbone=False)
    frozen, everything = frozen_parts(config, 2)
    parts = [f"_backbone.{part}" for part in leading.split()]
    assert frozen == {parameter for parameter in everything if within(parameter, parts)}
    assert any(within(parameter, [f"_backbone.{following}"]) for parameter in everything - frozen)


VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 64,
    "patch_size": 16,
}
CONVOLUTIONS = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
OTHERS = {
    "dinov3_vit": (DINOv3ViTConfig(**VIT), ("embeddings",), "model.layer"),
    "beit": (BeitConfig(**VIT), ("beit.embeddings",), "beit.layers"),
    "dinov3_convnext": (
        DINOv3ConvNextConfig(**CONVOLUTIONS),
        ("model.stages.0.downsample_layers",),
        "model.stages",
    ),
    "dino_vit": (
        DinoVitConfig(d_model=16, num_hidden_layers=3, num_attention_heads=2),
        ("model.embedding",),
        "model.layers",
    ),
}


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_models_of_transformers_freeze_stem_and_stages(kind, stages):
    config, stem, blocks = OTHERS[kind]
    frozen, everything = frozen_parts(config, stages)
    parts = (*stem, *(f"{blocks}.{block}" for block in range(stages - 1)))
    assert frozen == {parameter for parameter in everything if within(parameter, parts)}
    assert frozen
    assert frozen != everything


@pytest.mark.parametrize("stages", [1, 2])
def test_a_backbone_that_names_no_stem_counts_from_its_first_stage(stages):
    frozen, everything = frozen_parts(PvtV2Config(image_size=64), stages)
    parts = [f"encoder.layers.{stage}" for stage in range(stages)]
    assert frozen == {parameter for parameter in everything if within(parameter, parts)}


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "repvgg_a0"])
def test_no_gradient_enters_the_frozen_stages(name):
    config = TimmBackboneConfig(backbone=name, use_pretrained_backbone=False)
    backbone = AutoBackbone.from_config(config)
    freeze_backbone(backbone, 2)
    side = 224 if "vit" in name else 64
    sum(maps.sum() for maps in backbone(torch.randn(2, 3, side, side)).feature_maps).backward()
    with_gradient = {n for n, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient
    parts = [f"_backbone.{part}" for part in TIMM[name][0].split()]
    assert not any(within(parameter, parts) for parameter in with_gradient)


@pytest.mark.parametrize("stages", [2, -1])
def test_batch_norms_of_frozen_stages_keep_their_statistics(stages):
    torch.manual_seed(0)
    config = small_detector_config(
        backbone_config=resnet(), freeze_batch_norm=False, frozen_backbone_stages=stages
    )
    model = SgtrDetrForObjectDetection(config).eval().train()
    norms = {
        name: module
        for name, module in model.model.backbone.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    before = {name: norm.running_mean.clone() for name, norm in norms.items()}
    model(torch.randn(2, 3, 64, 64), labels=random_labels())
    kept = {name for name, norm in norms.items() if torch.equal(norm.running_mean, before[name])}
    frozen = ["embedder", "encoder.stages.0"]
    assert kept == {name for name in norms if stages == -1 or within(name, frozen)}
    assert {name for name, norm in norms.items() if not norm.training} == kept


def test_frozen_stages_of_a_new_model_are_in_evaluation_mode():
    config = small_detector_config(freeze_batch_norm=False, frozen_backbone_stages=-1)
    backbone = SgtrDetrForObjectDetection(config).model.backbone
    assert not any(m.training for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
