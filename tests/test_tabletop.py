from importlib import resources

import datasets
import numpy as np
import pytest

from sgtr_hf.data.schema import vocabularies
from sgtr_hf.data.tabletop_relations import (
    FLOOR,
    PREDICATE_NAMES,
    CameraAxes,
    Contacts,
    PlacedObject,
    annotate,
)


CAMERA = CameraAxes(right=np.array([1.0, 0, 0]), away=np.array([0, 1.0, 0]))


def place(name, centre, half_sides=(0.5, 0.5, 0.5), *, support=FLOOR, tilt=0.0, area=100):
    half_sides = np.array(half_sides, dtype=float)
    return PlacedObject(
        name=name,
        centre=np.array(centre, dtype=float),
        half_extents=half_sides,
        half_sides=half_sides,
        rotation=np.eye(3),
        inner_half_sides=half_sides * 0.9 if name == "box" else np.zeros(3),
        support=support,
        tilt=tilt,
        pixel_area=area,
    )


def relations_of(objects, gaps=None, sideways=None):
    count = len(objects)
    contacts = Contacts(np.full((count, count), np.inf), np.zeros((count, count)))
    for (first, second), gap in (gaps or {}).items():
        contacts.gap[first, second] = contacts.gap[second, first] = gap
    for (first, second), force in (sideways or {}).items():
        contacts.sideways[first, second] = contacts.sideways[second, first] = force
    return [
        (subject, PREDICATE_NAMES[predicate], object_)
        for subject, object_, predicate in annotate(objects, contacts, CAMERA)
    ]


TABLE = place("table", (0, 0, 1), (2, 1.5, 1))


def test_a_thing_on_a_table():
    assert relations_of([TABLE, place("mug", (0, 0, 2.5), support=0)]) == [(1, "on", 0)]


def test_a_narrow_carrier_supports():
    objects = [place("can", (0, 0, 0.5), (0.3, 0.3, 0.5)), place("book", (0, 0, 1.1), support=0)]
    assert relations_of(objects) == [(0, "supporting", 1)]


def test_a_thing_under_a_table():
    assert relations_of([TABLE, place("ball", (0, 0, 0.3), (0.3, 0.3, 0.3))]) == [(1, "under", 0)]


def test_a_table_over_a_box_is_not_inside_it():
    objects = [TABLE, place("box", (0, 0, 0.5), (0.6, 0.6, 0.5))]
    assert relations_of(objects) == [(1, "under", 0)]


def test_nothing_that_touches_a_table_carries_it():
    objects = [place("table", (0, 0, 1), (2, 1.5, 1), support=1), place("book", (2.5, 0, 0.1))]
    assert relations_of(objects) == []


def test_a_thing_inside_a_box_is_not_on_it():
    objects = [place("box", (0, 0, 0.5), (1, 1, 0.5)), place("duck", (0, 0, 0.4), support=0)]
    assert relations_of(objects) == [(1, "inside", 0)]


def test_a_tilted_thing_leans_on_what_pushes_sideways():
    objects = [place("box", (0, 0, 0.5)), place("book", (1, 0, 0.5), tilt=30.0)]
    assert relations_of(objects, sideways={(0, 1): 2.0}) == [(1, "leaning on", 0)]
    upright = [objects[0], place("book", (1, 0, 0.5))]
    assert relations_of(upright, sideways={(0, 1): 2.0}) == []


@pytest.mark.parametrize(
    ("offset", "gap", "predicate"),
    [
        ((-1, 0.2), 0.5, "left of"),
        ((1, 0.2), 0.5, "right of"),
        ((0.2, -1), 0.5, "in front of"),
        ((0.2, 1), 0.5, "behind"),
        ((1, 0.2), 0.1, "next to"),
    ],
)
def test_the_smaller_looking_neighbour_is_told(offset, gap, predicate):
    objects = [place("mug", (0, 0, 0.5), area=900), place("ball", (*offset, 0.5), area=100)]
    assert relations_of(objects, {(0, 1): gap}) == [(1, predicate, 0)]
    # The order of the list decides nothing.
    assert relations_of(objects[::-1], {(0, 1): gap}) == [(0, predicate, 1)]


def test_far_things_and_other_grounds_are_not_related():
    objects = [TABLE, place("mug", (0, 0, 2.5), support=0), place("ball", (3, 0, 0.5))]
    assert relations_of(objects, {(1, 2): 0.5}) == [(1, "on", 0)]
    assert relations_of([place("mug", (0, 0, 0.5)), place("ball", (5, 0, 0.5))]) == []


def test_a_pair_has_one_relation():
    objects = [TABLE, place("mug", (0, 0, 2.5), support=0), place("can", (1, 0, 2.5), support=0)]
    found = relations_of(objects, {(1, 2): 0.05, (0, 1): 0.0, (0, 2): 0.0})
    pairs = [frozenset((subject, object_)) for subject, _, object_ in found]
    assert len(pairs) == len(set(pairs)) == 3


def test_the_sample_is_a_data_set():
    folder = resources.files("sgtr_hf") / "assets" / "tabletop_sample"
    sample = datasets.load_dataset(str(folder))
    assert set(sample) == {"train", "validation", "test"}
    entities, predicates = vocabularies(sample["train"].features)
    assert len(entities) == 12
    assert tuple(predicates.values()) == PREDICATE_NAMES
    for record in sample["train"]:
        assert record["image"].size == (record["width"], record["height"])
        for relation in record["relations"]:
            assert relation["subject"] != relation["object"]
            assert max(relation["subject"], relation["object"]) < len(record["objects"])
        for entity in record["objects"]:
            x1, y1, x2, y2 = entity["bbox"]
            assert 0 <= x1 < x2 <= record["width"]
            assert 0 <= y1 < y2 <= record["height"]


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    pytest.importorskip("pybullet")
    from sgtr_hf.data.tabletop_writer import make_tabletop

    counts = {"images": 6, "validation_images": 1, "test_images": 1, "image_size": 96}
    make_tabletop(tmp_path / "one", workers=1, seed=3, **counts)
    make_tabletop(tmp_path / "two", workers=2, seed=3, **counts)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with pytest.raises(ValueError, match="empty folder"):
        make_tabletop(tmp_path / "one", images=1)
    with pytest.raises(ValueError, match="images"):
        make_tabletop(tmp_path / "three", images=0)
    with pytest.raises(ValueError, match="`seed` must be 0 or more, got -1"):
        make_tabletop(tmp_path / "three", images=1, seed=-1)
    assert not (tmp_path / "three").exists()
    with pytest.raises(ValueError, match="is a file"):
        make_tabletop(tmp_path / "one" / "README.md", images=1)
    card = (tmp_path / "one" / "README.md").read_text()
    for option in ("--images 6", "--validation-images 1", "--test-images 1", "--image-size 96"):
        assert option in card
