"""Matching and losses of triplets against slow references, invariants and the original SGTR."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from sgtr_hf.boxes import box_cxcywh_to_xyxy, generalized_box_iou
from sgtr_hf.configuration.configuration_sgtr import SgtrConfig
from sgtr_hf.losses.detection_loss import focal_loss
from sgtr_hf.losses.hungarian_matching import pad_annotations
from sgtr_hf.losses.scene_graph_loss import TripletAssignment, scene_graph_losses
from sgtr_hf.losses.triplet_matching_costs import triplet_matching_costs
from sgtr_hf.losses.triplet_predictions import TripletPredictions
from triplet_matching_reference import match_triplets


NUM_CLASSES, NUM_PREDICATES = 4, 3
LEGACY = {
    "legacy_triplet_matching": True,
    "legacy_conflict_row": True,
    "legacy_softmax_cost": True,
    "legacy_focal_normalization": True,
    "legacy_unweighted_auxiliary_predicates": True,
    "legacy_pixel_distance": True,
}
LEGACY_DETECTOR = {"legacy_box_offset": 0.001, "legacy_unweighted_auxiliary_losses": True}
OPEN_IMAGES = {
    "predicate_classification": "softmax",
    "training_assembling_top_k": 40,
    "relation_vector_cost_weight": 1.0,
    "entity_giou_cost_weight": 1.25,
    "assembling_cost_weight": 0.0,
    "indicator_box_loss_weight": 0.3,
    "indicator_giou_loss_weight": 0.3,
}
CASES = pytest.mark.parametrize(
    ("predicates", "entities"),
    [("focal", "softmax"), ("softmax", "softmax"), ("focal", "focal")],
)


def make_config(predicates="focal", entities="softmax", **kwargs):
    detector = {"num_labels": NUM_CLASSES, "classification": entities}
    return SgtrConfig(
        detector_config=detector,
        num_labels=NUM_CLASSES,
        id2predicate={index: str(index) for index in range(NUM_PREDICATES)},
        predicate_classification=predicates,
        **{"training_assembling_top_k": 3, "assembling_cost_weight": 0.5, **kwargs},
    )


def make_labels(counts, seed=0):
    """Make images with 4 entities and some relations each."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        num_entities = 4 if count else 0
        pairs = torch.stack(
            [torch.randperm(4, generator=generator)[:2] for _ in range(count)]
            or [torch.zeros(2, dtype=torch.int64)]
        )[:count]
        predicates = torch.randint(NUM_PREDICATES, (count, 1), generator=generator)
        labels.append(
            {
                "class_labels": torch.randint(NUM_CLASSES, (num_entities,), generator=generator),
                "boxes": 0.2 + 0.4 * torch.rand((num_entities, 4), generator=generator),
                "relations": torch.cat((pairs, predicates), dim=1),
            }
        )
    return labels


def pad(labels):
    return pad_annotations(labels, "cpu", num_classes=NUM_CLASSES, num_predicates=NUM_PREDICATES)


def make_predictions(config, levels=2, images=3, queries=7, entities=6):
    """Make random triplets and the entities (logits, boxes) they link to."""
    generator = torch.Generator().manual_seed(1)

    def rand(*sizes):
        return torch.rand(sizes, generator=generator)

    def logits(*sizes):
        return torch.randn(sizes, generator=generator)

    shape = (levels, images, queries)
    classes = NUM_CLASSES + (config.detector_config.classification == "softmax")
    predictions = TripletPredictions(
        predicate_logits=logits(
            *shape, NUM_PREDICATES + (config.predicate_classification == "softmax")
        ),
        relation_vectors=rand(*shape, 4),
        subject_logits=logits(*shape, classes),
        subject_boxes=0.2 + 0.5 * rand(*shape, 4),
        object_logits=logits(*shape, classes),
        object_boxes=0.2 + 0.5 * rand(*shape, 4),
        subject_scores=rand(*shape, entities),
        object_scores=rand(*shape, entities),
    )
    return predictions, (logits(images, entities, classes), 0.2 + 0.5 * rand(images, entities, 4))


def on_fields(predictions, function):
    fields = predictions._asdict().items()
    return TripletPredictions(
        **{name: function(field) for name, field in fields if field is not None}
    )


def image_of(predictions, image):
    return on_fields(predictions, lambda field: field[:, image, None])


def slow_costs(config, predictions, entity, label, level, image):
    """Costs (Q, R) by loops over queries, relations and candidates, straight from the formulas."""
    entity_logits, entity_boxes = entity[0][image], entity[1][image]
    softmax_entities = config.detector_config.classification == "softmax"
    classes = entity_logits.softmax(-1) if softmax_entities else entity_logits.sigmoid()
    num_queries = predictions.relation_vectors.shape[2]
    costs = torch.zeros((num_queries, len(label["relations"])))
    for query in range(num_queries):
        row = predictions.predicate_logits[level, image, query]
        has_background = config.predicate_classification == "softmax"
        probabilities = row.softmax(-1)[1:] if has_background else row.sigmoid()
        rankings = [
            scores[level, image, query].argsort(descending=True)[:3]
            for scores in (predictions.subject_scores, predictions.object_scores)
        ]
        for index, (subject, object_, predicate) in enumerate(label["relations"].tolist()):
            ends = label["boxes"][[subject, object_]]
            vector = predictions.relation_vectors[level, image, query]
            fixed = 32 ** -probabilities[predicate]
            fixed = fixed + 0.6 * (vector - ends[:, :2].flatten()).abs().sum()
            candidates = []
            for pair in zip(*rankings, strict=True):
                pair = torch.stack(pair)
                found = classes[pair, label["class_labels"][[subject, object_]]].sum()
                distance = (entity_boxes[pair] - ends).abs().sum() / 2
                overlap = generalized_box_iou(
                    box_cxcywh_to_xyxy(entity_boxes[pair]), box_cxcywh_to_xyxy(ends)
                )
                score = (
                    predictions.subject_scores[level, image, query, pair[0]]
                    + predictions.object_scores[level, image, query, pair[1]]
                ) / 2
                candidates.append(
                    fixed
                    + 0.5 * 32**-found
                    + 0.6 * distance
                    + 32 ** -overlap.clamp(min=0).sum()
                    + 0.5 * (1 - score)
                )
            costs[query, index] = torch.stack(candidates).min()
    return costs


@CASES
def test_costs_equal_loops_over_queries_and_candidates(predicates, entities):
    config = make_config(predicates, entities)
    labels = make_labels([2, 0, 3])
    predictions, entity = make_predictions(config)
    costs = triplet_matching_costs(config, predictions, *entity, pad(labels))
    assert costs.shape == (2, 3, 7, 3)
    for level, image in np.ndindex(2, 3):
        expected = slow_costs(config, predictions, entity, labels[image], level, image)
        torch.testing.assert_close(costs[level, image, :, : expected.shape[1]], expected)


def test_top_k_beyond_the_entities_is_clipped():
    config = make_config(training_assembling_top_k=50)
    predictions, entity = make_predictions(config)
    annotations = pad(make_labels([2, 0, 3]))
    costs = triplet_matching_costs(config, predictions, *entity, annotations)
    all_six = make_config(training_assembling_top_k=6)
    expected = triplet_matching_costs(all_six, predictions, *entity, annotations)
    torch.testing.assert_close(costs, expected)


@pytest.mark.parametrize("legacy", [False, True])
def test_matches_of_a_batch_equal_those_of_each_image(legacy):
    config = make_config(legacy_triplet_matching=legacy)
    labels = make_labels([2, 0, 3])
    predictions, entity = make_predictions(config)
    together = match_triplets(config, predictions, *entity, pad(labels))
    for image, label in enumerate(labels):
        alone = [part[image, None] for part in entity]
        matches = match_triplets(config, image_of(predictions, image), *alone, pad([label]))
        count = len(label["relations"])
        assert torch.equal(together[:, image, :count], matches[:, 0])
        assert (together[:, image, count:] == -1).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_permuting_relations_permutes_matches(legacy):
    config = make_config(legacy_triplet_matching=legacy)
    predictions, entity = make_predictions(config, images=1)
    label = make_labels([5])[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    matches = match_triplets(config, predictions, *entity, pad([label]))
    label["relations"] = label["relations"][order]
    permuted = match_triplets(config, predictions, *entity, pad([label]))
    assert torch.equal(matches[..., order], permuted)


def test_every_relation_gets_its_own_query():
    config = make_config()
    predictions, entity = make_predictions(config, images=1)
    matches = match_triplets(config, predictions, *entity, pad(make_labels([7])))
    assert all(sorted(row) == list(range(7)) for row in matches[:, 0].tolist())


def test_more_relations_than_queries_names_the_setting():
    config = make_config()
    predictions, entity = make_predictions(config, images=1)
    with pytest.raises(ValueError, match=r"`num_predicate_queries`.*got 7 for the 8"):
        match_triplets(config, predictions, *entity, pad(make_labels([8])))


@pytest.mark.parametrize("legacy", [False, True])
def test_outputs_that_are_not_finite_are_refused(legacy):
    config = make_config(legacy_triplet_matching=legacy)
    predictions, entity = make_predictions(config)
    predictions.relation_vectors[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="outputs are not finite"):
        match_triplets(config, predictions, *entity, pad(make_labels([2, 0, 3])))


def random_matches(annotations, levels=2):
    count = annotations.relation_valid.shape[1]
    rows = torch.arange(count).flip(0).expand(levels, len(annotations.valid), count)
    return torch.where(annotations.relation_valid, rows, -1)


@CASES
def test_losses_equal_loops_over_relations(predicates, entities):
    config = make_config(predicates, entities)
    annotations = pad(make_labels([2, 0, 3]))
    predictions, _ = make_predictions(config)
    matches = random_matches(annotations)
    losses = scene_graph_losses(config, predictions, TripletAssignment(annotations, matches))
    fill = 0 if predicates == "softmax" else -1
    targets = torch.full((3, 7), fill)
    vector = box = giou = 0.0
    for image, relation in annotations.relation_valid.nonzero().tolist():
        subject, object_, predicate = annotations.relations[image, relation].tolist()
        query = matches[-1, image, relation]
        targets[image, query] = predicate + 1 + fill
        ends = annotations.boxes[image, [subject, object_]]
        centres = ends[:, :2].flatten()
        vector = vector + (predictions.relation_vectors[-1, image, query] - centres).abs().sum()
        expected_box = predictions.object_boxes[-1, image, query]
        box = box + (expected_box - ends[1]).abs().sum()
        giou = (
            giou
            + 1
            - generalized_box_iou(box_cxcywh_to_xyxy(expected_box), box_cxcywh_to_xyxy(ends[1]))
        )
    logits = predictions.predicate_logits[-1].flatten(0, 1)
    if predicates == "softmax":
        predicate_loss = cross_entropy(
            logits, targets.flatten(), weight=torch.tensor([0.08, 1.0, 1.0, 1.0])
        )
    else:
        encoded = torch.eye(NUM_PREDICATES + 1)[targets.flatten()][:, :-1]
        predicate_loss = focal_loss(logits, encoded, 0.25, 2.0).sum() / 5
    torch.testing.assert_close(losses["loss_predicate"], predicate_loss)
    torch.testing.assert_close(losses["loss_relation_vector"], vector / 5)
    torch.testing.assert_close(losses["loss_object_box"], 0.5 * box / 5)
    torch.testing.assert_close(losses["loss_object_giou"], 0.5 * giou / 5)


def test_indicator_class_loss_follows_the_detector():
    annotations = pad(make_labels([2, 0, 3]))
    for entities in ("softmax", "focal"):
        config = make_config(entities=entities)
        predictions, _ = make_predictions(config)
        matches = random_matches(annotations)
        losses = scene_graph_losses(config, predictions, TripletAssignment(annotations, matches))
        targets = torch.full((3, 7), NUM_CLASSES)
        for image, relation in annotations.relation_valid.nonzero().tolist():
            subject = annotations.relations[image, relation, 0]
            query = matches[-1, image, relation]
            targets[image, query] = annotations.class_labels[image, subject]
        logits, targets = predictions.subject_logits[-1].flatten(0, 1), targets.flatten()
        if entities == "softmax":
            weights = torch.tensor([1.0] * NUM_CLASSES + [0.1])
            expected = cross_entropy(logits, targets, weight=weights)
        else:
            encoded = torch.eye(NUM_CLASSES + 1)[targets][:, :-1]
            expected = focal_loss(logits, encoded, 0.25, 2.0).sum() / 5
        torch.testing.assert_close(losses["loss_subject_class"], 0.3 * expected)


def test_earlier_levels_count_by_the_auxiliary_weight():
    annotations = pad(make_labels([2, 0, 3]))
    config = make_config(auxiliary_relation_loss_weight=0.25)
    predictions, _ = make_predictions(config, levels=1)
    twice = on_fields(predictions, lambda field: torch.cat((field, field)))
    losses = scene_graph_losses(
        config, twice, TripletAssignment(annotations, random_matches(annotations))
    )
    names = [name for name in losses if not name.endswith("_0")]
    assert len(losses) == 2 * len(names) == 16
    for name in names:
        torch.testing.assert_close(losses[f"{name}_0"], losses[name] * 0.25)


@CASES
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]], ids=["some", "none"])
def test_padded_queries_count_for_nothing(predicates, entities, counts):
    config = make_config(predicates, entities)
    annotations = pad(make_labels(counts))
    valid = annotations.relation_valid
    num_queries = valid.shape[1]
    matches = torch.where(valid, torch.arange(num_queries), -1).expand(2, -1, -1)
    predictions, _ = make_predictions(config, queries=num_queries)

    def losses_of(predictions, only_matched):
        assignment = TripletAssignment(annotations, matches, only_matched)
        return torch.stack(list(scene_graph_losses(config, predictions, assignment).values()))

    def spoil(field):
        return torch.where(valid[..., None], field, field * 2)

    spoilt = on_fields(predictions, spoil)
    expected = losses_of(predictions, only_matched=True)
    assert expected.isfinite().all()
    assert losses_of(spoilt, only_matched=True).equal(expected)
    if num_queries:
        unlike = losses_of(spoilt, only_matched=False) - losses_of(predictions, only_matched=False)
        assert (unlike.abs() > 0).any()


@CASES
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]], ids=["some", "none"])
def test_gradients_are_finite_and_reach_all_predictions(predicates, entities, counts):
    config = make_config(predicates, entities)
    annotations = pad(make_labels(counts))
    predictions, entity = make_predictions(config)
    for field in filter(lambda field: field is not None, predictions):
        field.requires_grad_()
    matches = match_triplets(config, predictions, *entity, annotations)
    losses = scene_graph_losses(config, predictions, TripletAssignment(annotations, matches))
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for name, field in predictions._asdict().items():
        if field is None:
            continue
        if "scores" in name:
            assert field.grad is None
        else:
            assert field.grad.isfinite().all()
            assert (field.grad.abs().sum() > 0) == (sum(counts) > 0 or "logits" in name)


def test_perfect_boxes_and_vectors_cost_nothing():
    config = make_config()
    labels = make_labels([3])
    annotations = pad(labels)
    predictions, _ = make_predictions(config, levels=1, images=1)
    subjects, objects, _ = labels[0]["relations"].unbind(1)
    boxes = labels[0]["boxes"]
    predictions.subject_boxes[0, 0, 4:] = boxes[subjects]
    predictions.object_boxes[0, 0, 4:] = boxes[objects]
    predictions.relation_vectors[0, 0, 4:] = torch.cat(
        (boxes[subjects, :2], boxes[objects, :2]), dim=1
    )
    losses = scene_graph_losses(
        config, predictions, TripletAssignment(annotations, torch.tensor([[[4, 5, 6]]]))
    )
    for name, loss in losses.items():
        assert (loss.abs() < 1e-6) == ("class" not in name and "predicate" not in name), name


def test_half_precision_outputs_give_float32_losses():
    config = make_config()
    annotations = pad(make_labels([2, 0, 3]))
    predictions, entity = make_predictions(config)
    predictions = on_fields(predictions, torch.Tensor.bfloat16)
    matches = match_triplets(
        config, predictions, *(part.bfloat16() for part in entity), annotations
    )
    losses = scene_graph_losses(config, predictions, TripletAssignment(annotations, matches))
    assert all(loss.dtype == torch.float32 for loss in losses.values())
