import pytest
import torch
from transformers import ResNetConfig

from conftest import random_labels, small_detector_config
from sgtr_hf import SgtrDetrForObjectDetection
from sgtr_hf.modeling.prediction_heads import inverse_sigmoid


VARIANTS = {
    "anchors": {},
    "anchors with denoising": {"num_denoising_groups": 3},
    "learned": {"query_type": "learned", "classification": "softmax"},
    "pre-norm": {"query_type": "learned", "norm_first": True},
    "one level": {
        "backbone_config": ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        )
    },
}


def make_model(**fields):
    torch.manual_seed(0)
    return SgtrDetrForObjectDetection(small_detector_config(**fields)).eval()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_trains_all_that_is_not_frozen(fields, pixel_values):
    model = make_model(**fields).train()
    output = model(pixel_values, labels=random_labels())
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.loss.item() == pytest.approx(
        sum(value.item() for value in output.loss_dict.values()), rel=1e-5
    )
    without_gradient = [
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert without_gradient == []
    frozen_with_gradient = [
        name for name, p in model.named_parameters() if not p.requires_grad and p.grad is not None
    ]
    assert frozen_with_gradient == []


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_batched_images_of_one_size_equal_single_ones(fields, pixel_values):
    model = make_model(**fields)
    with torch.no_grad():
        batched = model(pixel_values)
        single = model(pixel_values[1:])
    torch.testing.assert_close(batched.logits[1:], single.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(batched.pred_boxes[1:], single.pred_boxes, rtol=0, atol=1e-5)


def test_padding_is_masked_in_the_transformer(pixel_values):
    model = make_model()
    mask = torch.ones(2, 64, 96, dtype=torch.int64)
    mask[:, :, 64:] = 0
    memory = model.model.encode(pixel_values, mask)
    assert memory.padding_mask.sum().item() < memory.padding_mask.numel()
    with torch.no_grad():
        model.model.input_projections.eval()
        full = model(pixel_values, torch.ones_like(mask)).logits
        none = model(pixel_values).logits
    torch.testing.assert_close(full, none, rtol=0, atol=1e-5)


def test_inference_returns_no_auxiliary_levels(pixel_values):
    output = make_model()(pixel_values)
    assert output.auxiliary_outputs is None
    assert output.loss is None
    assert output.logits.shape == (2, 10, 3)
    assert output.entity_probabilities.shape == (2, 10, 3)
    assert ((output.pred_boxes >= 0) & (output.pred_boxes <= 1)).all()


def test_labels_give_all_levels(pixel_values):
    output = make_model()(pixel_values, labels=random_labels())
    assert len(output.auxiliary_outputs) == 1
    assert "loss_class_0" in output.loss_dict


def test_denoising_queries_leave_the_predictions_alone(pixel_values):
    model = make_model(num_denoising_groups=4, dropout=0.0).train()
    with_denoising = model(pixel_values, labels=random_labels())
    model.eval()
    without = model(pixel_values, labels=random_labels())
    assert "loss_denoising_box" in with_denoising.loss_dict
    assert "loss_denoising_box" not in without.loss_dict
    torch.testing.assert_close(with_denoising.logits, without.logits, rtol=1e-4, atol=1e-5)


def test_attention_backends_agree(pixel_values):
    model = make_model()
    with torch.no_grad():
        fused = model(pixel_values).logits
        model.set_attn_implementation({"": "eager"})
        assert model.config._attn_implementation == "eager"
        written_out = model(pixel_values).logits
    torch.testing.assert_close(fused, written_out, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(pixel_values):
    gradients = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(pixel_values, labels=random_labels()).loss.backward()
        gradients.append(model.class_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_heads_start_rare_and_anchors_start_spread():
    model = make_model()
    assert torch.allclose(model.class_head.bias.sigmoid(), torch.tensor(0.01))
    sizes = model.model.anchor_embedding.weight[:, 2:].sigmoid()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 0.25))
    assert model.model.decoder.box_head.layers[-1].weight.abs().max() == 0


def test_saved_weights_come_back(tmp_path, pixel_values):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = SgtrDetrForObjectDetection.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits)
    assert loaded.config.id2label == {0: "cup", 1: "table", 2: "box"}


def test_a_new_vocabulary_replaces_the_head_alone(tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = SgtrDetrForObjectDetection.from_pretrained(
        tmp_path, id2label={0: "a", 1: "b"}, ignore_mismatched_sizes=True
    )
    assert loaded.class_head.out_features == 2


def test_more_annotations_than_queries_is_an_error(pixel_values):
    model = make_model(num_queries=2)
    with pytest.raises(ValueError, match="num_queries"):
        model(pixel_values, labels=random_labels())


def test_a_label_out_of_range_is_an_error(pixel_values):
    labels = random_labels()
    labels[1]["class_labels"][0] = 3
    with pytest.raises(ValueError, match="class_labels"):
        make_model()(pixel_values, labels=labels)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("d_model", "32"),
        ("d_model", 30),
        ("num_queries", 0),
        ("num_queries", 2.5),
        ("dropout", 1.5),
        ("box_loss_weight", -1.0),
        ("query_type", "boxes"),
        ("frozen_backbone_stages", -2),
        ("position_temperature", 0),
    ],
)
def test_wrong_fields_name_themselves(field, value):
    with pytest.raises(Exception, match=field):
        small_detector_config(**{field: value})


def test_images_without_entities_train(pixel_values):
    labels = [
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
        for _ in range(2)
    ]
    model = make_model(num_denoising_groups=2).train()
    output = model(pixel_values, labels=labels)
    output.loss.backward()
    assert torch.isfinite(output.loss)


def test_cells_of_every_level_can_grow():
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = small_detector_config(backbone_config=backbone, select_queries=True)
    model = SgtrDetrForObjectDetection(config)
    sizes = model.model.encode(torch.rand(1, 3, 128, 128)).cells[0, :, 2]
    assert sizes.unique().tolist() == pytest.approx([0.15, 0.3, 0.6])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_logit_of_the_whole_image_is_finite(dtype):
    logits = inverse_sigmoid(torch.tensor([0.0, 0.5, 1.0], dtype=dtype))
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()
