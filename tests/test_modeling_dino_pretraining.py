import pytest
import torch
from transformers import AutoModelForPreTraining

from conftest import random_labels, small_config, small_detector_config
from sgtr_hf import (
    DinoVitBackbone,
    DinoVitForImageClassification,
    DinoVitForPreTraining,
    DinoVitModel,
    SgtrDetrForObjectDetection,
    SgtrForSceneGraphGeneration,
)
from sgtr_hf.training.backbone_weights import load_backbone_weights
from test_self_distillation_schedules import tiny_config


def crops(count, size, num_images=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, num_images, 3, size, size, generator=generator)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DinoVitForPreTraining(tiny_config(drop_path=0.1, dropout=0.1))
    # Student and teacher differ, as in the midst of a training.
    with torch.no_grad():
        for parameter in model.student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def test_the_teacher_starts_as_the_student():
    model = DinoVitForPreTraining(tiny_config())
    student = dict(model.student.named_parameters())
    for part in ("model", "head"):
        for name, parameter in getattr(model, part).named_parameters():
            assert parameter.equal(student[f"{part}.{name}"]), name
    directions = model.student.head.prototypes.direction
    assert 0 < directions.abs().max() <= 8**-0.5
    assert model.student.head.projection[0].weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_crops_of_a_resolution_are_one_forward_pass(model):
    sizes = []
    model.student.model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    heads = []
    model.student.head.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0].shape))
    output = model(crops(2, 16), crops(4, 8))
    assert sizes == [(6, 3, 16, 16), (12, 3, 8, 8)]
    assert heads == [(6, 3, 24)]
    assert output.student_logits.shape == (6, 3, 20)
    assert output.teacher_logits.shape == (2, 3, 20)


def test_a_crop_is_seen_as_it_is_alone(model):
    model.eval()
    views, local = crops(2, 16), crops(2, 8)
    output = model(views, local)
    alone = model.student.head(model.student.model(local[1, 2][None]).pooler_output)
    torch.testing.assert_close(output.student_logits[3, 2], alone[0])
    teacher = model.head(model.model(views[1]).pooler_output)
    torch.testing.assert_close(output.teacher_logits[1], teacher)


def test_gradients_reach_the_student_alone(model):
    model.train()(crops(2, 16), crops(2, 8)).loss.backward()
    for name, parameter in model.named_parameters():
        is_trained = name.startswith("student.") and "prototypes.length" not in name
        assert (parameter.grad is not None) == is_trained, name


def test_the_teacher_drops_nothing(model):
    model.train()
    views = crops(2, 16)
    first, second = model(views), model(views)
    assert first.teacher_logits.equal(second.teacher_logits)
    assert not first.student_logits.equal(second.student_logits)


def test_the_teacher_is_a_moving_average_and_its_center_too(model):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = [model(crops(2, 16, seed=seed)).teacher_logits for seed in (1, 2)]
    # Within an update, nothing moves.
    assert model.center.equal(before["center"])
    model.update_teacher(0.75)
    for name in ("model.norm.weight", "head.projection.0.bias", "head.prototypes.direction"):
        expected = 0.75 * before[name] + 0.25 * before[f"student.{name}"]
        torch.testing.assert_close(model.state_dict()[name], expected)
    mean = torch.stack(logits).mean((0, 1, 2))
    torch.testing.assert_close(model.center, 0.1 * mean)
    # Evaluation leaves no trace.
    model.eval()(crops(2, 16))
    center = model.center.clone()
    model.update_teacher(1.0)
    assert model.center.equal(center)


def test_the_head_stays_in_float32_under_autocast(model):
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(crops(2, 16))
    assert output.student_logits.dtype == output.loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("views", "local", "words"),
    [
        (crops(2, 16)[0], None, r"`pixel_values` must be crops"),
        (crops(2, 16), crops(2, 8, num_images=2), r"`local_pixel_values` must be crops"),
        (crops(1, 16), None, "only one"),
    ],
)
def test_wrong_crops_are_errors(model, views, local, words):
    with pytest.raises(ValueError, match=words):
        model(views, local)


def test_every_class_finds_the_teacher_in_a_saved_folder(model, tmp_path, caplog):
    model.eval().save_pretrained(tmp_path)
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert isinstance(loaded, DinoVitForPreTraining)
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    tokens = model.model(crops(1, 16)[0]).last_hidden_state
    caplog.clear()
    assert DinoVitModel.from_pretrained(tmp_path).eval()(crops(1, 16)[0])[0].equal(tokens)
    assert "UNEXPECTED" not in caplog.text
    for kind in (DinoVitForImageClassification, DinoVitBackbone):
        encoder = kind.from_pretrained(tmp_path).eval().model
        assert encoder(crops(1, 16)[0])[0].equal(tokens)


def test_a_convolutional_stem_sees_whole_patches_of_any_size():
    torch.manual_seed(0)
    model = DinoVitModel(tiny_config(convolutional_stem=True)).eval()
    pixels = crops(1, 23)[0]
    tokens = model(pixels).last_hidden_state
    assert tokens.shape == (3, 1 + 25, 24)
    # What is left over on the right and at the bottom is not seen.
    assert tokens.equal(model(pixels[..., :20, :20]).last_hidden_state)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"convolutional_stem": True, "patch_size": 6}, "power of 2"),
        ({"convolutional_stem": True, "patch_size": 16, "d_model": 26}, "divisible by 8"),
        ({"num_prototypes": 0}, "num_prototypes"),
        ({"student_temperature": 0.0}, "student_temperature"),
        ({"center_momentum": 1.5}, "center_momentum"),
    ],
)
def test_wrong_settings_are_errors(fields, words):
    with pytest.raises(Exception, match=words):
        tiny_config(**fields)


def vit_backbone(**fields):
    return tiny_config(image_size=32, patch_size=8, out_features=["stage1", "stage2"], **fields)


@pytest.mark.parametrize("frozen", [0, 2, -1])
def test_detector_and_scene_graph_model_train_on_a_vision_transformer(frozen, pixel_values):
    detector = {"backbone_config": vit_backbone(), "frozen_backbone_stages": frozen}
    torch.manual_seed(0)
    for model in (
        SgtrDetrForObjectDetection(small_detector_config(**detector)),
        SgtrForSceneGraphGeneration(small_config(detector=detector)),
    ):
        output = model(pixel_values, labels=random_labels())
        output.loss.backward()
        backbone = next(m for m in model.modules() if isinstance(m, DinoVitBackbone))
        trained = {n for n, p in backbone.named_parameters() if p.grad is not None}
        expected = {
            0: lambda _: True,
            2: lambda name: name.startswith(("model.layers.1.", "model.norm.")),
            -1: lambda _: False,
        }[frozen]
        assert trained == {name for name, _ in backbone.named_parameters() if expected(name)}


def test_a_backbone_trained_without_labels_goes_into_a_detector(model, tmp_path):
    config = tiny_config(image_size=32, patch_size=8)
    torch.manual_seed(1)
    pretraining = DinoVitForPreTraining(config)
    pretraining.save_pretrained(tmp_path)
    detector = SgtrDetrForObjectDetection(
        small_detector_config(backbone_config=vit_backbone(), frozen_backbone_stages=0)
    )
    load_backbone_weights(detector.model.backbone, str(tmp_path))
    for name, tensor in pretraining.model.state_dict().items():
        assert detector.model.backbone.model.state_dict()[name].equal(tensor), name
    larger = tiny_config(image_size=64, patch_size=8, out_features=["stage1", "stage2"])
    other = SgtrDetrForObjectDetection(small_detector_config(backbone_config=larger))
    with pytest.raises(ValueError, match=r"`backbone_weights` .*position` of shape"):
        load_backbone_weights(other.model.backbone, str(tmp_path))
