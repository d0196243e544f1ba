import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import sgtr_hf
from conftest import random_labels, small_config
from sgtr_hf.boxes import box_cxcywh_to_xyxy, box_iou, pair_geometry
from sgtr_hf.losses.hungarian_matching import pad_annotations
from sgtr_hf.losses.scene_graph_loss import MatchedEntities, relatedness_loss
from sgtr_hf.losses.scene_graph_loss import _long_tail_terms as long_tail_terms
from sgtr_hf.losses.scene_graph_loss import _role_assembling_losses as role_assembling_losses
from sgtr_hf.modeling.graph_assembling import UnifiedAssembling
from sgtr_hf.modeling.graph_nodes import EntityNodes, TripletAnchors, TripletStates
from sgtr_hf.modeling.pair_selection import PairSelection
from sgtr_hf.modeling.prediction_heads import predicate_probabilities
from sgtr_hf.modeling.spatial_aware_decoder import (
    LOWEST_BIAS,
    TripletExchange,
    combine_masks,
    gaussian_bias,
)


PLUS = {
    "predicate_node_generator": "spatial_aware",
    "graph_assembling": "unified",
    "pair_queries": True,
}
GENERATORS = ("structural", "spatial_aware")
ASSEMBLING = ("rule_based", "unified")


def make_model(detector=None, **fields):
    torch.manual_seed(0)
    return sgtr_hf.SgtrForSceneGraphGeneration(small_config(detector, **(PLUS | fields))).eval()


def make_nodes(count=5, images=2, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    boxes = torch.cat((rand(images, count, 2), 0.1 + 0.3 * rand(images, count, 2)), dim=-1)
    features = torch.randn(images, count, width, generator=generator)
    return EntityNodes(features, boxes, rand(images, count, 3).softmax(-1))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("assembling", ASSEMBLING)
@pytest.mark.parametrize("pairs", [False, True], ids=["learned", "pairs"])
def test_each_combination_trains_and_saves(generator, assembling, pairs, pixel_values, tmp_path):
    model = make_model(
        predicate_node_generator=generator, graph_assembling=assembling, pair_queries=pairs
    )
    output = model.train()(pixel_values, labels=random_labels())
    output.loss.backward()
    assert torch.isfinite(output.loss)
    model.eval().save_pretrained(tmp_path)
    loaded = sgtr_hf.SgtrForSceneGraphGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        first, second = model(pixel_values), loaded(pixel_values)
    torch.testing.assert_close(first.subject_scores, second.subject_scores)
    torch.testing.assert_close(first.predicate_logits, second.predicate_logits)
    graphs = sgtr_hf.SgtrImageProcessor().post_process_scene_graph(first, top_k=5)
    assert all(1 <= len(graph.relations) <= 5 for graph in graphs)


def test_pair_geometry_describes_boxes():
    left, right = torch.tensor([0.3, 0.5, 0.2, 0.2]), torch.tensor([0.7, 0.5, 0.2, 0.4])
    features = pair_geometry(left, right)
    expected = [0.4, 0.0, 2.0, 0.0, -1 / 3, 1 / 3, 0.0, 0.6931472, 0.0, 0.0, 0.0, 0.6931472]
    torch.testing.assert_close(features, torch.tensor(expected), rtol=0, atol=1e-6)
    inside = torch.tensor([0.3, 0.5, 0.1, 0.1])
    subject_share, object_share, overlap = pair_geometry(left, inside)[8:11]
    assert subject_share == pytest.approx(0.25)
    assert object_share == pytest.approx(1.0)
    corners = [box_cxcywh_to_xyxy(box) for box in (left, inside)]
    assert overlap == pytest.approx(box_iou(*corners).item())


def test_pair_selection_takes_the_best_of_all_ordered_pairs():
    torch.manual_seed(0)
    nodes = make_nodes()
    selection = PairSelection(small_config(**PLUS, num_predicate_queries=7))
    pairs = selection(nodes)
    for image, logits in enumerate(pairs.relatedness_logits):
        everything = sorted(
            (-logits[subject, object_].item(), subject, object_)
            for subject in range(5)
            for object_ in range(5)
            if subject != object_
        )
        found = list(
            zip(pairs.subjects[image].tolist(), pairs.objects[image].tolist(), strict=True)
        )
        assert found == [entry[1:] for entry in everything[:7]]
    assert pairs.valid is None


def test_pair_selection_marks_pairs_that_are_not_there():
    nodes = make_nodes()._replace(
        valid=torch.tensor([[True, True, False, False, False], [True] * 5])
    )
    pairs = PairSelection(small_config(**PLUS, num_predicate_queries=30))(nodes)
    assert pairs.subjects.shape == (2, 25)
    assert pairs.valid.sum(1).tolist() == [2, 20]


def test_relatedness_loss_wants_the_annotated_pairs():
    annotations = pad_annotations(
        random_labels(counts=(4, 3)), "cpu", num_classes=3, num_predicates=2
    )
    matches = torch.tensor([[3, 1, 0, 4], [2, 0, 1, -1]])
    logits = torch.full((2, 5, 5), -20.0)
    for image, relations in enumerate(annotations.relations):
        for subject, object_, _ in relations[annotations.relation_valid[image]].tolist():
            logits[image, matches[image, subject], matches[image, object_]] = 20.0
    config = small_config(**PLUS)
    assert relatedness_loss(config, logits, annotations, matches) < 1e-6
    assert relatedness_loss(config, logits.transpose(1, 2), annotations, matches) > 1


def test_gaussian_bias_falls_with_the_distance_in_sides_of_the_anchor():
    cells = torch.tensor([[[0.5, 0.5, 0.1, 0.1], [0.7, 0.5, 0.1, 0.1], [0.0, 0.0, 0.1, 0.1]]])
    anchors = TripletAnchors(
        torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), torch.tensor([[[0.7, 0.5, 0.1, 0.1]]])
    )
    bias = gaussian_bias(anchors, cells, spread=0.6)
    assert bias.shape == (1, 1, 1, 3)
    # The first two cells lie on the anchors, the third two and a half sides away on both axes.
    assert bias.flatten().tolist() == pytest.approx([0.0, 0.0, LOWEST_BIAS])
    apart = gaussian_bias(TripletAnchors(anchors.subject, anchors.subject), cells, spread=0.6)
    assert apart[0, 0, 0, 1] == pytest.approx(-1 / 0.6)


@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_masks_and_bias_combine(kind):
    bias = -torch.rand(2, 1, 3, 4)
    hidden = torch.zeros(2, 1, 1, 4, dtype=torch.bool)
    hidden[0, ..., -1] = True
    lowest = torch.finfo(torch.float32).min
    masks = {
        "none": None,
        "bool": ~hidden,
        "additive": torch.zeros(2, 1, 1, 4).masked_fill(hidden, lowest),
    }
    weights = combine_masks(bias, masks[kind]).softmax(-1)
    assert (weights[0, ..., -1] == 0).all() == (kind != "none")
    torch.testing.assert_close(weights[1], bias[1].softmax(-1))


def test_exchange_stays_within_a_query():
    exchange = TripletExchange(small_config(**PLUS)).eval()
    states = torch.randn(3, 2, 6, 32)
    changed = states.clone()
    changed[1, 0, 2] += 1
    first = torch.stack(exchange(TripletStates(*states)))
    second = torch.stack(exchange(TripletStates(*changed)))
    is_changed = (first != second).any(-1)
    # All three vectors of that query, the predicate's too, and no others.
    assert is_changed[:, 0, 2].all()
    assert is_changed.sum() == 3


def test_unified_assembling_prefers_the_entity_at_the_expected_box():
    nodes = make_nodes()
    assembling = UnifiedAssembling(small_config(**PLUS, assembling_box_scale=200.0))
    queries = torch.randn(1, 2, 5, 32)
    links = assembling(TripletStates(queries, queries, queries), (nodes.boxes[None],) * 2, nodes)
    torch.testing.assert_close(links.subject.exp().sum(-1), torch.ones(1, 2, 5))
    assert (links.object.argmax(-1) == torch.arange(5)).all()


def test_assembling_losses_equal_a_plain_computation():
    torch.manual_seed(0)
    nodes = make_nodes(images=1)
    links = torch.randn(2, 1, 3, 5).log_softmax(-1)
    right, labels = torch.tensor([[4, 0, 1]]), torch.tensor([[2, 1, 0]])
    targets = torch.rand(1, 3, 4)
    matched = torch.tensor([[[True, False, True]]]).expand(2, -1, -1)
    entities = MatchedEntities(nodes.boxes, nodes.probabilities, torch.zeros(1, 1))
    losses = role_assembling_losses(links, entities, right, (labels, targets), matched)
    for level in range(2):
        box = link = class_ = 0.0
        for relation in (0, 2):
            weights = links[level, 0, relation].exp()
            summed = sum(weight * one for weight, one in zip(weights, nodes.boxes[0], strict=True))
            box += (summed - targets[0, relation]).abs().sum()
            link -= links[level, 0, relation, right[0, relation]]
            likelihood = sum(
                weight * one[labels[0, relation]]
                for weight, one in zip(weights, nodes.probabilities[0], strict=True)
            )
            class_ -= likelihood.log()
        torch.testing.assert_close(losses["assembled_box"][level], box)
        torch.testing.assert_close(losses["correspondence"][level], link)
        torch.testing.assert_close(losses["assembled_class"][level], class_)


def test_denoising_leaks_nothing_into_the_queries(pixel_values):
    model = make_model({"num_denoising_groups": 0}, num_triplet_denoising_groups=2).train()
    labels = random_labels()
    other = [label | {"boxes": 1 - label["boxes"]} for label in labels]
    first, second = (model(pixel_values, labels=entry) for entry in (labels, other))
    torch.testing.assert_close(first.predicate_logits, second.predicate_logits)
    torch.testing.assert_close(first.subject_boxes, second.subject_boxes)
    denoising = {name for name in first.loss_dict if "denoising" in name}
    assert "loss_denoising_predicate" in denoising
    assert any(first.loss_dict[name] != second.loss_dict[name] for name in denoising)
    assert not any(
        "denoising" in name for name in make_model()(pixel_values, labels=labels).loss_dict
    )


def test_several_assignments_touch_the_earlier_levels_alone(pixel_values):
    one = make_model()(pixel_values, labels=random_labels())
    several = make_model(auxiliary_assignments=3)(pixel_values, labels=random_labels())
    for name, loss in one.loss_dict.items():
        same = torch.equal(loss, several.loss_dict[name])
        assert same == (not name.endswith("_0") or "entities" in name), name


def test_rare_predicates_are_adjusted_and_weighted():
    config = small_config(
        id2predicate={0: "a", 1: "b", 2: "c"},
        predicate_frequencies=[100, 10, 0],
        logit_adjustment=2.0,
        predicate_reweighting=0.5,
    )
    adjustment, weights = long_tail_terms(config, torch.zeros(1))
    # What was never seen counts as a tenth of the rarest that was.
    expected = 2 * torch.tensor([1.0, 0.1, 0.01]).log()
    torch.testing.assert_close(adjustment, expected)
    torch.testing.assert_close(weights, torch.tensor([0.1, 1.0, 10.0]).sqrt())


@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_calibration_moves_probabilities_and_keeps_their_order(kind):
    logits = torch.tensor([[-1.0, 0.5, 2.0]])
    plain = small_config(predicate_classification=kind)
    calibrated = small_config(
        predicate_classification=kind, score_temperature=2.0, score_offset=-1.0
    )
    before, after = (predicate_probabilities(config, logits) for config in (plain, calibrated))
    assert (after.max(-1).values < before.max(-1).values).all()
    assert torch.equal(before.argsort(), after.argsort())
    if kind == "focal":
        torch.testing.assert_close(after, (logits / 2 - 1).sigmoid())


@pytest.mark.parametrize(
    ("detector", "fields"),
    [
        ({}, {"num_predicate_queries": 4}),
        ({"num_queries": 5}, {"num_predicate_queries": 40}),
        ({}, {"id2predicate": {0: "on"}}),
        ({"query_type": "learned"}, {}),
    ],
    ids=["as many queries as relations", "more than pairs", "one predicate", "learned queries"],
)
def test_small_and_odd_sizes_run(detector, fields, pixel_values):
    model = make_model(detector, **fields).train()
    labels = random_labels(num_predicates=model.config.num_predicates)
    empty = [
        {name: tensor[:0] for name, tensor in label.items()}
        for label in random_labels(num_predicates=1)
    ]
    for entry in (labels, empty):
        loss = model(pixel_values, labels=entry).loss
        loss.backward()
        assert torch.isfinite(loss)


def test_one_query_and_one_entity_run(pixel_values):
    model = make_model({"num_queries": 1}, num_predicate_queries=1)
    with torch.no_grad():
        output = model(pixel_values)
    graphs = sgtr_hf.SgtrImageProcessor().post_process_scene_graph(output)
    assert [len(graph.relations) for graph in graphs] == [0, 0]


def test_more_relations_than_queries_name_the_field(pixel_values):
    with pytest.raises(ValueError, match="`num_predicate_queries`"):
        make_model(num_predicate_queries=1)(pixel_values, labels=random_labels())


def test_padding_of_the_batch_changes_nothing_behind_the_backbone(pixel_values):
    model = make_model()
    generator, decoder_input = model.model.predicate_node_generator, {}
    hook = generator.register_forward_pre_hook(
        lambda _, inputs: decoder_input.update(memory=inputs[0], entities=inputs[1])
    )
    with torch.no_grad():
        model(pixel_values)
        hook.remove()
        memory, entities = decoder_input["memory"], decoder_input["entities"]
        expected = generator(memory, entities)[0]
        extra = torch.randn(2, 7, 32)
        memory.padding_mask = torch.cat(
            (torch.ones(memory.features.shape[:2]), torch.zeros(2, 7)), 1
        ).bool()
        memory.features = torch.cat((memory.features, extra), 1)
        memory.position = torch.cat((memory.position.expand(2, -1, -1), extra), 1)
        cells = memory.cells.expand(2, -1, -1)
        memory.cells = torch.cat((cells, torch.rand(2, 7, 4)), 1)
        padded = generator(memory, entities)[0]
    for first, second in zip(expected.states, padded.states, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_triplet_denoising_groups": 1}, "needs `pair_queries=True`"),
        (
            {"predicate_node_generator": "spatial_aware", "dynamic_queries": False},
            "all queries would be the same",
        ),
        (
            {"graph_assembling": "unified", "legacy_triplet_matching": True},
            "`legacy_triplet_matching`",
        ),
        ({"logit_adjustment": 1.0}, "needs `predicate_frequencies`"),
        ({"predicate_frequencies": [1.0]}, "each of the 2 predicates"),
        ({"score_temperature": 0.0}, "`score_temperature` must be above 0"),
        ({"class_score_scale": 0.0}, "`class_score_scale` must be above 0"),
        ({"auxiliary_assignments": 0}, "`auxiliary_assignments` must be at least 1"),
        ({"graph_assembling": "magic"}, "graph_assembling"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_settings_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        small_config(**fields)
