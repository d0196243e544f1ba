"""Values that no model can have are refused when a configuration is made, by name."""

import dataclasses
import math
import re

import pytest
from huggingface_hub.errors import StrictDataclassError

import sgtr_hf
from conftest import small_backbone, small_config, small_detector_config
from sgtr_hf import DinoVitConfig, SgtrConfig, SgtrDetrConfig


KINDS = (SgtrDetrConfig, SgtrConfig, DinoVitConfig)
REFUSED = (ValueError, TypeError, StrictDataclassError)
# The only numbers that may be negative: what is added to a score, and two strengths that push the
# other way below 0.
SIGNED = {
    "score_offset",
    "class_score_rivalry",
    "class_score_offset",
    "logit_adjustment",
    "predicate_reweighting",
}
# 0 would divide by zero, or leave no distribution.
POSITIVE = [
    (SgtrDetrConfig, "layer_norm_eps"),
    (SgtrDetrConfig, "position_temperature"),
    (SgtrConfig, "layer_norm_eps"),
    (SgtrConfig, "gaussian_spread"),
    (SgtrConfig, "score_temperature"),
    (SgtrConfig, "class_score_scale"),
    (SgtrConfig, "matching_base"),
    (DinoVitConfig, "layer_norm_eps"),
    (DinoVitConfig, "student_temperature"),
]
# All fields of all configurations that take a float, or a list of them.
FLOAT_FIELDS = [
    (kind, field.name)
    for kind in KINDS
    for field in dataclasses.fields(kind)
    if "float" in str(field.type)
]


def ids(value):
    return getattr(value, "__name__", str(value))


def make(kind, name, value):
    """Make a configuration with one field, and whatever that field needs besides."""
    fields = {name: value}
    if name == "predicate_frequencies":
        fields = {name: [value, 1.0]}
    elif name in ("logit_adjustment", "predicate_reweighting"):
        fields["predicate_frequencies"] = [2.0, 1.0]
    return kind(**fields)


def test_the_float_fields_are_found():
    assert len(FLOAT_FIELDS) > 60
    assert {kind for kind, _ in FLOAT_FIELDS} == set(KINDS)
    names = {name for _, name in FLOAT_FIELDS}
    assert {"predicate_frequencies", "layer_norm_eps", "dropout", "focal_gamma"} <= names


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39], ids=str)
@pytest.mark.parametrize(("kind", "name"), FLOAT_FIELDS, ids=ids)
def test_every_number_must_be_finite(kind, name, value):
    with pytest.raises(REFUSED, match=rf"`{name}` must .*got \[?{re.escape(str(value))}"):
        make(kind, name, value)


@pytest.mark.parametrize(("kind", "name"), FLOAT_FIELDS, ids=ids)
def test_only_offsets_and_strengths_may_be_negative(kind, name):
    if name in SIGNED:
        assert getattr(make(kind, name, -1.0), name) == -1
        return
    for value in (-1.0, -0.5):
        with pytest.raises(REFUSED, match=rf"`{name}` must .*got \[?{value}"):
            make(kind, name, value)


@pytest.mark.parametrize(("kind", "name"), FLOAT_FIELDS, ids=ids)
def test_zero_is_refused_where_it_has_no_meaning(kind, name):
    if (kind, name) in POSITIVE:
        with pytest.raises(REFUSED, match=rf"`{name}` must .*got 0\.0"):
            make(kind, name, 0.0)
    else:
        make(kind, name, 0.0)


def test_the_base_of_the_costs_must_not_turn_them_round():
    assert SgtrConfig(matching_base=1).matching_base == 1
    with pytest.raises(REFUSED, match=r"`matching_base` must be at least 1, got 0\.5"):
        SgtrConfig(matching_base=0.5)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_an_unknown_activation_is_refused(kind):
    with pytest.raises(REFUSED, match=r"`activation_function` must be one of .*gelu.*got 'zzz'"):
        kind(activation_function="zzz")
    assert kind(activation_function="silu").activation_function == "silu"


def test_heads_must_divide_the_width_of_the_detector():
    with pytest.raises(REFUSED, match=r"`num_attention_heads` must be .*`d_model` \(32\), got 7"):
        small_config(num_attention_heads=7)


NAMES = [{}, {0: "a", 5: "b"}, {1: "a"}, {"x": "a"}, {-1: "a", 0: "b"}, {"0": "a", "00": "b"}]


@pytest.mark.parametrize("names", [*NAMES, ["a", "b"], "ab"], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_class_names_must_count_from_0(kind, names):
    with pytest.raises(REFUSED, match="`id2label` must be a dictionary of at least one name"):
        kind(id2label=names)


@pytest.mark.parametrize("names", NAMES, ids=str)
def test_predicate_names_must_count_from_0(names):
    with pytest.raises(REFUSED, match="`id2predicate` must be a dictionary of at least one name"):
        SgtrConfig(id2predicate=names)


def test_predicates_must_differ_but_classes_may_repeat():
    with pytest.raises(REFUSED, match=r"`id2predicate` must be without names that repeat.*'on'"):
        SgtrConfig(id2predicate={0: "on", 1: "in", 2: "on"})
    for kind in KINDS:
        assert kind(id2label={0: "N/A", 1: "cup", 2: "N/A"}).num_labels == 3


@pytest.mark.parametrize("count", ["x", 3.0, True, 0, -1, math.nan], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_the_number_of_classes_must_be_a_number(kind, count):
    with pytest.raises(REFUSED, match=f"`num_labels` must be an integer .*got {count!r}"):
        kind(num_labels=count)


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_names_are_made_up_and_numbers_may_be_strings(kind):
    assert kind().num_labels == 2
    assert list(kind(num_labels=3).id2label) == [0, 1, 2]
    # As a file has them, in any order.
    assert kind(id2label={"1": "b", "0": "a"}).id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    "given", [DinoVitConfig(), {"model_type": "dino_vit"}], ids=["made", "dict"]
)
def test_only_a_detector_is_a_detector(given):
    with pytest.raises(REFUSED, match=r"`detector_config` must be .*sgtr_detr.*got 'dino_vit'"):
        SgtrConfig(detector_config=given)


@pytest.mark.parametrize(
    "fields", [{"model_type": "nope"}, {"model_type": ["resnet"]}, {}], ids=str
)
def test_an_unknown_backbone_is_refused(fields):
    expected = rf"`backbone_config` must be .*resnet.*got {re.escape(str(fields))}"
    with pytest.raises(REFUSED, match=expected):
        SgtrDetrConfig(backbone_config=fields)


def test_known_backbones_are_accepted():
    backbone = small_backbone()
    made = SgtrDetrConfig(backbone_config=backbone.to_dict()).backbone_config
    assert type(made) is type(backbone)
    ours = SgtrDetrConfig(backbone_config={"model_type": "dino_vit"}).backbone_config
    assert isinstance(ours, DinoVitConfig)


@pytest.mark.parametrize("make_one", [small_detector_config, small_config], ids=ids)
def test_what_was_changed_since_is_checked_when_saved(tmp_path, make_one):
    config = make_one()
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path).to_dict() == config.to_dict()
    config.focal_gamma = math.nan
    with pytest.raises(REFUSED, match="`focal_gamma` must be finite"):
        config.save_pretrained(tmp_path)


def test_a_checkpoint_loads_with_other_classes(tmp_path):
    sgtr_hf.SgtrDetrForObjectDetection(small_detector_config()).save_pretrained(tmp_path)
    other = {"id2label": {0: "a", 1: "b"}, "ignore_mismatched_sizes": True}
    model = sgtr_hf.SgtrDetrForObjectDetection.from_pretrained(tmp_path, **other)
    assert model.config.num_labels == 2
    model.save_pretrained(tmp_path)
    assert SgtrDetrConfig.from_pretrained(tmp_path).id2label == other["id2label"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SgtrDetrConfig, "num_querys"),
        (SgtrConfig, "num_predicate_querys"),
        (DinoVitConfig, "patchsize"),
    ],
)
def test_a_misspelt_field_is_told(kind, name):
    with pytest.warns(UserWarning, match=f"no field `{name}`; did you mean"):
        kind(**{name: 3})
    # What transformers, or a file of another version, brings along.
    kind(some_other_entry=3, name_or_path="x")


def test_a_head_of_anchor_queries_has_an_even_width():
    with pytest.raises((ValueError, StrictDataclassError), match="even share of `d_model`"):
        SgtrDetrConfig(d_model=12, num_attention_heads=4, query_type="anchors")
