"""The classes of transformers as second witnesses, on shared weights whose norms are not fresh.

With fresh norms (1 and 0) many mistakes cannot be seen.
"""

import pytest
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ViTConfig,
    ViTModel,
)

from sgtr_hf import DinoVitConfig, DinoVitModel, SgtrDetrConfig, SgtrDetrForObjectDetection
from transformers_weights import DETR_RULES, VIT_RULES, copy_weights


def wear(model):
    """Give every tensor values as after training."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        draw = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var"):
            tensor.copy_(1 + 0.2 * draw.abs())
        elif tensor.ndim == 1:
            tensor.copy_(0.6 + 0.1 * draw if name.endswith("weight") else 0.1 * draw)
        else:
            tensor.copy_(draw / tensor[0].numel() ** 0.5)
    return model.eval()


def make_detr_pair(**fields):
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 2, 1, 1],
        layer_type="bottleneck",
        out_features=["stage4"],
    )
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "num_queries": 9}
    witness = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, backbone=None, backbone_config=backbone,
            encoder_ffn_dim=48, decoder_ffn_dim=48,
            encoder_attention_heads=4, decoder_attention_heads=4,
            num_labels=5, **sizes, **fields,
        )
    )  # fmt: skip
    ours = SgtrDetrForObjectDetection(
        SgtrDetrConfig(
            backbone_config=backbone, feed_forward_dim=48, num_attention_heads=4, num_labels=5,
            **sizes,
        )
    )  # fmt: skip
    copy_weights(wear(witness), ours, DETR_RULES)
    return ours.eval(), witness


def make_images():
    pixel_values = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(5))
    pixel_mask = torch.ones(2, 96, 128, dtype=torch.int64)
    pixel_mask[1, 64:], pixel_mask[1, :, 96:] = 0, 0
    pixel_values[1, :, 64:], pixel_values[1, :, :, 96:] = 0, 0
    return pixel_values, pixel_mask


def test_detr_equals_transformers():
    ours, witness = make_detr_pair(auxiliary_loss=False)
    images = make_images()
    with torch.no_grad():
        found, expected = ours(*images), witness(*images)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=2e-6)


def test_auxiliary_levels_do_not_change_the_last_one():
    """With `auxiliary_loss` the DETR of transformers 5.23 feeds normalised states onwards."""
    ours, witness = make_detr_pair(auxiliary_loss=True)
    images = make_images()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.4)}] * 2
    with torch.no_grad():
        plain, with_levels, other = ours(*images), ours(*images, labels=labels), witness(*images)
    torch.testing.assert_close(with_levels.logits, plain.logits)
    assert len(with_levels.auxiliary_outputs) == 2
    # When this fails, transformers has repaired it: say so in docs/fidelity.md.
    assert (other.logits - plain.logits).abs().max() > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_vision_transformer_equals_transformers(implementation):
    witness = ViTModel(
        ViTConfig(
            image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=3,
            num_attention_heads=3, intermediate_size=40, layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    config = DinoVitConfig(
        image_size=32, patch_size=8, d_model=24, num_hidden_layers=3, num_attention_heads=3,
        feed_forward_dim=40, attn_implementation=implementation, interpolation_offset=0,
    )  # fmt: skip
    ours = DinoVitModel(config).eval()
    copy_weights(wear(witness), ours, VIT_RULES)
    for size in ((32, 32), (24, 56)):
        pixel_values = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            found = ours(pixel_values).last_hidden_state
            expected = witness(
                pixel_values, interpolate_pos_encoding=size != (32, 32)
            ).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
