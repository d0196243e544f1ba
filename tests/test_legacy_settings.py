"""Each quirk of the originals: what its setting changes, and that it is named in the documentation.

`tests/test_recorded_models.py` compares all of them at once with the recorded originals.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import sgtr_hf.losses.triplet_matching_costs as costs_module
from conftest import small_config, small_detector_config
from sgtr_hf import SgtrConfig, SgtrDetrConfig, SgtrImageProcessor, SgtrImageProcessorPil
from sgtr_hf.boxes import box_cxcywh_to_xyxy
from sgtr_hf.losses.detection_loss import box_losses, detection_losses
from sgtr_hf.losses.hungarian_matching import pad_annotations
from sgtr_hf.losses.scene_graph_loss import TripletAssignment, scene_graph_losses
from sgtr_hf.losses.triplet_matching_costs import triplet_matching_costs
from sgtr_hf.losses.triplet_predictions import TripletPredictions
from sgtr_hf.modeling.graph_assembling import assembling_scores
from sgtr_hf.post_processing import LegacyRules, detect_objects, find_scene_graphs


DOCUMENTATION = Path(__file__).parent.parent / "docs" / "fidelity.md"
NUM_CLASSES, NUM_PREDICATES, NUM_QUERIES, NUM_ENTITIES = 3, 2, 5, 4


def legacy_names():
    fields = [
        field.name for kind in (SgtrConfig, SgtrDetrConfig) for field in dataclasses.fields(kind)
    ]
    fields += [name for name in dir(SgtrImageProcessor) if not name.startswith("_")]
    return sorted({name for name in fields if name.startswith("legacy_")})


def test_new_models_have_no_quirk():
    for settings in (SgtrConfig(), SgtrDetrConfig(), SgtrImageProcessor()):
        found = {name: getattr(settings, name, False) for name in legacy_names()}
        assert not any(found.values()), found


@pytest.mark.parametrize("name", legacy_names())
def test_each_quirk_is_documented_and_has_its_test(name):
    assert f"`{name}`" in DOCUMENTATION.read_text()
    assert f"test_{name}" in globals()


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_annotations():
    label = {
        "class_labels": torch.tensor([0, 2, 1]),
        "boxes": draw(3, 4) * 0.3 + 0.3,
        "relations": torch.tensor([[0, 1, 1], [2, 0, 0]]),
    }
    return pad_annotations([label], "cpu", num_classes=NUM_CLASSES, num_predicates=NUM_PREDICATES)


def make_predictions(levels=2):
    logits = torch.randn(levels, 1, NUM_QUERIES, 4, generator=torch.Generator().manual_seed(2))
    boxes = draw(levels, 1, NUM_QUERIES, 4, seed=3) * 0.3 + 0.3
    scores = draw(levels, 1, NUM_QUERIES, NUM_ENTITIES, seed=4)
    return TripletPredictions(
        logits[..., :NUM_PREDICATES], boxes, logits[..., :NUM_CLASSES], boxes,
        logits[..., :NUM_CLASSES], boxes, scores, scores,
    )  # fmt: skip


def make_entities():
    return draw(1, NUM_ENTITIES, NUM_CLASSES, seed=5), draw(1, NUM_ENTITIES, 4) * 0.3 + 0.3


def relation_losses(**settings):
    assignment = TripletAssignment(make_annotations(), torch.tensor([[[0, 3]], [[2, 1]]]))
    return scene_graph_losses(small_config(**settings), make_predictions(), assignment)


def test_legacy_box_offset():
    box = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    corners = box_cxcywh_to_xyxy(box, 1e-3)
    torch.testing.assert_close(corners, torch.tensor([[0.4, 0.3, 0.601, 0.701]]))
    # It widens small boxes relatively more, which the GIoU shows.
    predicted, is_matched = box[None, None] * 0.9, torch.ones(1, 1, dtype=torch.bool)
    losses = [box_losses(predicted, box[None], is_matched, offset)[1] for offset in (0.0, 1e-3)]
    assert losses[0].item() != pytest.approx(losses[1].item(), rel=1e-4)


def test_legacy_open_border():
    probabilities, boxes = torch.tensor([[[0.9]]]), torch.tensor([[[0.9, 0.5, 0.4, 0.2]]])
    for legacy, right in ((False, 100.0), (True, 110.0)):
        rules = LegacyRules(open_border=legacy)
        (found,) = detect_objects(probabilities, boxes, 0.5, [(50, 100)], rules)
        torch.testing.assert_close(found["boxes"], torch.tensor([[70.0, 20.0, right, 30.0]]))


def test_legacy_unweighted_auxiliary_losses():
    logits = torch.randn(2, 1, NUM_QUERIES, NUM_CLASSES)
    boxes = draw(2, 1, NUM_QUERIES, 4) * 0.3 + 0.3
    matches = torch.tensor([[[0, 3, 4]], [[2, 1, 0]]])
    weights = {"class_loss_weight": 3.0, "box_loss_weight": 5.0, "giou_loss_weight": 2.0}
    clean, legacy = (
        detection_losses(
            small_detector_config(legacy_unweighted_auxiliary_losses=is_legacy, **weights),
            logits,
            boxes,
            make_annotations(),
            matches,
        )
        for is_legacy in (False, True)
    )
    for name, weight in (("class", 3.0), ("box", 5.0), ("giou", 2.0)):
        torch.testing.assert_close(legacy[f"loss_{name}"], clean[f"loss_{name}"])
        torch.testing.assert_close(legacy[f"loss_{name}_0"] * weight, clean[f"loss_{name}_0"])


def test_legacy_pixel_distance():
    probabilities, boxes = make_entities()
    indicator = (boxes[..., :2] + 0.05, probabilities.flip(1), boxes)
    small, large = torch.tensor([[100, 100]]), torch.tensor([[1000, 1000]])
    for legacy in (False, True):
        config = small_config(legacy_pixel_distance=legacy)
        first, second = (
            assembling_scores(config, indicator, (probabilities, boxes), size)
            for size in (small, large)
        )
        assert torch.equal(first, second) is not legacy


def test_legacy_triplet_matching(monkeypatch):
    # Two rows a query: relation 0 fits query 0 best in row 0, relation 1 in row 1, so that both
    # go to query 0, and one of them goes without; matching queries would have given it query 1.
    costs = np.array([[0.1, 9.0], [9.0, 0.3], [0.8, 0.9], [9.0, 9.0]])
    assert match_rows(costs, 2).tolist() == [0, -1]
    # Relation 1 fits row 2 at the least cost of all that is left, but a range of two rows lacks it.
    costs = np.array([[0.3, 6.0], [0.1, 9.0], [0.4, 0.5]])
    assert match_rows(costs, 1).tolist() == [1, 2]
    monkeypatch.setattr(costs_module, "LEGACY_MATCHING_RANGE", 2)
    assert match_rows(costs, 1).tolist() == [1, 0]


def match_rows(costs, top_k, *, legacy_conflict_row=False):
    return costs_module._match_rows(costs, top_k, legacy_conflict_row=legacy_conflict_row)


def test_legacy_conflict_row():
    # Six rows, two a query. Rows 2 and 3, of query 1, win the relations 0 and 1; relation 0 fits
    # better there (0.1 against 0.2), but row 1 says relation 1 (0.8 against 0.9).
    costs = np.array([[9, 9], [0.9, 0.8], [0.1, 9], [9, 0.2], [9, 9], [9, 9]])
    assert match_rows(costs, 2).tolist() == [1, -1]
    assert match_rows(costs, 2, legacy_conflict_row=True).tolist() == [-1, 1]
    with pytest.raises(StrictDataclassError, match="`legacy_conflict_row` says how"):
        small_config(legacy_conflict_row=True)


def test_legacy_softmax_cost():
    only_predicates = {
        f"{name}_cost_weight": 0.0
        for name in ("relation_vector", "entity_class", "entity_box", "entity_giou", "assembling")
    }
    predictions, annotations = make_predictions(), make_annotations()
    for legacy, probabilities in (
        (False, predictions.predicate_logits.sigmoid()),
        (True, predictions.predicate_logits.softmax(-1)),
    ):
        config = small_config(legacy_softmax_cost=legacy, **only_predicates)
        found = triplet_matching_costs(config, predictions, *make_entities(), annotations)
        expected = config.matching_base ** -probabilities[..., annotations.relations[0, :, 2]]
        torch.testing.assert_close(found, expected)


def test_legacy_focal_normalization():
    clean, legacy = relation_losses(), relation_losses(legacy_focal_normalization=True)
    factor = NUM_QUERIES / NUM_PREDICATES
    for suffix in ("", "_0"):
        torch.testing.assert_close(
            legacy[f"loss_predicate{suffix}"], clean[f"loss_predicate{suffix}"] * factor
        )
        assert legacy[f"loss_subject_box{suffix}"] == clean[f"loss_subject_box{suffix}"]


def test_legacy_unweighted_auxiliary_predicates():
    clean = relation_losses(auxiliary_relation_loss_weight=0.25)
    legacy = relation_losses(
        auxiliary_relation_loss_weight=0.25, legacy_unweighted_auxiliary_predicates=True
    )
    assert legacy["loss_predicate"] == clean["loss_predicate"]
    torch.testing.assert_close(legacy["loss_predicate_0"], 4 * clean["loss_predicate_0"])
    assert legacy["loss_subject_box_0"] == clean["loss_subject_box_0"]


def graph_outputs(boxes, scores, predicates):
    """One image of two classes, whose queries link the entities in order: 0-1, 2-3, ..."""
    links = torch.zeros(1, len(predicates), len(boxes))
    for query in range(len(predicates)):
        links[0, query, 2 * query] = 1
    return {
        "entity_probabilities": torch.tensor([scores]),
        "pred_boxes": torch.tensor([boxes]),
        "predicate_probabilities": torch.tensor([predicates]),
        "subject_scores": links,
        "object_scores": links.roll(1, dims=-1),
    }


def test_legacy_self_overlap(monkeypatch):
    monkeypatch.setattr("sgtr_hf.post_processing.LINKS", 1)
    # Subject and object side by side; their corners, read as centre and size, are two large boxes
    # one on the other.
    boxes = [[0.9, 0.5, 0.01, 0.02], [0.912, 0.5, 0.01, 0.02]]
    outputs = graph_outputs(boxes, [[0.9, 0.0], [0.8, 0.1]], [[0.7, 0.1]])
    for legacy, count in ((False, 1), (True, 0)):
        rules = LegacyRules(open_border=True, self_overlap=legacy)
        (graph,) = find_scene_graphs(outputs, [(1000, 1000)], legacy=rules)
        assert graph.num_relations == count, legacy


def test_legacy_duplicate_ranking(monkeypatch):
    monkeypatch.setattr("sgtr_hf.post_processing.LINKS", 1)
    # Two triplets say the same. The first has the higher score by its predicate (.9 * .5 * .5 to
    # .3 * .8 * .9), the second after one more factor of its entity scores.
    boxes = [[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2]] * 2
    scores = [[0.5, 0.0], [0.5, 0.0], [0.8, 0.0], [0.9, 0.0]]
    outputs = graph_outputs(boxes, scores, [[0.9, 0.0], [0.3, 0.0]])
    for legacy, kept in ((False, 1), (True, 2)):
        rules = LegacyRules(duplicate_ranking=legacy)
        (graph,) = find_scene_graphs(outputs, None, threshold=0.1, legacy=rules)
        assert graph.num_relations == kept, legacy
    np.testing.assert_allclose(graph.relation_scores, [0.225, 0.216], rtol=1e-5)


def test_legacy_single_predicate(monkeypatch):
    monkeypatch.setattr("sgtr_hf.post_processing.LINKS", 1)
    boxes = [[x, 0.5, 0.1, 0.1] for x in (0.1, 0.3, 0.5, 0.7)]
    # The second query's best predicate is less likely than both of the first.
    outputs = graph_outputs(boxes, [[0.9, 0.0]] * 4, [[0.9, 0.8], [0.2, 0.1]])
    for legacy, expected in ((False, [0.9, 0.8]), (True, [0.9, 0.2])):
        rules = LegacyRules(single_predicate=legacy)
        (graph,) = find_scene_graphs(outputs, None, legacy=rules)
        np.testing.assert_allclose(graph.relation_scores, np.array(expected) * 0.81, rtol=1e-5)


@pytest.mark.parametrize("kind", [SgtrImageProcessor, SgtrImageProcessorPil])
@pytest.mark.parametrize(
    ("shape", "expected", "rounded"),
    [
        # 640 * 600 / 425 = 903.5
        ((425, 640), (600, 903), (600, 904)),
        # The longest side decides: 300 * 1000 / 700 = 428.6
        ((300, 700), (429, 1000), (429, 1000)),
    ],
)
def test_legacy_round_sides(kind, shape, expected, rounded):
    picture = np.zeros((*shape, 3), dtype=np.uint8)
    size = {"shortest_edge": 600, "longest_edge": 1000}
    for legacy, sides in ((False, expected), (True, rounded)):
        processor = kind(size=size, legacy_round_sides=legacy)
        found = processor(images=picture, return_tensors="pt")["pixel_values"].shape[-2:]
        assert tuple(found) == sides
