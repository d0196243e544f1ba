"""Losses of the detector against hand-made numbers, invariants and the original DETR."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from sgtr_hf.configuration.configuration_sgtr_detr import SgtrDetrConfig
from sgtr_hf.losses import detection_loss
from sgtr_hf.losses.detection_loss import (
    count_annotations,
    denoising_losses,
    detection_losses,
    focal_loss,
    scatter_to_queries,
)
from sgtr_hf.losses.hungarian_matching import (
    PaddedAnnotations,
    assign,
    entity_matching_costs,
    pad_annotations,
)


FIXTURES = Path(__file__).parent / "fixtures"
ORIGINAL_NAMES = {"class": ("loss_ce", 1), "box": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
NUM_CLASSES = 4


def make_config(classification="softmax", **kwargs):
    return SgtrDetrConfig(num_labels=NUM_CLASSES, classification=classification, **kwargs)


def make_labels(counts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(NUM_CLASSES, (count,), generator=generator),
            "boxes": 0.2 + 0.4 * torch.rand((count, 4), generator=generator),
        }
        for count in counts
    ]


def make_annotations(counts):
    return pad_annotations(make_labels(counts), "cpu", num_classes=NUM_CLASSES)


def make_predictions(config, levels=3, images=3, queries=6):
    generator = torch.Generator().manual_seed(1)
    columns = NUM_CLASSES + (config.classification == "softmax")
    logits = torch.randn((levels, images, queries, columns), generator=generator)
    boxes = 0.2 + 0.5 * torch.rand((levels, images, queries, 4), generator=generator)
    return logits.requires_grad_(), boxes.requires_grad_()


def compute_losses(config, logits, boxes, annotations):
    matches = assign(entity_matching_costs(config, logits, boxes, annotations), annotations.valid)
    return detection_losses(config, logits, boxes, annotations, matches)


def check_original_detr(tensors, expected, recorded_levels=(0,)):
    """Compare recorded levels and the last with the original's matches and unweighted losses."""
    config = SgtrDetrConfig(num_labels=91)
    labels = [
        {
            "class_labels": tensors[f"target.{i}.labels"],
            "boxes": tensors[f"target.{i}.boxes_cxcywh"],
        }
        for i in (0, 1)
    ]
    annotations = pad_annotations(labels, "cpu", num_classes=91)
    logits, boxes = (
        torch.stack(
            [tensors[f"aux.{level}.{name}"] for level in recorded_levels]
            + [tensors[f"output.{name}"]]
        )
        for name in ("pred_logits", "pred_boxes")
    )
    matches = assign(entity_matching_costs(config, logits, boxes, annotations), annotations.valid)
    for image in (0, 1):
        targets, queries = tensors[f"match.{image}.target"], tensors[f"match.{image}.query"]
        assert torch.equal(matches[-1, image, targets], queries)
    losses = detection_losses(config, logits, boxes, annotations, matches)
    suffixes = {f"_{index}": f"_{level}" for index, level in enumerate(recorded_levels)}
    assert len(losses) == 3 * (1 + len(suffixes))
    for name, (original, weight) in ORIGINAL_NAMES.items():
        for suffix, original_suffix in {"": "", **suffixes}.items():
            value = losses[f"loss_{name}{suffix}"].item() / weight
            assert value == pytest.approx(expected[original + original_suffix], rel=1e-6)


def test_losses_equal_the_original_detr():
    expected = json.loads((FIXTURES / "losses.json").read_text())["detr"]
    check_original_detr(load_file(FIXTURES / "detr.safetensors"), expected)


@pytest.mark.fidelity
@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet101"])
def test_losses_equal_all_recorded_figures(name):
    folder = Path(os.environ["SGTR_GOLDEN_DIR"])
    expected = json.loads((folder / f"{name}.losses.json").read_text())["losses"]
    check_original_detr(load_file(folder / f"{name}.safetensors"), expected, (0, 4))


def test_softmax_loss_is_the_weighted_mean_of_torch():
    config = make_config(eos_coefficient=0.3)
    logits, boxes = make_predictions(config, levels=1, images=1)
    annotations = make_annotations([2])
    matches = torch.tensor([[[4, 1]]])
    labels = annotations.class_labels[0]
    targets = torch.full((6,), NUM_CLASSES)
    targets[4], targets[1] = labels[0], labels[1]
    weights = torch.tensor([1.0] * NUM_CLASSES + [0.3])
    expected = cross_entropy(logits[0, 0], targets, weight=weights)
    loss = detection_losses(config, logits, boxes, annotations, matches)["loss_class"]
    torch.testing.assert_close(loss, expected)


def test_focal_loss_with_gamma_zero_is_half_the_cross_entropy():
    logits = torch.linspace(-5, 5, 12).reshape(3, 4)
    targets = torch.eye(4)[:3]
    loss = focal_loss(logits, targets, 0.5, 0.0)
    expected = binary_cross_entropy_with_logits(logits, targets, reduction="none") / 2
    torch.testing.assert_close(loss, expected)


def test_focal_class_loss_is_divided_by_the_number_of_entities():
    config = make_config("focal", class_loss_weight=2.0)
    logits, boxes = make_predictions(config, levels=1, images=2)
    annotations = make_annotations([3, 1])
    matches = torch.tensor([[[0, 1, 2], [5, -1, -1]]])
    targets = torch.zeros((2, 6, NUM_CLASSES))
    for image, annotation, query in ((0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 0, 5)):
        targets[image, query, annotations.class_labels[image, annotation]] = 1
    expected = 2 * focal_loss(logits[0], targets, 0.25, 2.0).sum() / 4
    loss = detection_losses(config, logits, boxes, annotations, matches)["loss_class"]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_levels_do_not_touch_each_other(classification):
    config = make_config(classification)
    logits, boxes = make_predictions(config)
    annotations = make_annotations([3, 0, 5])
    together = compute_losses(config, logits, boxes, annotations)
    for level, suffix in enumerate(("_0", "_1", "")):
        part = slice(level, level + 1)
        alone = compute_losses(config, logits[part], boxes[part], annotations)
        for name, value in alone.items():
            torch.testing.assert_close(together[name + suffix], value)


def test_losses_of_a_batch_are_those_of_its_images():
    config = make_config("focal")
    logits, boxes = make_predictions(config)
    counts = [3, 1, 5]
    labels = make_labels(counts)
    together = compute_losses(config, logits, boxes, make_annotations(counts))
    sums = dict.fromkeys(together, 0.0)
    for image, count in enumerate(counts):
        annotations = pad_annotations([labels[image]], "cpu", num_classes=NUM_CLASSES)
        part = slice(image, image + 1)
        for name, value in compute_losses(
            config, logits[:, part], boxes[:, part], annotations
        ).items():
            sums[name] += value * count
    for name, value in together.items():
        torch.testing.assert_close(value * sum(counts), sums[name])


def test_perfect_boxes_cost_nothing():
    config = make_config()
    annotations = make_annotations([3, 2])
    boxes = torch.zeros((1, 2, 6, 4))
    boxes[0, :, :3] = annotations.boxes
    logits = torch.full((1, 2, 6, NUM_CLASSES + 1), -30.0)
    targets = torch.full((2, 6), NUM_CLASSES)
    targets[annotations.valid.nonzero(as_tuple=True)] = annotations.class_labels[annotations.valid]
    logits[0].scatter_(-1, targets[..., None], 30.0)
    losses = compute_losses(config, logits, boxes, annotations)
    assert all(loss.abs() < 1e-5 for loss in losses.values())


@pytest.mark.parametrize("classification", ["softmax", "focal"])
@pytest.mark.parametrize("counts", [[2, 0, 4], [0, 0, 0]], ids=["some", "none"])
def test_gradients_are_finite_and_reach_all_predictions(classification, counts):
    config = make_config(classification)
    logits, boxes = make_predictions(config)
    losses = compute_losses(config, logits, boxes, make_annotations(counts))
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad.isfinite().all()
    assert boxes.grad.isfinite().all()
    assert (logits.grad != 0).all()
    assert (boxes.grad.abs().sum() > 0) == (sum(counts) > 0)


def test_images_without_entities_have_no_box_loss():
    config = make_config()
    losses = compute_losses(config, *make_predictions(config), make_annotations([0, 0, 0]))
    assert losses["loss_box"] == losses["loss_giou"] == 0
    assert losses["loss_class"] > 0


def test_half_precision_outputs_give_float32_losses():
    config = make_config("focal")
    logits, boxes = make_predictions(config)
    losses = compute_losses(
        config, logits.bfloat16(), boxes.bfloat16(), make_annotations([3, 0, 5])
    )
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_scatter_to_queries_skips_unmatched_annotations():
    values = torch.tensor([[7, 8, 9]])
    matches = torch.tensor([[[3, -1, 0]], [[-1, -1, -1]]])
    expected = [[[9, -1, -1, 7]], [[-1, -1, -1, -1]]]
    assert scatter_to_queries(values, matches, 4, -1).tolist() == expected


def test_counts_are_averages_over_processes_and_batches(monkeypatch):
    monkeypatch.setattr(detection_loss.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(detection_loss.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(detection_loss.distributed, "all_reduce", lambda totals: totals.add_(10))
    annotations = make_annotations([3, 1])
    relations = torch.tensor([[[0, 1, 2], [1, 0, 2]], [[0, 0, 0], [0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    annotations = annotations._replace(relations=relations, relation_valid=valid)
    counts = count_annotations(annotations, 3, num_batches=4, repetitions=torch.tensor([1, 5]))
    # Over two processes with four batches each.
    assert counts.images == 12 / 8
    assert counts.entities == 14 / 8
    assert counts.predicates.tolist() == [11 / 8, 10 / 8, 12 / 8]
    assert counts.repeated_predicates.tolist() == [15 / 8, 10 / 8, 12 / 8]
    assert counts.least == 1 / 8


def test_an_update_without_annotations_divides_by_one_in_all():
    counts = count_annotations(make_annotations([0, 0]), num_batches=2)
    assert counts.entities == 0
    assert counts.at_least_one(counts.entities) == 0.5


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_losses_of_two_batches_average_to_that_of_both(classification):
    config = make_config(classification)
    logits, boxes = make_predictions(config, levels=2, images=4)
    annotations = make_annotations([3, 0, 1, 1])
    matches = assign(torch.rand(2, 4, 6, 3), annotations.valid)
    whole = detection_losses(config, logits, boxes, annotations, matches)
    counts = count_annotations(annotations, num_batches=2)
    halves = []
    for images in (slice(0, 2), slice(2, 4)):
        part = PaddedAnnotations(*(field[images] for field in annotations[:5]), counts=counts)
        halves.append(
            detection_losses(config, logits[:, images], boxes[:, images], part, matches[:, images])
        )
    for name, loss in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, loss)


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_denoising_losses_equal_a_loop_over_queries(classification):
    config = make_config(classification)
    logits, boxes = make_predictions(config, levels=2, images=2, queries=4)
    annotations = make_annotations([2, 1])
    indices = torch.tensor([[0, 1, 0, 1], [0, -1, 0, -1]])
    losses = denoising_losses(config, logits, boxes, annotations, indices)
    class_loss = box_loss = 0.0
    for image, query in (indices >= 0).nonzero().tolist():
        entity = indices[image, query]
        label = annotations.class_labels[image, entity]
        row = logits[-1, image, query]
        if classification == "softmax":
            class_loss = class_loss + cross_entropy(row, label)
        else:
            target = torch.eye(NUM_CLASSES)[label]
            class_loss = class_loss + focal_loss(row, target, 0.25, 2.0).sum()
        box = annotations.boxes[image, entity]
        box_loss = box_loss + (boxes[-1, image, query] - box).abs().sum()
    torch.testing.assert_close(losses["loss_denoising_class"], class_loss / 6)
    torch.testing.assert_close(losses["loss_denoising_box"], 5 * box_loss / 6)
    assert sorted(losses) == sorted(
        f"loss_denoising_{name}{suffix}"
        for name in ("class", "box", "giou")
        for suffix in ("", "_0")
    )


@pytest.mark.parametrize("classification", ["softmax", "focal"])
@pytest.mark.parametrize("num_queries", [0, 3])
def test_denoising_losses_without_entities_are_zero(classification, num_queries):
    config = make_config(classification)
    logits, boxes = make_predictions(config, images=2, queries=num_queries)
    # Without a single entity there is no query; padding alone needs at least one other image's.
    annotations = make_annotations([0, 0] if num_queries == 0 else [1, 0])
    indices = torch.full((2, num_queries), -1)
    losses = denoising_losses(config, logits, boxes, annotations, indices)
    assert all(loss == 0 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert logits.grad.isfinite().all()
