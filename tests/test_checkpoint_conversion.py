import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel

import sgtr_hf.cli
from recorded_weights import make_batch, recorded_checkpoint
from sgtr_hf import (
    DinoVitForPreTraining,
    DinoVitImageProcessor,
    SgtrDetrForObjectDetection,
    SgtrForSceneGraphGeneration,
)
from sgtr_hf.hub.checkpoint_conversion import convert_checkpoint, convert_file
from sgtr_hf.hub.checkpoint_reading import public_vocabulary, read_checkpoint


FIXTURES = Path(__file__).parent / "fixtures"
# Of a tensor's largest absolute value.
TOLERANCE = 1e-5


def assert_recorded(found, recorded, name):
    difference = (found[..., : recorded.shape[-1]] - recorded).abs().max() / recorded.abs().max()
    assert difference < TOLERANCE, f"{name} differs by {difference:.1e}"


@pytest.fixture(scope="module")
def detr_weights():
    return recorded_checkpoint(FIXTURES / "detr_resnet50.keys.json")


@pytest.fixture(scope="module")
def sgtr_weights():
    return recorded_checkpoint(FIXTURES / "sgtr_vg.keys.json")


def test_detr_r50_equals_the_recorded_forward_pass(detr_weights):
    recorded = load_file(FIXTURES / "detr.safetensors")
    model, _, report = convert_checkpoint(detr_weights, "detr")
    model.eval()
    assert report.used == len(detr_weights) - report.unused
    batch = make_batch(
        recorded, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], bgr=False, scale=1 / 255
    )
    with torch.no_grad():
        levels = model.read_levels(model.model(*batch, all_levels=True))
    for prefix, level in (("output", -1), ("aux.0", 0)):
        assert_recorded(levels.logits[level], recorded[f"{prefix}.pred_logits"], prefix)
        assert_recorded(levels.boxes[level], recorded[f"{prefix}.pred_boxes"], prefix)
    assert model.config.id2label[17] == "cat"


RECORDED_NAMES = {
    "predicate_logits": "pred_rel_logits",
    "relation_vectors": "pred_rel_vec",
    "subject_logits": "pred_rel_sub_logits",
    "subject_boxes": "pred_rel_sub_box",
    "object_logits": "pred_rel_obj_logits",
    "object_boxes": "pred_rel_obj_box",
    "subject_scores": "sub_ent_indexing_rule",
    "object_scores": "obj_ent_indexing_rule",
    "logits": "pred_logits",
    "pred_boxes": "pred_boxes",
}


def test_sgtr_vg150_equals_the_recorded_forward_pass(sgtr_weights):
    recorded = load_file(FIXTURES / "forward_sgtr.safetensors")
    model, _, report = convert_checkpoint(sgtr_weights, "sgtr-vg150")
    model.eval()
    batch = make_batch(recorded, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], bgr=True, scale=1.0)
    with torch.no_grad():
        output = model(*batch)
    for name, recorded_name in RECORDED_NAMES.items():
        assert_recorded(output[name], recorded[f"output.{recorded_name}"], name)
    assert report.used + report.unused == len(sgtr_weights)
    assert report.new == ()
    assert (model.config.id2label[149], model.config.id2predicate[0]) == ("zebra", "above")


def open_images_weights(sgtr_weights):
    """The same with the predicate head of 4 predicates and background."""
    weights = {
        name: tensor
        for name, tensor in sgtr_weights.items()
        if not name.endswith("empty_weight") and not name.startswith("rel_class_embed")
    }
    return weights | {
        "rel_class_embed.weight": torch.randn(5, 256),
        "rel_class_embed.bias": torch.randn(5),
        "rel_criterion.empty_weight": torch.ones(5),
    }


def test_open_images_heads_have_background_first(sgtr_weights):
    weights = open_images_weights(sgtr_weights)
    model, processor, _ = convert_checkpoint(weights, "sgtr-openimages")
    assert model.config.num_predicates == 4
    with torch.no_grad():
        output = model.eval()(torch.zeros(1, 3, 64, 64))
    assert output.predicate_logits.shape[-1] == 5
    expected = output.predicate_logits.softmax(-1)[..., 1:]
    torch.testing.assert_close(output.predicate_probabilities, expected)
    assert processor.legacy_single_predicate
    with pytest.raises(ValueError, match="predicate head has a background"):
        convert_checkpoint(weights, "sgtr-vg150")


def test_the_releases_are_told_apart_without_class_weights(sgtr_weights):
    weights = {
        name: tensor for name, tensor in sgtr_weights.items() if not name.endswith("empty_weight")
    }
    with pytest.raises(ValueError, match="predicate head has no background"):
        convert_checkpoint(weights, "sgtr-openimages")


def test_open_images_has_its_public_names():
    names = public_vocabulary("open_images", 601, 30)
    assert [names.labels[index] for index in (0, 68, 600)] == ["Tortoise", "Person", "Helmet"]
    # The most frequent predicates, as SGTR numbers them from 1.
    head = [names.predicates[index - 1] for index in (1, 2, 3, 8, 9, 17, 29)]
    assert head == ["at", "holds", "wears", "on", "ride", "contain", "plays"]
    assert public_vocabulary("open_images", 600, 31) == (None, None)


def test_a_detector_alone_starts_the_indicators(sgtr_weights):
    prefixes = ("backbone.", "transformer.", "input_proj.", "query_embed.", "class_embed.")
    weights = {
        name: tensor
        for name, tensor in sgtr_weights.items()
        if name.startswith((*prefixes, "bbox_embed."))
    }
    model, _, report = convert_checkpoint(weights, "sgtr-vg150")
    assert {name.split(".")[0] for name in report.new} == {
        "model",
        "predicate_head",
        "relation_vector_head",
    }
    assert all("detector" not in name for name in report.new)
    assert model.subject_class_head.weight.equal(weights["class_embed.weight"])
    for role in ("subject", "object"):
        head = getattr(model, f"{role}_box_head").state_dict()
        for name, tensor in model.model.detector.model.decoder.box_head.state_dict().items():
            assert tensor.equal(head[name])


def test_a_dilated_backbone_equals_that_of_torchvision(detr_weights):
    entries = {"model": detr_weights, "args": argparse.Namespace(dilation=True)}
    model = convert_checkpoint(entries, "detr").model.eval()
    witness = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    prefix = "backbone.0.body."
    body = {
        name.removeprefix(prefix): tensor
        for name, tensor in detr_weights.items()
        if name.startswith(prefix)
    }
    assert all(name.startswith("fc.") for name in witness.load_state_dict(body, strict=False)[0])
    images = torch.randn(1, 3, 64, 96)
    stages = torchvision.models._utils.IntermediateLayerGetter(witness.eval(), {"layer4": "last"})
    with torch.no_grad():
        (found,) = model.model.backbone(images).feature_maps
        assert_recorded(found, stages(images)["last"], "features")
    assert found.shape[-2:] == (4, 6)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {name.split(".")[3] for name in names if "backbone" in name}
    assert trained == {"layer2", "layer3", "layer4"}


def test_a_dilated_backbone_must_be_told(tmp_path, detr_weights):
    path = tmp_path / "detr-r50-dc5.pth"
    torch.save({"model": detr_weights}, path)
    with pytest.raises(ValueError, match="say `--dc5` or `--no-dc5`"):
        convert_file(path, tmp_path / "model", "detr")
    arguments = ["convert-checkpoint", str(path), str(tmp_path / "model"), "--format", "detr"]
    assert sgtr_hf.cli.main([*arguments, "--dc5"]) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["backbone_config"]["output_stride"] == 16


def test_an_unknown_weight_is_never_lost_in_silence(detr_weights):
    with pytest.raises(ValueError, match=r"not known: `surprise\.weight`"):
        convert_checkpoint(detr_weights | {"surprise.weight": torch.zeros(1)}, "detr")


def test_missing_and_misshapen_tensors_are_named(detr_weights):
    weights = dict(detr_weights)
    del weights["transformer.decoder.norm.bias"]
    weights["transformer.decoder.norm.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"1 tensors are missing: `model\.decoder\.norm\.bias`.*shape"
    ):
        convert_checkpoint(weights, "detr")


def test_files_of_another_format_are_recognised(detr_weights, sgtr_weights):
    with pytest.raises(ValueError, match=r"looks like `detr`.*first names are `transformer"):
        convert_checkpoint(detr_weights, "sgtr-vg150")
    with pytest.raises(ValueError, match="looks like `sgtr-vg150`"):
        convert_checkpoint(sgtr_weights, "detr")
    with pytest.raises(ValueError, match="none of the known formats"):
        convert_checkpoint({"weight": torch.zeros(1)}, "dino")
    with pytest.raises(ValueError, match="holds no tensors"):
        convert_checkpoint({"epoch": 3}, "dino")
    for name, words in (
        ("detr.backbone.0.body.conv1.weight", "DETR with masks"),
        ("model.backbone.conv_encoder.model.conv1.weight", "a model of transformers"),
        ("layer1.0.conv1.weight", "convolutional network"),
    ):
        with pytest.raises(ValueError, match=words):
            convert_checkpoint({name: torch.zeros(1)}, "detr")
    with pytest.raises(ValueError, match="`format` must be one of detr, dino"):
        convert_checkpoint({}, "yolo")


def test_options_of_another_format_are_rejected(sgtr_weights):
    for options in ({"dilated": True}, {"network": "student"}, {"backbone": sgtr_weights}):
        with pytest.raises(ValueError, match="not of `sgtr-vg150`"):
            convert_checkpoint(sgtr_weights, "sgtr-vg150", **options)


def test_aliases_that_differ_are_an_error(sgtr_weights):
    other = torch.ones_like(sgtr_weights["sub_class_embed.1.weight"])
    with pytest.raises(ValueError, match="same tensor"):
        convert_checkpoint(sgtr_weights | {"sub_class_embed.1.weight": other}, "sgtr-vg150")


WIDTH = 64


def dino_weights(layers=2, width=WIDTH, patch_size=8, patches=16):
    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0))

    hidden = 2 * width
    weights = {
        "cls_token": draw(1, 1, width),
        "pos_embed": draw(1, 1 + patches, width),
        "patch_embed.proj.weight": draw(width, 3, patch_size, patch_size),
        "patch_embed.proj.bias": draw(width),
        "norm.weight": draw(width),
        "norm.bias": draw(width),
    }
    for layer in range(layers):
        for name, shape in (
            ("norm1.weight", (width,)), ("norm1.bias", (width,)),
            ("norm2.weight", (width,)), ("norm2.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)), ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)), ("attn.proj.bias", (width,)),
            ("mlp.fc1.weight", (hidden, width)), ("mlp.fc1.bias", (hidden,)),
            ("mlp.fc2.weight", (width, hidden)), ("mlp.fc2.bias", (width,)),
        ):  # fmt: skip
            weights[f"blocks.{layer}.{name}"] = draw(*shape)
    return weights


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12)], ids=list("TSB"))
@pytest.mark.parametrize(("patch_size", "patches"), [(8, 784), (16, 196)])
def test_vision_transformers_of_all_sizes(width, heads, patch_size, patches):
    weights = dino_weights(1, width, patch_size, patches)
    config = convert_checkpoint(weights, "dino").model.config
    assert (config.num_attention_heads, config.patch_size) == (heads, patch_size)
    assert (config.image_size, config.feed_forward_dim) == (224, 2 * width)


def test_full_dino_checkpoints_hold_two_networks():
    head = {
        "head.mlp.0.weight": torch.zeros(2, WIDTH),
        "head.last_layer.weight_g": torch.zeros(2, 1),
        "head.last_layer.weight_v": torch.zeros(2, 2),
    }
    teacher = {f"backbone.{name}": tensor for name, tensor in dino_weights().items()} | head
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    entries = {"teacher": teacher, "student": student, "epoch": 3, "args": argparse.Namespace()}
    for network, shift in (("teacher", 0), ("student", 1)):
        model, _, report = convert_checkpoint(entries, "dino", network=network)
        expected = dino_weights()["cls_token"] + shift
        assert model.embedding.class_token.equal(expected)
        assert report[:3] == (30, 3, 38)
    with pytest.raises(ValueError, match="one network alone"):
        convert_checkpoint(dino_weights(), "dino", network="student")
    assert (model.config.image_size, model.config.patch_size) == (32, 8)


def full_dino_checkpoint(prototypes=6, hidden=5, bottleneck=4):
    """Both networks, the centre and the settings, as a training of the original writes them."""
    generator = torch.Generator().manual_seed(1)
    widths = {0: (hidden, WIDTH), 2: (hidden, hidden), 4: (bottleneck, hidden)}
    head = {}
    for index, shape in widths.items():
        head[f"head.mlp.{index}.weight"] = torch.randn(*shape, generator=generator)
        head[f"head.mlp.{index}.bias"] = torch.randn(shape[0], generator=generator)
    head["head.last_layer.weight_g"] = torch.ones(prototypes, 1)
    head["head.last_layer.weight_v"] = torch.randn(prototypes, bottleneck, generator=generator)
    teacher = {f"backbone.{name}": tensor for name, tensor in dino_weights().items()} | head
    return {
        "teacher": teacher,
        "student": {f"module.{name}": 2 * tensor for name, tensor in teacher.items()},
        "dino_loss": {"center": torch.arange(float(prototypes))[None]},
        "args": argparse.Namespace(drop_path_rate=0.1, norm_last_layer=False),
        "epoch": 3,
    }


def test_both_networks_of_a_full_dino_checkpoint_go_on_training(tmp_path):
    torch.save(full_dino_checkpoint(), tmp_path / "dino.pth")
    report = convert_file(tmp_path / "dino.pth", tmp_path / "model", "dino", network="both")
    # Two networks of 30 tensors and heads of 8, and the centre; q, k, v of two layers come apart.
    assert report == (2 * (30 + 8) + 1, 0, 2 * (38 + 8) + 1, ())
    model = DinoVitForPreTraining.from_pretrained(tmp_path / "model")
    weights = full_dino_checkpoint()
    assert model.center.equal(weights["dino_loss"]["center"][0])
    assert (model.config.num_prototypes, model.config.head_layers) == (6, 3)
    assert (model.config.head_hidden_dim, model.config.head_bottleneck_dim) == (5, 4)
    assert model.config.drop_path == pytest.approx(0.1)
    assert model.student.head.prototypes.length.requires_grad
    for network, head, prefix in (
        ("teacher", model.head, ""), ("student", model.student.head, "module."),
    ):  # fmt: skip
        tensors = weights[network]
        features = torch.randn(3, WIDTH)
        hidden = features
        for index in (0, 2, 4):
            names = (f"{prefix}head.mlp.{index}.{part}" for part in ("weight", "bias"))
            hidden = functional.linear(hidden, *(tensors[name] for name in names))
            hidden = functional.gelu(hidden) if index < 4 else functional.normalize(hidden, dim=-1)
        direction = tensors[f"{prefix}head.last_layer.weight_v"]
        length = tensors[f"{prefix}head.last_layer.weight_g"]
        expected = hidden @ (length * functional.normalize(direction, dim=1)).T
        torch.testing.assert_close(head(features), expected)
    teacher = AutoModel.from_pretrained(tmp_path / "model")
    assert teacher.embedding.class_token.equal(weights["teacher"]["backbone.cls_token"])
    assert model.student.model.embedding.class_token.equal(2 * teacher.embedding.class_token)


def test_what_cannot_go_on_training_says_why():
    weights = full_dino_checkpoint()
    weights["dino_loss"]["momentum"] = torch.ones(1)
    with pytest.raises(ValueError, match="`dino_loss` holds more than its `center`"):
        convert_checkpoint(weights, "dino", network="both")
    del weights["dino_loss"]
    assert convert_checkpoint(weights, "dino", network="both").report.new == ("center",)
    with pytest.raises(ValueError, match="one network alone"):
        convert_checkpoint(dino_weights(), "dino", network="both")
    del weights["teacher"]["head.last_layer.weight_g"]
    with pytest.raises(ValueError, match="teacher has no projection head"):
        convert_checkpoint(weights, "dino", network="both")
    linear = {"linear.weight": torch.zeros(5, WIDTH), "linear.bias": torch.zeros(5)}
    with pytest.raises(ValueError, match="cannot be `both`"):
        convert_checkpoint({"state_dict": linear}, "dino", network="both", backbone=dino_weights())


@pytest.mark.parametrize("num_vectors", [1, 2, 4])
def test_dino_classifiers_need_their_backbone(num_vectors):
    backbone = dino_weights(layers=4)
    linear = {
        "module.linear.weight": torch.randn(5, num_vectors * WIDTH),
        "module.linear.bias": torch.randn(5),
    }
    with pytest.raises(ValueError, match="--backbone"):
        convert_checkpoint({"state_dict": linear}, "dino")
    model = convert_checkpoint({"state_dict": linear}, "dino", backbone=backbone).model.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images).logits
        layers = model.model.last_layers(images, 4)
    tokens = [layers[level, :, 0] for level in range(4 - num_vectors, 4)]
    features = torch.cat(tokens, dim=1)
    if num_vectors == 2:
        # The reference interleaves class token and mean patch.
        features = torch.stack((layers[-1, :, 0], layers[-1, :, 1:].mean(1)), dim=-1).flatten(1)
    expected = features @ linear["module.linear.weight"].T + linear["module.linear.bias"]
    torch.testing.assert_close(logits, expected)


def test_a_file_becomes_a_folder_that_the_auto_classes_read(tmp_path):
    path = tmp_path / "dino.pth"
    torch.save({"teacher": dino_weights(), "args": argparse.Namespace(lr=1)}, path)
    report = convert_file(path, tmp_path / "model", "dino")
    assert "tensors of the model filled" in str(report)
    model = AutoModel.from_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.crop_size == {"height": 224, "width": 224}
    assert model.embedding.class_token.equal(dino_weights()["cls_token"])
    with pytest.raises(ValueError, match="exists already"):
        convert_file(path, tmp_path / "model", "dino")


def test_safetensors_and_other_types_of_numbers(tmp_path):
    path = tmp_path / "dino.safetensors"
    save_file(dino_weights(), path)
    convert_file(path, tmp_path / "model", "dino", dtype=torch.bfloat16)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_broken_files_leave_nothing_behind(tmp_path, capfd):
    whole = tmp_path / "whole.pth"
    torch.save(dino_weights(), whole)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(whole.read_bytes()[:-2000])
    harmful = tmp_path / "harmful.pth"
    torch.save({"model": Harmful()}, harmful)
    lacking = tmp_path / "lacking.pth"
    weights = dino_weights()
    del weights["norm.bias"]
    torch.save(weights, lacking)
    (tmp_path / "text.safetensors").write_text("text")
    before = sorted(tmp_path.iterdir())
    for name in ("truncated.pth", "harmful.pth", "text.safetensors", "none.pth"):
        with pytest.raises(ValueError, match=name):
            convert_file(tmp_path / name, tmp_path / "model", "dino")
    with pytest.raises(ValueError, match=r"missing: `norm\.bias`"):
        convert_file(lacking, tmp_path / "model", "dino")
    assert sorted(tmp_path.iterdir()) == before
    assert "executed" not in capfd.readouterr().out
    shutil.rmtree(tmp_path)
    with pytest.raises(ValueError, match="There is no checkpoint file"):
        read_checkpoint(whole)


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "dino.pth"
    torch.save(dino_weights(), path)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(DinoVitImageProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        convert_file(path, tmp_path / "model", "dino")
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_converts_and_reports(tmp_path, capsys):
    path = tmp_path / "dino.pth"
    torch.save(dino_weights(), path)
    arguments = ["convert-checkpoint", str(path), str(tmp_path / "model"), "--format"]
    assert sgtr_hf.cli.main([*arguments, "dino"]) == 0
    counts = "30 tensors of the file used, 0 known to have no use, 38 tensors of the model filled"
    assert counts in capsys.readouterr().out
    arguments[2] = str(tmp_path / "other")
    assert sgtr_hf.cli.main([*arguments, "detr"]) == 2
    assert "looks like `dino`" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_vocabularies_name_classes_and_must_fit(tmp_path, sgtr_weights):
    path = tmp_path / "sgtr.safetensors"
    save_file({k: v.clone() for k, v in open_images_weights(sgtr_weights).items()}, path)
    names = tmp_path / "categories_dict.json"
    names.write_text(json.dumps({"obj": [f"thing {i}" for i in range(150)], "rel": list("abcd")}))
    convert_file(path, tmp_path / "model", "sgtr-openimages", vocabulary=names)
    model = SgtrForSceneGraphGeneration.from_pretrained(tmp_path / "model")
    assert model.config.id2predicate == dict(enumerate("abcd"))
    names.write_text(json.dumps({"labels": ["only"]}))
    with pytest.raises(ValueError, match="has 1 names, but the checkpoint has 150"):
        convert_file(path, tmp_path / "other", "sgtr-openimages", vocabulary=names)
    names.write_text("[]")
    with pytest.raises(ValueError, match='must hold "labels"'):
        convert_file(path, tmp_path / "other", "sgtr-openimages", vocabulary=names)


def test_wrapped_and_prefixed_files_convert(detr_weights):
    weights = {f"module.{name}": tensor for name, tensor in detr_weights.items()}
    model = convert_checkpoint({"model": weights, "epoch": 1}, "detr").model
    assert isinstance(model, SgtrDetrForObjectDetection)
    assert (model.config.num_labels, model.config.encoder_layers) == (91, 6)
