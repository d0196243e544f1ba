"""Whole models against every recorded figure of the originals; `make fidelity` runs this."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from make_fixtures import FIXTURES, make_figures, make_tensors
from recorded_triplets import assert_kept
from recorded_weights import make_batch, recorded_checkpoint
from sgtr_hf import SgtrConfig
from sgtr_hf.boxes import box_xyxy_to_cxcywh
from sgtr_hf.hub.checkpoint_conversion import convert_checkpoint
from sgtr_hf.losses.hungarian_matching import assign, entity_matching_costs, pad_annotations
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
ENTITIES_AND_LINKS = {
    "logits": "pred_logits",
    "pred_boxes": "pred_boxes",
    "subject_scores": "sub_ent_indexing_rule",
    "object_scores": "obj_ent_indexing_rule",
}


@pytest.fixture(scope="module")
def folder():
    name = os.environ.get("SGTR_GOLDEN_DIR")
    if name is None:
        pytest.fail("Name the folder of recorded figures in SGTR_GOLDEN_DIR.")
    return Path(name)


def test_the_fixtures_are_made_of_these_figures(folder):
    for name, tensors in make_tensors(folder).items():
        stored = load_file(FIXTURES / f"{name}.safetensors")
        assert stored.keys() == tensors.keys(), name
        for key, tensor in tensors.items():
            assert tensor.dtype == stored[key].dtype, (name, key)
            assert tensor.equal(stored[key]), (name, key)
    for name, content in make_figures(folder).items():
        assert json.loads((FIXTURES / f"{name}.json").read_text()) == content, name
    assert sum(path.stat().st_size for path in FIXTURES.iterdir()) < 2_100_000


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


def assert_same_losses(found, expected):
    """Every loss, and no other, within the tolerance."""
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected[name], rel=TOLERANCE), name


def by_relation(recorded, record, image, count):
    """Recorded pairs of query and annotation as the query of each annotation, -1 for none."""
    queries = torch.full((count,), -1)
    queries[recorded[f"{record}.{image}.target"]] = recorded[f"{record}.{image}.query"]
    return queries


@BACKENDS
@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet101"])
def test_detr(folder, name, backend):
    recorded = load_file(folder / f"{name}.safetensors")
    expected = json.loads((folder / f"{name}.losses.json").read_text())
    model, processor, report = load_model(folder, name, "detr", backend)
    assert report.new == ()
    batch = make_batch(
        recorded, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], bgr=False, scale=1 / 255
    )
    with torch.no_grad():
        output = model(*batch, labels=detection_labels(recorded))
        # The first image is the larger one, which the batch does not pad.
        alone = [model(batch[0][:1]), model(batch[0][:1], batch[1][:1])]
    levels = {"output": output, "aux.0": output.auxiliary_outputs[0]}
    levels["aux.4"] = output.auxiliary_outputs[4]
    for prefix, level in levels.items():
        assert_equal(level["logits"], recorded[f"{prefix}.pred_logits"], f"{prefix} logits")
        assert_equal(level["pred_boxes"], recorded[f"{prefix}.pred_boxes"], f"{prefix} boxes")
    for single in alone:
        assert_equal(single.logits, recorded["output.pred_logits"][:1], "logits alone")
        assert_equal(single.pred_boxes, recorded["output.pred_boxes"][:1], "boxes alone")
    weights = {"class": ("ce", 1), "box": ("bbox", 5), "giou": ("giou", 2)}
    assert_same_losses(
        output.loss_dict,
        {
            f"loss_{ours}{suffix}": weight * expected["losses"][f"loss_{original}{suffix}"]
            for ours, (original, weight) in weights.items()
            for suffix in ("", "_0", "_1", "_2", "_3", "_4")
        },
    )
    assert output.loss.item() == pytest.approx(expected["total"], rel=TOLERANCE)
    assert_same_detections(output, processor, recorded)
    assert_same_matching(model.config, output, recorded)


def assert_same_matching(config, output, recorded):
    """The recorded outputs give the recorded matches, ours give some that cost as much.

    With these weights all queries are nearly one, so that a last bit decides between them.
    """
    annotations = pad_annotations(detection_labels(recorded), "cpu", num_classes=91)
    recorded_costs, costs = (
        entity_matching_costs(config, logits[None], boxes[None], annotations)
        for logits, boxes in (
            (recorded["output.pred_logits"], recorded["output.pred_boxes"]),
            (output.logits, output.pred_boxes),
        )
    )
    matches = assign(recorded_costs, annotations.valid)[0]
    ours = assign(costs, annotations.valid)[0]
    for image in (0, 1):
        count = len(recorded[f"target.{image}.labels"])
        queries = by_relation(recorded, "match", image, count)
        assert torch.equal(matches[image, :count], queries)
        table = recorded_costs[0, image, :, :count]
        least = table.gather(0, queries[None]).sum().item()
        found = table.gather(0, ours[image, None, :count]).sum().item()
        assert found == pytest.approx(least, rel=TOLERANCE)


def assert_same_detections(output, processor, recorded):
    sizes = [recorded[f"image.{image}"].shape[:2] for image in (0, 1)]
    found = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    for image in (0, 1):
        # The original returns queries in their order, this package the best first.
        probabilities = output.entity_probabilities[image]
        order = probabilities.amax(-1).argsort(descending=True, stable=True)
        for entry in ("scores", "labels", "boxes"):
            value = recorded[f"post.{image}.{entry}"][order]
            assert_equal(found[image][entry].float(), value.float(), entry)


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


def original_loss_names():
    """Our names, and those that the original gives the same losses, of all levels."""
    names = {}
    for suffix in ("", "_0", "_1", "_2", "_3", "_4"):
        for ours, original in (("class", "ce"), ("box", "bbox"), ("giou", "giou")):
            names[f"loss_{ours}{suffix}_of_entities"] = f"loss_{original}{suffix}"

    def add(ours, original):
        names[ours] = original
        for level in range(5):
            names[f"{ours}_{level}"] = f"aux_{original}/layer{level}"

    add("loss_relation_vector", "loss_rel_vector")
    for role, short in (("subject", "sub"), ("object", "obj")):
        add(f"loss_{role}_box", f"loss_aux_{short}_entities_boxes")
        add(f"loss_{role}_giou", f"loss_aux_{short}_entities_boxes_giou")
        add(f"loss_{role}_class", f"loss_aux_{short}_entities_labels_ce")
    return names, add


@BACKENDS
@pytest.mark.parametrize(
    ("name", "file_format"), [("sgtr_vg", "sgtr-vg150"), ("sgtr_oiv6", "sgtr-openimages")]
)
def test_sgtr(folder, name, file_format, backend):
    recorded = load_file(folder / f"{name}.safetensors")
    expected = json.loads((folder / f"{name}.losses.json").read_text())["losses"]
    model, _, report = load_model(folder, name, file_format, backend)
    assert report.new == ()
    batch = make_batch(recorded, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], bgr=True, scale=1.0)
    with torch.no_grad():
        output = model(*batch, labels=scene_graph_labels(recorded))
        alone = [model(batch[0][:1]), model(batch[0][:1], batch[1][:1])]
    for prefix, level in (("aux.0", 0), ("aux.4", 4)):
        for ours, original in HEADS.items():
            found = output.auxiliary_outputs[level][ours]
            assert_equal(found, recorded[f"{prefix}.{original}"], (prefix, ours))
    for ours, original in (HEADS | ENTITIES_AND_LINKS).items():
        assert_equal(output[ours], recorded[f"output.{original}"], ours)
        for single in alone:
            assert_equal(single[ours], recorded[f"output.{original}"][:1], f"{ours} alone")
    names, add = original_loss_names()
    add("loss_predicate", "loss_rel_focal" if name == "sgtr_vg" else "loss_rel_ce")
    assert set(names.values()) == set(expected)
    assert_same_losses(output.loss_dict, {ours: expected[name] for ours, name in names.items()})


@BACKENDS
@pytest.mark.parametrize(
    ("name", "file_format"), [("sgtr_vg", "sgtr-vg150"), ("sgtr_oiv6", "sgtr-openimages")]
)
def test_matches_of_all_levels(folder, name, file_format, backend):
    recorded = load_file(folder / f"{name}.safetensors")
    model = load_model(folder, name, file_format, backend).model
    batch = make_batch(recorded, [103.53, 116.28, 123.675], [1.0, 1.0, 1.0], bgr=True, scale=1.0)
    annotations = pad_annotations(
        scene_graph_labels(recorded),
        "cpu",
        num_classes=model.config.num_labels,
        num_predicates=model.config.num_predicates,
    )
    sizes = torch.tensor([recorded[f"image.{image}"].shape[:2] for image in (0, 1)])
    with torch.no_grad():
        nodes = model.model(*batch, annotations)
        triplets = model.read_levels(nodes, nodes.triplets, sizes, all_levels=True)
        entities = (nodes.entity_levels.logits[-1], nodes.entity_levels.boxes[-1])
        matches = match_triplets(model.config, triplets, *entities, annotations)
    # Recorded in the order of the losses: the last level, then the earlier ones.
    for record, level in enumerate([-1, 0, 1, 2, 3, 4]):
        for image in (0, 1):
            count = len(recorded[f"target.{image}.relations"])
            queries = by_relation(recorded, f"match.{record}", image, count)
            assert torch.equal(matches[level, image, :count], queries), (record, image)


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
    rules = LegacyRules(1e-3, True, True, True, single_predicate=name == "oiv6")
    (graph,) = find_scene_graphs(outputs, recorded["target_sizes"], top_k=300, legacy=rules)
    kept = recorded["triplets.rel_trp"].clone()
    kept[:, 2] = recorded["triplets.rel_pred_label"] - 1
    assert_kept(
        graph,
        recorded["entities.boxes"].numpy(),
        kept.numpy(),
        recorded["triplets.rel_trp_score"].numpy(),
    )


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
