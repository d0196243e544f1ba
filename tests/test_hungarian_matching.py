"""Matching: padding and its checks, costs, assignment."""

import pytest
import torch

from sgtr_hf.configuration.configuration_sgtr_detr import SgtrDetrConfig
from sgtr_hf.losses import hungarian_matching
from sgtr_hf.losses.hungarian_matching import (
    AssignmentProblem,
    PaddedAnnotations,
    assign,
    assign_all,
    entity_matching_costs,
    pad_annotations,
)


def make_labels(counts, num_classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        centres = 0.3 + 0.4 * torch.rand((count, 2), generator=generator)
        sizes = 0.1 + 0.4 * torch.rand((count, 2), generator=generator)
        relations = [[0, count - 1, 2], [count - 1, 0, 1]] if count > 1 else []
        labels.append(
            {
                "class_labels": torch.randint(num_classes, (count,), generator=generator),
                "boxes": torch.cat((centres, sizes), dim=-1),
                "relations": torch.tensor(relations, dtype=torch.int64).reshape(-1, 3),
            }
        )
    return labels


def pad(labels, **kwargs):
    return pad_annotations(labels, "cpu", num_classes=5, num_predicates=3, **kwargs)


def make_predictions(config, levels=2, images=3, queries=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    columns = config.num_labels + (config.classification == "softmax")
    logits = 2 * torch.randn((levels, images, queries, columns), generator=generator)
    boxes = 0.2 + 0.5 * torch.rand((levels, images, queries, 4), generator=generator)
    return logits, boxes


def test_pad_annotations_fills_to_the_largest_image():
    annotations = pad(make_labels([3, 0, 2]))
    assert annotations.class_labels.shape == (3, 3)
    assert annotations.boxes.shape == (3, 3, 4)
    assert annotations.valid.tolist() == [[True] * 3, [False] * 3, [True, True, False]]
    assert annotations.relations.shape == (3, 2, 3)
    assert annotations.relation_valid.sum(1).tolist() == [2, 0, 2]
    assert annotations.class_labels.dtype == annotations.relations.dtype == torch.int64


def test_pad_annotations_without_entities_gives_empty_tensors():
    annotations = pad(make_labels([0, 0]))
    assert annotations.boxes.shape == (2, 0, 4)
    assert annotations.relations.shape == (2, 0, 3)


def test_pad_annotations_for_detection_needs_no_relations():
    labels = make_labels([2])
    del labels[0]["relations"]
    annotations = pad_annotations(labels, "cpu", num_classes=5)
    assert annotations.relations.shape == (1, 0, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        pytest.param(
            "class_labels", [0, 5, 0], r"\['class_labels'\]\[1\].*0 to 4.*got 5", id="class"
        ),
        pytest.param("class_labels", [0, 0, -1], r"\[2\].*got -1", id="negative class"),
        pytest.param("class_labels", [0, 1], "2 `class_labels` and 3 `boxes`", id="lengths"),
        pytest.param("class_labels", [[0, 1, 2]], r"shape \(n,\), got \(1, 3\)", id="class shape"),
        pytest.param("boxes", [[0.5, 0.5, 0.1]] * 3, r"shape \(n, 4\)", id="box shape"),
        pytest.param("boxes", [[0.5, 0.5, 0.1, float("nan")]] * 3, "finite", id="nan"),
        pytest.param("boxes", [[20, 30, 50, 60]] * 3, "not pixels", id="pixels"),
        pytest.param("boxes", [[0.5, 0.5, -0.1, 0.1]] * 3, "width and height", id="negative size"),
        pytest.param("relations", [[0, 3, 0]], "below the number of entities", id="no such entity"),
        pytest.param("relations", [[0, 1, 3]], "predicate from 0 to 2.*got", id="predicate"),
        pytest.param("relations", [0, 1, 2], r"shape \(n, 3\)", id="relation shape"),
    ],
)
def test_pad_annotations_with_wrong_value_names_image_and_field(field, value, message):
    labels = make_labels([4, 3])
    labels[1][field] = torch.tensor(value)
    with pytest.raises(ValueError, match=message) as error:
        pad(labels)
    assert "`labels[1]" in str(error.value)
    assert field in str(error.value)


def test_pad_annotations_counts_entities_of_the_own_image():
    labels = make_labels([4, 2])
    labels[1]["relations"] = torch.tensor([[0, 3, 0]])
    with pytest.raises(ValueError, match=r"labels\[1\]\['relations'\]\[0\]"):
        pad(labels)


def test_pad_annotations_with_missing_field_names_it():
    labels = make_labels([2])
    del labels[0]["relations"]
    with pytest.raises(ValueError, match="must have `relations`"):
        pad(labels)
    with pytest.raises(ValueError, match="one dict an image"):
        pad([])


def test_assign_finds_the_lowest_total_cost():
    # The cheapest query of both annotations is 0; giving it to the second costs less in all.
    costs = torch.tensor([[0.0, 0.1], [1.0, 5.0], [9.0, 9.0]])[None, None]
    assert assign(costs, torch.ones((1, 2), dtype=torch.bool)).tolist() == [[[1, 0]]]


def test_assign_leaves_padding_and_empty_images_unmatched():
    costs = torch.rand((2, 3, 6, 4), generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    costs[:, ~valid.any(1)] = float("nan")
    matches = assign(costs, valid)
    assert matches.dtype == torch.int64
    assert torch.equal(matches >= 0, valid.expand(2, -1, -1))
    assert all(len(set(row.tolist())) == 4 for row in matches[:, 2])


def test_assign_without_annotations_returns_empty():
    assert assign(torch.zeros((2, 3, 5, 0)), torch.zeros((3, 0), dtype=torch.bool)).shape == (
        2,
        3,
        0,
    )


def test_assign_all_equals_assign_and_copies_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand((2, 3, 6, 4), generator=generator), torch.rand((1, 3, 9, 2))
    valid = [torch.rand((3, 4), generator=generator) > 0.3, torch.ones((3, 2)) > 0]
    expected = assign(first, valid[0]), assign(second, valid[1])
    copies = []
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda self: copies.append(self.numel()) or self.detach()
    )
    solved = assign_all(AssignmentProblem(first, valid[0]), AssignmentProblem(second, valid[1]))
    assert len(copies) == 1
    assert all(torch.equal(*pair) for pair in zip(solved, expected, strict=True))


def test_assign_with_too_many_annotations_names_the_setting():
    problem = AssignmentProblem(torch.zeros((1, 2, 2, 3)), torch.tensor([[1, 1, 0], [1, 1, 1]]) > 0)
    with pytest.raises(ValueError, match=r"`num_queries`.*got 2 for the 3 of image 1"):
        assign_all(problem)
    with pytest.raises(ValueError, match="Raise `num_predicate_queries`"):
        assign_all(problem._replace(queries_field="num_predicate_queries"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_assign_with_costs_that_are_not_finite_says_why(value):
    costs = torch.zeros((1, 1, 3, 2))
    costs[..., 1, 1] = value
    with pytest.raises(ValueError, match=r"outputs are not finite.*learning rate"):
        assign(costs, torch.ones((1, 2)) > 0)


def test_assign_without_scipy_says_how_to_install(monkeypatch):
    monkeypatch.setattr(hungarian_matching, "is_scipy_available", lambda: False)
    with pytest.raises(ImportError, match="pip install scipy"):
        assign(torch.zeros((1, 1, 3, 2)), torch.ones((1, 2)) > 0)


def test_entity_costs_of_softmax_match_hand_made_numbers():
    config = SgtrDetrConfig(num_labels=2)
    logits = torch.tensor([0.0, 0.0, 0.0])[None, None, None]
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4])[None, None, None]
    labels = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]])}
    annotations = pad_annotations([labels], "cpu", num_classes=2)
    cost = entity_matching_costs(config, logits, boxes, annotations)
    # -1/3, 5 * 0.2 and -2 * IoU 1/2: the hull is the larger box.
    assert cost.item() == pytest.approx(-1 / 3 + 1.0 - 1.0, abs=1e-6)


def test_entity_costs_of_focal_fall_with_the_probability():
    config = SgtrDetrConfig(
        num_labels=2, classification="focal", box_cost_weight=0.0, giou_cost_weight=0.0
    )
    logits = torch.tensor([[-3.0, 9.0], [0.0, 9.0], [3.0, 9.0]])[None, None]
    labels = {"class_labels": torch.tensor([0]), "boxes": torch.full((1, 4), 0.5)}
    annotations = pad_annotations([labels], "cpu", num_classes=2)
    cost = entity_matching_costs(
        config, logits, torch.full((1, 1, 3, 4), 0.5), annotations
    ).flatten()
    assert cost[0] > cost[1] > cost[2]
    # alpha (1 - p)^2 (-log p) - (1 - alpha) p^2 (-log(1 - p)) at p = 1/2.
    assert cost[1].item() == pytest.approx((0.25 - 0.75) * 0.25 * 0.693147, abs=1e-5)


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_matches_of_a_batch_equal_those_of_each_image(classification):
    config = SgtrDetrConfig(num_labels=5, classification=classification)
    labels = make_labels([3, 0, 5])
    logits, boxes = make_predictions(config)
    annotations = pad(labels)
    together = assign(entity_matching_costs(config, logits, boxes, annotations), annotations.valid)
    for image, label in enumerate(labels):
        alone = pad([label])
        costs = entity_matching_costs(config, logits[:, image, None], boxes[:, image, None], alone)
        count = len(label["boxes"])
        assert torch.equal(together[:, image, :count], assign(costs, alone.valid)[:, 0])


def test_permuting_annotations_permutes_matches():
    config = SgtrDetrConfig(num_labels=5)
    logits, boxes = make_predictions(config, images=1)
    label = make_labels([5])[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {name: label[name][order] for name in ("class_labels", "boxes")}
    matches = []
    for entry in (label, shuffled):
        annotations = pad_annotations([entry], "cpu", num_classes=5)
        assert isinstance(annotations, PaddedAnnotations)
        costs = entity_matching_costs(config, logits, boxes, annotations)
        matches.append(assign(costs, annotations.valid))
    assert torch.equal(matches[0][..., order], matches[1])


def test_costs_take_half_precision_and_carry_no_gradient():
    config = SgtrDetrConfig(num_labels=5)
    logits, boxes = make_predictions(config)
    annotations = pad(make_labels([3, 0, 5]))
    costs = entity_matching_costs(
        config, logits.bfloat16().requires_grad_(), boxes.bfloat16(), annotations
    )
    assert costs.dtype == torch.float32
    assert not costs.requires_grad
    assert assign(costs.bfloat16(), annotations.valid).shape == (2, 3, 5)
