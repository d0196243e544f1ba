import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from make_fixtures import FIXTURES
from recorded_triplets import assert_kept
from sgtr_hf.boxes import box_cxcywh_to_xyxy, box_iou, scale_boxes
from sgtr_hf.post_processing import (
    LINKS,
    LegacyRules,
    check_arguments,
    detect_objects,
    find_scene_graphs,
)


NUM_ENTITIES, NUM_QUERIES, NUM_CLASSES, NUM_PREDICATES = 8, 12, 3, 4


def random_outputs(num_images=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    boxes = draw(num_images, NUM_ENTITIES, 4) * 0.3 + 0.3
    # Two nearly equal entities, so that duplicates occur.
    boxes[:, 1] = boxes[:, 0] + 0.002
    probabilities = draw(num_images, NUM_ENTITIES, NUM_CLASSES)
    probabilities[:, 1] = probabilities[:, 0]
    return {
        "entity_probabilities": probabilities,
        "pred_boxes": boxes,
        "predicate_probabilities": draw(num_images, NUM_QUERIES, NUM_PREDICATES),
        "subject_scores": draw(num_images, NUM_QUERIES, NUM_ENTITIES),
        "object_scores": draw(num_images, NUM_QUERIES, NUM_ENTITIES),
    }


def candidates_of(outputs, image, scores, overlap):
    predicates = outputs["predicate_probabilities"][image]
    pairs = [
        (predicates[query, predicate].item(), query, predicate)
        for query in range(NUM_QUERIES)
        for predicate in range(NUM_PREDICATES)
    ]
    for value, query, predicate in sorted(pairs, reverse=True)[:NUM_QUERIES]:
        subjects = outputs["subject_scores"][image, query].topk(LINKS).indices.tolist()
        objects = outputs["object_scores"][image, query].topk(LINKS).indices.tolist()
        for subject, object_ in zip(subjects, objects, strict=True):
            if subject != object_ and overlap[subject, object_] < 0.95:
                score = value * scores[subject].item() * scores[object_].item()
                yield score, subject, object_, predicate


def one_by_one(outputs, image, *, graph_constraint):
    """The same selection in plain loops: (score, subject, object, predicate) best first."""
    scores, labels = outputs["entity_probabilities"][image].max(-1)
    corners = box_cxcywh_to_xyxy(outputs["pred_boxes"][image]).clamp(0, 1)
    overlap = box_iou(corners[:, None], corners[None])

    def alike(first, second):
        return overlap[first, second] > 0.8 and labels[first] == labels[second]

    kept = []
    for row in sorted(candidates_of(outputs, image, scores, overlap), key=lambda row: -row[0]):
        clashes = any(
            row[3] == other[3]
            and (row[1:3] == other[1:3] or (alike(row[1], other[1]) and alike(row[2], other[2])))
            for other in kept
        )
        if not clashes:
            kept.append(row)
    if graph_constraint:
        first_of_pair = {}
        for row in kept:
            first_of_pair.setdefault(row[1:3], row)
        kept = list(first_of_pair.values())
    return kept


@pytest.mark.parametrize("graph_constraint", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equals_deciding_one_by_one(seed, graph_constraint):
    outputs = random_outputs(seed=seed)
    graphs = find_scene_graphs(outputs, None, graph_constraint=graph_constraint)
    for image, graph in enumerate(graphs):
        expected = one_by_one(outputs, image, graph_constraint=graph_constraint)
        np.testing.assert_allclose(graph.relation_scores, [row[0] for row in expected], rtol=1e-5)
        scores = outputs["entity_probabilities"][image].amax(-1)
        # A pair and its reverse have one score and no order, hence sorted.
        wanted = sorted((p, scores[s].item(), scores[o].item()) for _, s, o, p in expected)
        found = sorted(
            (p, graph.scores[s].item(), graph.scores[o].item())
            for s, o, p in graph.relations.tolist()
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def said_triplets(graph):
    """What a graph says: score, predicate, boxes and classes of subject and object; sorted."""
    return sorted(
        (round(float(score), 6), predicate, *(
            (*graph.boxes_xyxy[entity].round(4).tolist(), int(graph.labels[entity]))
            for entity in (subject, object_)
        ))
        for score, (subject, object_, predicate) in zip(
            graph.relation_scores, graph.relations.tolist(), strict=True
        )
    )  # fmt: skip


@pytest.mark.parametrize("is_unified", [False, True])
@pytest.mark.parametrize("labels_per_entity", [2, 9])
def test_triplets_of_all_classes_of_an_entity_compete(labels_per_entity, is_unified):
    outputs = random_outputs()
    if is_unified:
        for role in ("subject", "object"):
            outputs[f"{role}_log_correspondence"] = outputs[f"{role}_scores"].log()
    arguments = {"top_k": 10_000, "duplicate_threshold": 1.0}
    found = find_scene_graphs(outputs, None, labels_per_entity=labels_per_entity, **arguments)
    # With one class of certainty each, the scores are those of predicates and links alone.
    certain = torch.zeros_like(outputs["entity_probabilities"])
    certain[..., 0] = 1
    bare = find_scene_graphs(outputs | {"entity_probabilities": certain}, None, **arguments)
    num_labels = min(labels_per_entity, NUM_CLASSES)
    for image, graph in enumerate(bare):
        corners = box_cxcywh_to_xyxy(outputs["pred_boxes"][image]).clamp(0, 1)
        entity_of = {tuple(box): number for number, box in enumerate(corners.tolist())}
        scores, labels = outputs["entity_probabilities"][image].topk(num_labels)
        expected = []
        for score, (*pair, predicate) in zip(
            graph.relation_scores.tolist(), graph.relations.tolist(), strict=True
        ):
            boxes = [graph.boxes_xyxy[node].tolist() for node in pair]
            subject, object_ = (entity_of[tuple(box)] for box in boxes)
            for first, second in itertools.product(range(num_labels), repeat=2):
                product = score * scores[subject, first] * scores[object_, second]
                named = [
                    (*np.float32(boxes[0]).round(4).tolist(), int(labels[subject, first])),
                    (*np.float32(boxes[1]).round(4).tolist(), int(labels[object_, second])),
                ]
                expected.append((float(product), predicate, *named))
        said = said_triplets(found[image])
        assert len(said) == len(expected) == num_labels**2 * graph.num_relations
        for one, other in zip(said, sorted(expected), strict=True):
            assert one[0] == pytest.approx(other[0], abs=2e-6)
        assert sorted(row[1:] for row in said) == sorted(row[1:] for row in expected)
        nodes = np.unique(found[image].relations[:, :2])
        assert len(nodes) == num_labels * len(np.unique(graph.relations[:, :2]))


def test_batched_equals_single():
    outputs = random_outputs(num_images=3)
    together = find_scene_graphs(outputs, [(100, 200)] * 3)
    for image, graph in enumerate(together):
        single = {name: tensor[image : image + 1] for name, tensor in outputs.items()}
        assert find_scene_graphs(single, [(100, 200)])[0] == graph


def test_boxes_are_in_pixels_of_the_target():
    outputs = random_outputs(num_images=1)
    graph = find_scene_graphs(outputs, torch.tensor([[100, 200]]))[0]
    assert graph.image_size == (100, 200)
    assert graph.boxes_xyxy[:, 2].max() > 100
    assert graph.boxes_xyxy[:, 3].max() <= 100


def test_threshold_and_top_k():
    outputs = random_outputs()
    for graph in find_scene_graphs(outputs, None, threshold=0.3, top_k=4):
        assert graph.num_relations <= 4
        assert (graph.relation_scores >= 0.3).all()
    none = find_scene_graphs(outputs, None, threshold=1.0)
    assert [graph.num_relations for graph in none] == [0, 0]


def test_distributions_belong_to_their_relations():
    graph = find_scene_graphs(random_outputs(), None)[0]
    chosen = graph.predicate_distributions[np.arange(graph.num_relations), graph.relations[:, 2]]
    entities = graph.scores[graph.relations[:, 0]] * graph.scores[graph.relations[:, 1]]
    np.testing.assert_allclose(chosen * entities, graph.relation_scores, rtol=1e-5)


@pytest.mark.parametrize("field", ["pred_boxes", "entity_probabilities", "predicate_probabilities"])
def test_nan_is_a_clear_error(field):
    outputs = random_outputs()
    outputs[field][1, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        find_scene_graphs(outputs, None)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"threshold": 1.5}, "threshold"),
        ({"top_k": 0}, "top_k"),
        ({"labels_per_entity": 0}, "labels_per_entity"),
    ],
)
def test_wrong_arguments(arguments, field):
    with pytest.raises(ValueError, match=field):
        find_scene_graphs(random_outputs(), None, **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"top_k": "a"}, TypeError, "`top_k` must be a whole number from 1, got 'a'"),
        ({"top_k": None}, TypeError, "`top_k` must be a whole number from 1, got None"),
        ({"top_k": 1.5}, TypeError, "`top_k` must be a whole number from 1, got 1.5"),
        ({"top_k": np.nan}, TypeError, "`top_k` must be a whole number from 1, got nan"),
        ({"top_k": True}, TypeError, "`top_k` must be a whole number from 1, got True"),
        ({"labels_per_entity": "a"}, TypeError, "`labels_per_entity` must be a whole number"),
        ({"labels_per_entity": 1.5}, TypeError, "`labels_per_entity` must be a whole number"),
        ({"threshold": "a"}, TypeError, "`threshold` must be a number between 0 and 1, got 'a'"),
        ({"threshold": None}, TypeError, "`threshold` must be a number between 0 and 1, got None"),
        ({"threshold": np.nan}, ValueError, "`threshold` must be between 0 and 1, got nan"),
        ({"duplicate_threshold": "a"}, TypeError, "`duplicate_threshold` must be a number"),
        ({"graph_constraint": "no"}, TypeError, "`graph_constraint` must be True or False.*'no'"),
        ({"graph_constraint": None}, TypeError, "`graph_constraint` must be True or False"),
    ],
)
def test_arguments_of_wrong_types(arguments, error, words):
    with pytest.raises(error, match=words):
        find_scene_graphs(random_outputs(), None, **arguments)
    with pytest.raises(error, match=words):
        check_arguments(**arguments)


def test_numbers_of_numpy_are_numbers():
    arguments = {
        "threshold": np.float32(0.1),
        "top_k": np.int64(5),
        "labels_per_entity": np.int8(2),
    }
    found = find_scene_graphs(random_outputs(), None, **arguments)
    plain = {name: value.item() for name, value in arguments.items()}
    assert found == find_scene_graphs(random_outputs(), None, **plain)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["pred_boxes", "entity_probabilities"])
def test_no_detections_of_outputs_that_are_not_finite(field, value):
    outputs = random_outputs()
    outputs[field][1, 2, 0] = value
    for threshold in (0.0, 1.0):
        with pytest.raises(ValueError, match="NaN or infinity"):
            detect_objects(outputs["entity_probabilities"], outputs["pred_boxes"], threshold, None)
    with pytest.raises(ValueError, match="NaN or infinity"):
        find_scene_graphs(outputs, None)


@pytest.mark.parametrize(
    "sizes",
    [[(-3, 4)] * 2, [(0, 4)] * 2, [(3, 4), (3,)], [("a", 4)] * 2, [(3, 4)], [3, 4], [None] * 2],
)
def test_sizes_are_pairs_of_at_least_a_pixel(sizes):
    outputs = random_outputs()
    with pytest.raises(ValueError, match="`target_sizes` must be one height and width an image"):
        find_scene_graphs(outputs, sizes)
    with pytest.raises(ValueError, match="`target_sizes` must be one height and width an image"):
        detect_objects(outputs["entity_probabilities"], outputs["pred_boxes"], 0.5, sizes)


@pytest.mark.parametrize("labels_per_entity", [1, 2])
def test_given_entities_are_always_in_the_graph(labels_per_entity):
    outputs = random_outputs()
    outputs["entity_probabilities"] *= 0.1
    outputs["entity_probabilities"][1, 5] = 0
    arguments = {"threshold": 1.0, "labels_per_entity": labels_per_entity}
    bare = find_scene_graphs(outputs, None, **arguments)
    assert [len(graph.boxes_xyxy) for graph in bare] == [0, 0]
    given = torch.zeros(2, NUM_ENTITIES, dtype=torch.bool)
    given[0, [2, 3]] = given[1, 5] = True
    graphs = find_scene_graphs(outputs | {"given_entities": given}, None, **arguments)
    corners = box_cxcywh_to_xyxy(outputs["pred_boxes"]).clamp(0, 1)
    for image, entities in ((0, [2, 3]), (1, [5])):
        found = sorted(graphs[image].boxes_xyxy.tolist())
        assert found == sorted(corners[image, entities].tolist())
    # Those with relations are in it once.
    whole = find_scene_graphs(outputs | {"given_entities": given | True}, None)
    assert [len(graph.boxes_xyxy) for graph in whole] == [NUM_ENTITIES, NUM_ENTITIES]


def test_wrong_number_of_sizes():
    with pytest.raises(ValueError, match="target_sizes"):
        find_scene_graphs(random_outputs(), [(10, 10)])


def test_detections_are_sorted_and_cut():
    outputs = random_outputs()
    detections = detect_objects(
        outputs["entity_probabilities"], outputs["pred_boxes"], 0.6, [(50, 60), (50, 60)]
    )
    for detection in detections:
        assert (detection["scores"] > 0.6).all()
        assert torch.equal(detection["scores"], detection["scores"].sort(descending=True).values)
        assert detection["boxes"].shape == (len(detection["labels"]), 4)


def test_detections_of_outputs_with_gradients():
    outputs = random_outputs()
    probabilities = outputs["entity_probabilities"].requires_grad_()
    assert len(detect_objects(probabilities, outputs["pred_boxes"], 0.5, None)) == 2
    assert detect_objects(probabilities[:0], outputs["pred_boxes"][:0], 0.5, None) == []


def test_a_box_can_have_several_classes():
    outputs = random_outputs()
    probabilities, boxes = outputs["entity_probabilities"], outputs["pred_boxes"]
    # Two queries are alike; without ties there is one answer.
    probabilities[:, 1] *= 0.99
    for image, detection in enumerate(detect_objects(probabilities, boxes, 0.0, None, top_k=7)):
        expected = sorted(
            (
                (score, label, query)
                for query, row in enumerate(probabilities[image].tolist())
                for label, score in enumerate(row)
            ),
            reverse=True,
        )[:7]
        scores, labels, queries = map(list, zip(*expected, strict=True))
        assert detection["scores"].tolist() == scores
        assert detection["labels"].tolist() == labels
        corners = box_cxcywh_to_xyxy(boxes[image, queries]).clamp(0, 1)
        torch.testing.assert_close(detection["boxes"], corners)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        detect_objects(probabilities, boxes, 0.0, None, top_k=0)


def test_the_overlap_of_duplicates_can_be_chosen():
    outputs = random_outputs(num_images=1)
    counts = [
        len(find_scene_graphs(outputs, None, duplicate_threshold=threshold)[0].relations)
        for threshold in (0.0, 0.8, 1.0)
    ]
    assert counts[0] < counts[1] <= counts[2]
    with pytest.raises(ValueError, match="`duplicate_threshold` must be between 0 and 1"):
        find_scene_graphs(outputs, None, duplicate_threshold=1.5)


def test_unified_assembling_takes_the_best_pairs_of_each_query():
    outputs = random_outputs(num_images=1)
    for role in ("subject", "object"):
        logits = torch.logit(outputs[f"{role}_scores"].clamp(0.01, 0.99))
        outputs[f"{role}_log_correspondence"] = (2 * logits).log_softmax(-1)
        outputs[f"{role}_scores"] = outputs[f"{role}_log_correspondence"].exp()
    graph = find_scene_graphs(outputs, None, duplicate_threshold=1.0, top_k=5)[0]
    scores = outputs["entity_probabilities"][0].amax(-1)
    corners = box_cxcywh_to_xyxy(outputs["pred_boxes"][0]).clamp(0, 1)
    overlap = box_iou(corners[:, None], corners[None])
    found = {}
    for query in range(NUM_QUERIES):
        subject_links, object_links = (
            outputs[f"{role}_scores"][0, query] for role in ("subject", "object")
        )
        pairs = [
            ((subject_links[subject] * object_links[object_]).item(), subject, object_)
            for subject in subject_links.topk(LINKS).indices.tolist()
            for object_ in object_links.topk(LINKS).indices.tolist()
            if subject != object_
        ]
        for link, subject, object_ in sorted(pairs, reverse=True)[:LINKS]:
            if overlap[subject, object_] >= 0.95:
                continue
            for predicate, value in enumerate(outputs["predicate_probabilities"][0, query]):
                total = (value * link * scores[subject] * scores[object_]).item()
                key = (subject, object_, predicate)
                found[key] = max(found.get(key, 0.0), total)
    best = sorted(found.values(), reverse=True)[:5]
    np.testing.assert_allclose(graph.relation_scores, best, rtol=1e-5)


@pytest.mark.parametrize("name", ["vg", "oiv6"])
def test_the_release_kept_the_same_triplets(name):
    recorded = load_file(FIXTURES / f"triplets_{name}.safetensors")
    labels = recorded["entities.labels"].long()
    classes = torch.zeros(1, len(labels), labels.max() + 1)
    classes[0, torch.arange(len(labels)), labels] = recorded["entities.scores"]
    logits = recorded["prediction.pred_rel_logits"]
    outputs = {
        "entity_probabilities": classes,
        "pred_boxes": recorded["prediction.pred_boxes"],
        "predicate_probabilities": logits.sigmoid()
        if name == "vg"
        else logits.softmax(-1)[..., 1:],
    }
    for role in ("subject", "object"):
        links = recorded[f"links.{role}"].long()
        scores = torch.zeros(1, len(logits[0]), len(labels))
        outputs[f"{role}_scores"] = scores.scatter(
            2, links, torch.tensor([3.0, 2, 1]).expand_as(links)
        )
    rules = LegacyRules(1e-3, True, True, True, single_predicate=name == "oiv6")
    sizes = recorded["target_sizes"]
    (graph,) = find_scene_graphs(outputs, sizes, top_k=300, legacy=rules)
    corners = box_cxcywh_to_xyxy(outputs["pred_boxes"], 1e-3)
    kept = recorded["kept.triplets"].long()
    kept[:, 2] = recorded["kept.predicates"].long() - 1
    assert_kept(
        graph, scale_boxes(corners, sizes)[0].numpy(), kept.numpy(), recorded["kept.scores"].numpy()
    )
