"""Whole models against every recorded figure of the originals; `make fidelity` runs this."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recorded_weights import make_batch, recorded_checkpoint
from sgtr_hf import SgtrConfig
from sgtr_hf.boxes import box_xyxy_to_cxcywh
from sgtr_hf.hub.checkpoint_conversion import convert_checkpoint
from sgtr_hf.losses.hungarian_matching import pad_annotations
from sgtr_hf.modeling.graph_assembling import assembling_scores
from sgtr_hf.post_processing import LegacyRules, find_scene_graphs
from triplet_matching_reference import match_triplets


pytestmark = pytest.mark.fidelity
# Of a tensor's largest absolute value.
TOLERANCE = 1e-5
BACKENDS = pytest.mark.parametrize("backend", ["eager", "sdpa"])
HEADS = {
    "predicate_logits": "pred_rel_logits",
    "relation_vectors": "pred_rel_vec",
    "subject_logits": "pred_rel_sub_logits",
    "subject_boxes": "pred_rel_sub_box",
    "object_logits": "pred_rel_obj_logits",
    "object_boxes": "pred_rel_obj_box",
}
LEVELS = {"output": -1, "aux.0": 0, "aux.4": 4}


@pytest.fixture(scope="module")
def folder():
    name = os.environ.get("SGTR_GOLDEN_DIR")
    if name is None:
        pytest.fail("Name the folder of recorded figures in SGTR_GOLDEN_DIR.")
    return Path(name)


def assert_equal(found, recorded, what):
    assert found.shape == recorded.shape, what
    difference = ((found - recorded).abs().max() / recorded.abs().max()).item()
    assert difference < TOLERANCE, f"{what} differs by {difference:.1e}"


def load_model(folder, name, file_format, backend):
    converted = convert_checkpoint(recorded_checkpoint(folder / f"{name}.keys.json"), file_format)
    # ResNet has no attention, and refuses every backend but its own.
    backends = {"": backend, "backbone_config": "eager"}
    if "sgtr" in name:
        backends = {"": backend, "detector_config": backends}
    converted.model.eval().set_attn_implementation(backends)
    return converted


def detection_labels(recorded):
    return [
        {
            "class_labels": recorded[f"target.{image}.labels"],
            "boxes": recorded[f"target.{image}.boxes_cxcywh"],
        }
        for image in (0, 1)
    ]


@BACKENDS
@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet101"])
def test_detr(folder, name, backend):
    recorded = load_file(folder / f"{name}.safetensors")
    expected = json.loads((folder / f"{name}.losses.json").read_text())
    model, processor, _ = load_model(folder, name, "detr", backend)
    batch = make_batch(
        recorded, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], bgr=False, scale=1 / 255
    )
    with torch.no_grad():
        levels = model.read_levels(model.model(*batch, all_levels=True))
        # The first image is the larger one, which the batch does not pad.
        alone = model(*(tensor[:1] for tensor in batch))
        output = model(*batch, labels=detection_labels(recorded))
    for prefix, level in LEVELS.items():
        assert_equal(levels.logits[level], recorded[f"{prefix}.pred_logits"], f"{prefix} logits")
        assert_equal(levels.boxes[level], recorded[f"{prefix}.pred_boxes"], f"{prefix} boxes")
    assert_equal(alone.logits, recorded["output.pred_logits"][:1], "logits alone")
    assert output.loss.item() == pytest.approx(expected["total"], rel=TOLERANCE)
    found = processor.post_process_object_detection(
        output, threshold=0.0, target_sizes=[recorded[f"image.{i}"].shape[:2] for i in (0, 1)]
    )
    for image in (0, 1):
        # The original returns queries in their order, this package the best first.
        order = recorded[f"post.{image}.scores"].argsort(descending=True, stable=True)
        assert_equal(found[image]["scores"], recorded[f"post.{image}.scores"][order], "scores")


def scene_graph_labels(recorded):
    labels = []
    for image in (0, 1):
        height, width, _ = recorded[f"image.{image}"].shape
        boxes = recorded[f"target.{image}.boxes_xyxy"].float()
        labels.append(
            {
                "class_labels": recorded[f"target.{image}.labels"],
                "boxes": box_xyxy_to_cxcywh(boxes / torch.tensor([width, height] * 2)),
                "relations": recorded[f"target.{image}.relations"] - torch.tensor([0, 0, 1]),
            }
        )
    return labels


@BACKENDS
@pytest.mark.parametrize(
    ("name", "file_format"), [("sgtr_vg", "sgtr-vg150"), ("sgtr_oiv6", "sgtr-openimages")]
)
def test_sgtr(folder, name, file_format, backend):
    recorded = load_file(folder / f"{name}.safetensors")
    expected = json.loads((folder / f"{name}.losses.json").read_text())["losses"]
    model = load_model(folder, name, file_format, backend).model
    batch = make_batch(recorded, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], bgr=True, scale=1.0)
    labels = scene_graph_labels(recorded)
    annotations = pad_annotations(
        labels, "cpu", num_classes=model.config.num_labels,
        num_predicates=model.config.num_predicates,
    )  # fmt: skip
    with torch.no_grad():
        nodes = model.model(*batch, annotations)
        entities = model.model.detector.read_levels(nodes.detector)
        sizes = torch.tensor([recorded[f"image.{image}"].shape[:2] for image in (0, 1)])
        triplets = model.read_levels(nodes, nodes.triplets, sizes, all_levels=True)
        matches = match_triplets(
            model.config, triplets, entities.logits[-1], entities.boxes[-1], annotations
        )
        losses = model.losses(nodes, entities, triplets, annotations)
        alone = model(*(tensor[:1] for tensor in batch))
    for prefix, level in LEVELS.items():
        for ours, original in HEADS.items():
            assert_equal(
                getattr(triplets, ours)[level], recorded[f"{prefix}.{original}"], (prefix, ours)
            )
    for role in ("subject", "object"):
        found = getattr(triplets, f"{role}_scores")[-1]
        assert_equal(found, recorded[f"output.{role[:3]}_ent_indexing_rule"], f"{role} scores")
    assert_equal(entities.logits[-1], recorded["output.pred_logits"], "entity logits")
    assert_equal(entities.boxes[-1], recorded["output.pred_boxes"], "entity boxes")
    assert_equal(alone.predicate_logits, recorded["output.pred_rel_logits"][:1], "alone")
    # Recorded in the order of the losses: the last level, then the earlier ones.
    for record, level in enumerate([-1, 0, 1, 2, 3, 4]):
        for image in (0, 1):
            queries = torch.full((annotations.relation_valid.shape[1],), -1)
            queries[recorded[f"match.{record}.{image}.target"]] = recorded[
                f"match.{record}.{image}.query"
            ]
            assert torch.equal(matches[level, image], queries), (record, image)
    total = sum(losses.values()).item()
    names = [name for name in expected if name.startswith(("loss_", "aux_loss_"))]
    assert total == pytest.approx(sum(expected[name] for name in names), rel=TOLERANCE)
    assert len(losses) == len(names)


@pytest.mark.parametrize("name", ["vg", "oiv6"])
def test_kept_triplets(folder, name):
    recorded = load_file(folder / f"postprocess_{name}.safetensors")
    prediction = {key[11:]: value for key, value in recorded.items() if key[:11] == "prediction."}
    entities = prediction["pred_logits"].softmax(-1)[..., :-1]
    config = SgtrConfig(
        detector_config={"num_labels": entities.shape[-1], "legacy_box_offset": 1e-3},
        legacy_pixel_distance=True,
    )
    outputs = {
        "entity_probabilities": entities,
        "pred_boxes": prediction["pred_boxes"],
        "predicate_probabilities": prediction["pred_rel_logits"].sigmoid()
        if name == "vg"
        else prediction["pred_rel_logits"].softmax(-1)[..., 1:],
    }
    for role, part in (("subject", slice(0, 2)), ("object", slice(2, 4))):
        indicator = (
            prediction["pred_rel_vec"][..., part],
            prediction[f"pred_rel_{role[:3]}_logits"].softmax(-1)[..., :-1],
            prediction[f"pred_rel_{role[:3]}_box"],
        )
        entity = (entities, prediction["pred_boxes"])
        outputs[f"{role}_scores"] = assembling_scores(
            config, indicator, entity, recorded["target_sizes"]
        )
        assert_equal(outputs[f"{role}_scores"], recorded[f"assembling.{role}_score"], role)
    rules = LegacyRules(1e-3, True, True, name == "oiv6")
    (graph,) = find_scene_graphs(outputs, recorded["target_sizes"], top_k=300, legacy=rules)
    boxes = recorded["entities.boxes"].numpy()
    scores = recorded["triplets.rel_trp_score"].numpy()
    rows = [
        np.concatenate((boxes[subject], boxes[object_], [predicate - 1]))
        for (subject, object_, _), predicate in zip(
            recorded["triplets.rel_trp"].tolist(),
            recorded["triplets.rel_pred_label"].tolist(),
            strict=True,
        )
    ]
    found = np.concatenate(
        (
            graph.boxes_xyxy[graph.relations[:, 0]],
            graph.boxes_xyxy[graph.relations[:, 1]],
            graph.relations[:, 2:],
        ),
        axis=1,
    )
    np.testing.assert_allclose(graph.relation_scores, scores, rtol=1e-5)
    for position, row in enumerate(rows):
        # Scores that agree to the last bits may change places with the rounding of a softmax.
        rivals = np.flatnonzero(np.abs(scores - scores[position]) < 1e-6)
        assert np.abs(found[rivals] - row).max(axis=1).min() < 1e-2, position
        if len(rivals) == 1:
            assert np.abs(found[position] - row).max() < 1e-2, position


@BACKENDS
@pytest.mark.parametrize("name", ["dino_vits16", "dino_vits8", "dino_vitb16"])
def test_dino(folder, name, backend):
    recorded = load_file(folder / f"{name}.safetensors")
    model = convert_checkpoint(recorded_checkpoint(folder / f"{name}.keys.json"), "dino").model
    model.eval().set_attn_implementation(backend)
    for size in ("224", "96", "rect"):
        pixel_values = recorded[f"{size}.pixel_values"]
        with torch.no_grad():
            output = model(pixel_values, output_attentions=backend == "eager")
            last = model.last_layers(pixel_values, 4)
        assert_equal(output.pooler_output, recorded[f"{size}.cls"], f"class token at {size}")
        assert_equal(last[:, :, :5], recorded[f"{size}.intermediate_last4"], f"layers at {size}")
        if backend == "eager":
            attention = output.attentions[-1][:, :, 0, 1:]
            assert_equal(attention, recorded[f"{size}.cls_attention"], f"attention at {size}")
