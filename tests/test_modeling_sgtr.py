import re

import numpy as np
import pytest
import torch

from conftest import random_labels, small_config
from sgtr_hf import SgtrDetrForObjectDetection, SgtrForSceneGraphGeneration
from sgtr_hf.losses import hungarian_matching
from sgtr_hf.modeling.graph_assembling import assembling_scores


PLUS = {
    "predicate_node_generator": "spatial_aware",
    "graph_assembling": "unified",
    "pair_queries": True,
}
VARIANTS = {
    "default": ({}, {}),
    "joint with denoising and selection": (
        {"num_denoising_groups": 2, "select_queries": True, "num_queries": 7},
        {},
    ),
    "frozen detector": ({}, {"freeze_detector": True}),
    "softmax everywhere": (
        {"classification": "softmax", "query_type": "learned"},
        {"predicate_classification": "softmax"},
    ),
    "as released": (
        {"classification": "softmax", "query_type": "learned", "legacy_box_offset": 1e-3},
        {
            "entity_box_embedding": False,
            "legacy_pixel_distance": True,
            "legacy_triplet_matching": True,
            "legacy_conflict_row": True,
            "legacy_softmax_cost": True,
            "legacy_focal_normalization": True,
            "legacy_unweighted_auxiliary_predicates": True,
        },
    ),
    "static queries, last level only": ({}, {"dynamic_queries": False, "auxiliary_loss": False}),
    "pairs": ({}, {"pair_queries": True}),
    "unified": ({}, {"graph_assembling": "unified"}),
    "spatial-aware": ({}, {"predicate_node_generator": "spatial_aware"}),
    "SGTR+": ({}, PLUS),
    "SGTR+ with all that trains it": (
        {"num_denoising_groups": 2, "select_queries": True, "num_queries": 7},
        PLUS
        | {
            "num_triplet_denoising_groups": 2,
            "auxiliary_assignments": 2,
            "entity_class_embedding": True,
            "predicate_frequencies": [9, 1],
            "logit_adjustment": 0.5,
            "predicate_reweighting": 0.5,
        },
    ),
    "SGTR+ on softmax heads, frozen": (
        {"classification": "softmax", "query_type": "learned"},
        PLUS
        | {
            "predicate_classification": "softmax",
            "freeze_detector": True,
            "triplet_exchange": False,
            "gaussian_attention": False,
        },
    ),
}


# Content that starts at zero leaves the first self-attention nothing to project.
WITHOUT_GRADIENT = {
    "model.detector.model.decoder.layers.0.self_attention.value_projection.weight",
    *(
        f"model.predicate_node_generator.decoder.{role}_layers.0.self_attention_norm.weight"
        for role in ("predicate", "subject", "object")
    ),
}


def make_model(detector=None, **fields):
    torch.manual_seed(0)
    return SgtrForSceneGraphGeneration(small_config(detector, **fields)).eval()


@pytest.mark.parametrize(("detector", "fields"), VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_trains(detector, fields, pixel_values):
    model = make_model(detector, **fields).train()
    with torch.no_grad():
        # Layers that start at zero hold gradients back in the first step.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    output = model(pixel_values, labels=random_labels())
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert output.loss.item() == pytest.approx(
        sum(value.item() for value in output.loss_dict.values()), rel=1e-5
    )
    silent = {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    }
    assert silent <= WITHOUT_GRADIENT


@pytest.mark.parametrize(("detector", "fields"), VARIANTS.values(), ids=VARIANTS.keys())
def test_runs_without_annotations(detector, fields, pixel_values):
    model = make_model(detector, **fields)
    with torch.no_grad():
        output = model(pixel_values)
        single = model(pixel_values[1:])
    num_entities = model.config.detector_config.num_queries
    assert output.subject_scores.shape == (2, 12, num_entities)
    assert output.predicate_probabilities.shape == (2, 12, 2)
    assert output.entity_probabilities.shape == (2, num_entities, 3)
    assert output.loss is None
    for name in ("predicate_logits", "subject_boxes", "object_scores"):
        torch.testing.assert_close(output[name][1:], single[name], rtol=0, atol=1e-5)


def test_a_frozen_detector_neither_trains_nor_drops(pixel_values):
    model = make_model({"dropout": 0.5}, freeze_detector=True).train()
    assert not model.model.detector.training
    output = model(pixel_values, labels=random_labels())
    output.loss.backward()
    assert all(p.grad is None for p in model.model.detector.parameters())
    assert not any("entities" in name for name in output.loss_dict)


def test_an_unfrozen_detector_trains_too(pixel_values):
    model = make_model().train()
    output = model(pixel_values, labels=random_labels())
    output.loss.backward()
    assert model.model.detector.class_head.weight.grad.abs().sum() > 0
    assert any("entities" in name for name in output.loss_dict)


def test_saved_weights_come_back(tmp_path, pixel_values):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = SgtrForSceneGraphGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, found = model(pixel_values), loaded(pixel_values)
    torch.testing.assert_close(found.predicate_logits, expected.predicate_logits)
    assert loaded.config.id2predicate == {0: "on", 1: "inside"}
    assert loaded.config.id2label == loaded.config.detector_config.id2label


def test_attention_backends_agree(pixel_values):
    model = make_model()
    with torch.no_grad():
        fused = model(pixel_values).predicate_logits
        model.set_attn_implementation({"": "eager", "detector_config": "eager"})
        written_out = model(pixel_values).predicate_logits
    torch.testing.assert_close(fused, written_out, rtol=1e-4, atol=1e-5)


def test_a_relation_to_a_missing_entity_is_an_error(pixel_values):
    labels = random_labels()
    labels[0]["relations"][0, 1] = 9
    with pytest.raises(ValueError, match="relations"):
        make_model()(pixel_values, labels=labels)


def test_more_relations_than_queries_is_an_error(pixel_values):
    with pytest.raises(ValueError, match="num_predicate_queries"):
        make_model(num_predicate_queries=1)(pixel_values, labels=random_labels())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id2predicate", {0: "on", 2: "in"}),
        ("num_predicate_queries", 0),
        ("predicate_cost_weight", -0.5),
        ("dropout", 2),
        ("freeze_detector", "yes"),
    ],
)
def test_wrong_fields_name_themselves(field, value):
    with pytest.raises(Exception, match=field):
        small_config(**{field: value})


def test_assembling_finds_the_entity_that_the_indicator_describes():
    config = small_config()
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.2, 0.7, 0.2, 0.2]]])
    probabilities = torch.eye(3)[None] * 0.9
    wanted = torch.tensor([2, 0])
    indicator = (boxes[:, wanted, :2], probabilities[:, wanted], boxes[:, wanted])
    sizes = torch.tensor([[480, 640]])
    scores = assembling_scores(config, indicator, (probabilities, boxes), sizes)
    assert scores.argmax(-1)[0].tolist() == wanted.tolist()
    # One entity at the very place, with the very class: confidence alone is left.
    assert scores[0, 0, 2].item() == pytest.approx(0.9**config.assembling_exponent, rel=1e-5)


def test_queries_have_no_order(pixel_values):
    model = make_model(num_predicate_queries=6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    with torch.no_grad():
        before = model(pixel_values)
        generator = model.model.predicate_node_generator
        for role in ("predicate", "subject", "object"):
            embedding = getattr(generator, f"{role}_query_embedding")
            embedding.weight.copy_(embedding.weight[order])
        after = model(pixel_values)
    for name in ("predicate_logits", "subject_boxes", "object_logits", "subject_scores"):
        torch.testing.assert_close(after[name], before[name][:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({"pixel_values": torch.zeros(3, 64, 64)}, ValueError, "(batch, 3, height, width)"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"pixel_values": np.zeros((1, 3, 64, 64))}, TypeError, "float64"),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "pixel_mask": torch.ones(1, 32, 64)},
            ValueError,
            "(1, 64, 64)",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 64, 64), "labels": {"boxes": torch.zeros(1, 4)}},
            TypeError,
            "one dict an image",
        ),
    ],
)
def test_inputs_of_another_kind_are_refused(inputs, error, words):
    model = SgtrForSceneGraphGeneration(small_config())
    with pytest.raises(error, match=re.escape(words)):
        model(**inputs)


def test_a_new_vocabulary_reaches_the_detector(tmp_path):
    SgtrForSceneGraphGeneration(small_config()).save_pretrained(tmp_path)
    model = SgtrForSceneGraphGeneration.from_pretrained(
        tmp_path, id2label={0: "cat", 1: "dog"}, ignore_mismatched_sizes=True
    )
    for config in (model.config, model.config.detector):
        assert config.id2label == {0: "cat", 1: "dog"}
        assert config.label2id == {"cat": 0, "dog": 1}
    outputs = model(torch.zeros(1, 3, 64, 64))
    assert outputs.logits.shape[-1] == outputs.subject_logits.shape[-1] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_that_trains_sgtr_plus_works_in_half_precision(pixel_values, dtype):
    config = small_config({"num_denoising_groups": 2}, **PLUS, num_triplet_denoising_groups=2)
    model = SgtrForSceneGraphGeneration(config).train().to(dtype)
    assert torch.isfinite(model(pixel_values.to(dtype), labels=random_labels()).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fields", [{}, PLUS], ids=["rule-based", "unified"])
def test_padding_of_given_entities_is_never_linked_nor_nan(fields, dtype):
    model = SgtrForSceneGraphGeneration(small_config(**fields)).eval().to(dtype)
    boxes = torch.rand(4, 4) * 0.3 + 0.2
    given = [boxes, boxes[:0], boxes[:2]]
    with torch.no_grad():
        outputs = model(torch.rand(3, 3, 64, 64, dtype=dtype), entity_boxes=given)
    for scores in (outputs.subject_scores, outputs.object_scores):
        assert not scores.isnan().any()
        assert (scores[1] == 0).all()
        assert (scores[2, :, 2:] == 0).all()
    assert outputs.given_entities.sum(1).tolist() == [4, 0, 2]


def test_levels_without_a_loss_are_not_matched(pixel_values, monkeypatch):
    solved = []
    original = hungarian_matching.solve
    monkeypatch.setattr(
        hungarian_matching, "solve", lambda costs: solved.append(costs) or original(costs)
    )
    counts = []
    for auxiliary in (True, False):
        config = small_config({"auxiliary_loss": auxiliary}).detector
        SgtrDetrForObjectDetection(config).train()(pixel_values, labels=random_labels())
        counts.append(len(solved))
        solved.clear()
    assert counts == [4, 2]


def test_more_queries_a_relation_need_pairs_for_them(pixel_values):
    config = small_config(
        {"num_queries": 4}, **PLUS, num_predicate_queries=40, auxiliary_assignments=9
    )
    model = SgtrForSceneGraphGeneration(config).train()
    assert torch.isfinite(model(pixel_values, labels=random_labels()).loss)


def test_legacy_matching_refuses_more_relations_than_it_has_triplets(pixel_values):
    config = small_config(
        {"classification": "softmax", "query_type": "learned"}, legacy_triplet_matching=True,
        num_predicate_queries=1, training_assembling_top_k=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="`training_assembling_top_k`"):
        SgtrForSceneGraphGeneration(config).train()(pixel_values, labels=random_labels())
