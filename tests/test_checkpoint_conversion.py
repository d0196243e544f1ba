from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recorded_weights import recorded_checkpoint
from sgtr_hf import SgtrDetrForObjectDetection, SgtrForSceneGraphGeneration
from sgtr_hf.hub.checkpoint_conversion import convert_detr_checkpoint, convert_sgtr_checkpoint


FIXTURES = Path(__file__).parent / "fixtures"
# Of a tensor's largest absolute value.
TOLERANCE = 1e-5


def make_batch(recorded, mean, std, *, bgr, scale):
    images = [recorded["image.0"], recorded["image.1"]]
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    pixel_values = torch.zeros(2, 3, height, width)
    pixel_mask = torch.zeros(2, height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        pixels = image.permute(2, 0, 1).float() * scale
        pixels = pixels.flip(0) if bgr else pixels
        pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        pixel_values[index, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        pixel_mask[index, : pixels.shape[1], : pixels.shape[2]] = 1
    return pixel_values, pixel_mask


def assert_recorded(found, recorded, name):
    difference = (found[..., : recorded.shape[-1]] - recorded).abs().max() / recorded.abs().max()
    assert difference < TOLERANCE, f"{name} differs by {difference:.1e}"


def test_detr_r50_equals_the_recorded_forward_pass():
    recorded = load_file(FIXTURES / "forward_detr.safetensors")
    converted = convert_detr_checkpoint(recorded_checkpoint(FIXTURES / "detr_resnet50.keys.json"))
    model = SgtrDetrForObjectDetection(converted.config).eval()
    model.load_state_dict(converted.state_dict)
    batch = make_batch(
        recorded, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], bgr=False, scale=1 / 255
    )
    with torch.no_grad():
        levels = model.read_levels(model.model(*batch, all_levels=True))
    for prefix, level in (("output", -1), ("aux.0", 0), ("aux.4", 4)):
        assert_recorded(levels.logits[level], recorded[f"{prefix}.pred_logits"], prefix)
        assert_recorded(levels.boxes[level], recorded[f"{prefix}.pred_boxes"], prefix)


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


def test_sgtr_vg150_equals_the_recorded_forward_pass():
    recorded = load_file(FIXTURES / "forward_sgtr.safetensors")
    converted = convert_sgtr_checkpoint(recorded_checkpoint(FIXTURES / "sgtr_vg.keys.json"))
    model = SgtrForSceneGraphGeneration(converted.config).eval()
    model.load_state_dict(converted.state_dict)
    batch = make_batch(recorded, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], bgr=True, scale=1.0)
    with torch.no_grad():
        output = model(*batch)
    for name, recorded_name in RECORDED_NAMES.items():
        assert_recorded(output[name], recorded[f"output.{recorded_name}"], name)


def small_detr_weights():
    entries = recorded_checkpoint(FIXTURES / "detr_resnet50.keys.json")
    return {name: tensor.half() for name, tensor in entries.items()}


def test_an_unknown_weight_is_never_lost_in_silence():
    weights = small_detr_weights() | {"surprise.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="surprise"):
        convert_detr_checkpoint(weights)


def test_wrapped_and_prefixed_files_convert():
    weights = {f"module.{name}": tensor for name, tensor in small_detr_weights().items()}
    converted = convert_detr_checkpoint({"model": weights})
    assert converted.config.num_labels == 91
    assert converted.config.encoder_layers == 6


def test_a_wrong_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="91"):
        convert_detr_checkpoint(small_detr_weights(), id2label={0: "only"})


def test_aliases_that_differ_are_an_error():
    weights = {
        "sub_class_embed.0.weight": torch.zeros(2, 2),
        "sub_class_embed.1.weight": torch.ones(2, 2),
    }
    with pytest.raises(ValueError, match="same tensor"):
        convert_sgtr_checkpoint(weights)
