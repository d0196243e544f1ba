import datasets
import numpy as np
import pytest

from sgtr_hf.data.resampling import (
    Resampling,
    ResamplingSettings,
    drop_probabilities,
    predicates_of,
    repeat_factors,
)
from sgtr_hf.data.schema import scene_graph_features
from sgtr_hf.data.training_augmentation import Augmentation
from sgtr_hf.data.training_dataset import SceneGraphDataset
from tiny_training_run import ENTITIES, PREDICATES, squares_record


def images(*predicates):
    return [np.array(row, dtype=np.int64) for row in predicates]


def test_factors_are_those_computed_by_hand():
    # Of 100 relations 64, 32 and 4 have the predicates; sqrt(0.36 / 0.04) = 3.
    factors = repeat_factors(np.array([64, 32, 4, 0]), 0.36)
    np.testing.assert_allclose(factors, [1, np.sqrt(0.36 / 0.32), 3, 1])
    np.testing.assert_allclose(repeat_factors(np.array([64, 32, 4, 0]), 0.01), 1)
    np.testing.assert_allclose(repeat_factors(np.zeros(2, dtype=np.int64), 0.5), 1)


def test_an_image_comes_as_often_as_its_rarest_predicate_asks():
    # Shares 8/16, 7/16, 1/16; threshold 1/4: only the last is rare, with factor 2.
    predicates = images([0] * 8 + [1] * 5, [1, 2], [1], [])
    resampling = Resampling(predicates, 3, ResamplingSettings(0.25))
    np.testing.assert_allclose(resampling.predicate_factors, [1, 1, 2])
    np.testing.assert_allclose(resampling.image_factors, [1, 2, 1, 1])
    assert resampling.num_rows == 5
    for epoch in range(5):
        assert resampling.rows(epoch).tolist() == [0, 1, 1, 2, 3]


def test_broken_factors_are_right_on_average_and_rounded_in_each_epoch():
    # Shares 8/10, 1/10, 1/10; threshold 0.225: factors 1, 1.5, 1.5.
    predicates = images([0] * 4, [0] * 4, [1], [2])
    resampling = Resampling(predicates, 3, ResamplingSettings(0.225))
    np.testing.assert_allclose(resampling.image_factors, [1, 1, 1.5, 1.5])
    assert resampling.num_rows == 5
    counts = np.array([np.bincount(resampling.rows(epoch), minlength=4) for epoch in range(2000)])
    assert (counts.sum(axis=1) == 5).all()
    assert (counts[:, :2] == 1).all()
    assert set(np.unique(counts[:, 2:])) == {1, 2}
    np.testing.assert_allclose(counts.mean(axis=0), [1, 1, 1.5, 1.5], atol=0.05)


def test_epochs_have_one_length_whatever_the_sum():
    generator = np.random.default_rng(0)
    predicates = [generator.zipf(1.6, size=generator.integers(0, 6)) % 30 for _ in range(500)]
    resampling = Resampling(predicates, 30, ResamplingSettings(0.1))
    assert resampling.num_rows == round(resampling.image_factors.sum())
    rounded = np.floor(resampling.image_factors)
    for epoch in range(20):
        rows = resampling.rows(epoch)
        assert len(rows) == resampling.num_rows
        counts = np.bincount(rows, minlength=500)
        # The sum is a whole number only after all factors are stretched a little.
        assert (np.abs(counts - resampling.image_factors) < 1.01).all()
        assert (counts >= rounded - 1).all()


def test_rows_depend_on_seed_and_epoch_alone():
    predicates = images([0] * 4, [0] * 4, [1], [2])
    rows = [
        [Resampling(predicates, 3, ResamplingSettings(0.225), seed).rows(epoch).tolist()
         for epoch in range(8)]
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert rows[0] == rows[1] != rows[2]
    assert len({tuple(row) for row in rows[0]}) > 1


def test_relations_are_left_out_as_computed_by_hand():
    # In an image that comes three times: a frequent predicate, a rarer one, the rarest.
    factors = np.array([1, 2, 3], dtype=np.float64)
    np.testing.assert_allclose(drop_probabilities(factors, 3.0, 1.0), [2 / 3, 1 / 3, 0])
    np.testing.assert_allclose(drop_probabilities(factors, 3.0, 1.5), [1, 1 / 2, 0])
    np.testing.assert_allclose(drop_probabilities(factors, 3.0, 0.0), 0)
    np.testing.assert_allclose(drop_probabilities(np.ones(1), 1.0, 1.5), 0)


@pytest.mark.parametrize(("field", "value"), [("threshold", 1.5), ("drop_rate", -1.0)])
def test_settings_out_of_range(field, value):
    fields = {"threshold": 0.1} | {field: value}
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        ResamplingSettings(**fields)


@pytest.fixture
def split():
    """Twelve images with "left of"; the last one has "above" as well, once in thirteen."""
    records = [squares_record(index) for index in range(12)]
    records[-1]["relations"].append({"subject": 1, "object": 0, "predicate": 2})
    features = scene_graph_features(ENTITIES, PREDICATES)
    return datasets.Dataset.from_list(records, features=features)


def test_predicates_come_from_any_rows(split):
    expected = [[0]] * 11 + [[0, 2]]
    assert [row.tolist() for row in predicates_of(split)] == expected
    some = split.select([11, 3])
    assert [row.tolist() for row in predicates_of(some)] == [[0, 2], [0]]
    assert predicates_of(split.select([])) == []


def test_a_data_set_shows_images_and_relations_as_resampled(split):
    # sqrt(4/13 / (1/13)) = 2 for "above"; "left of" goes with (1 - 1/2) * 1.
    dataset = SceneGraphDataset(split, None, 3, ResamplingSettings(4 / 13, 1.0))
    assert len(dataset) == dataset.num_images == 13
    seen = []
    for epoch in range(40):
        dataset.epoch = epoch
        items = [dataset[index] for index in range(11, 13)]
        assert [item.annotation["image_id"] for item in items] == ["squares-11"] * 2
        seen += [[row[2] for row in item.annotation["relations"]] for item in items]
        assert all(item.reference.relations.tolist() == item.annotation["relations"]
                   for item in items)  # fmt: skip
    assert all(row in ([0, 2], [2]) for row in seen)
    assert 0.3 < np.mean([row == [2] for row in seen]) < 0.7
    # The split as it is annotated is what baselines count.
    assert len(dataset.references()) == 12
    again = SceneGraphDataset(split, None, 3, ResamplingSettings(4 / 13, 1.0))
    again.epoch = 39
    assert [row[2] for row in again[12].annotation["relations"]] == seen[-1]


def test_copies_of_an_image_are_augmented_apart(split):
    augmentation = Augmentation(least_crop=0.3, least_visible=0.0)
    dataset = SceneGraphDataset(split, augmentation, 0, ResamplingSettings(4 / 13))
    sizes = {dataset[index].image.size for index in (11, 12)}
    assert len(sizes) == 2
    # Where nothing is repeated, images are what they are without resampling.
    plain = SceneGraphDataset(split, augmentation, 0)
    assert dataset[3].image.tobytes() == plain[3].image.tobytes()
