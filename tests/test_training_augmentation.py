import numpy as np
import pytest
from PIL import Image

from sgtr_hf.data.training_augmentation import Annotation, Augmentation, augment, crop, flip
from sgtr_hf.data.training_dataset import check_record
from tiny_training_run import ENTITIES, PREDICATES, squares_record


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def annotation():
    boxes = np.array([[0, 0, 4, 4], [10, 5, 20, 15], [18, 0, 30, 10]], dtype=np.float64)
    relations = np.array([[0, 1, 0], [1, 2, 1], [2, 1, 2], [2, 0, 0]])
    return Annotation(boxes, np.array([2, 0, 1]), relations)


def test_flipping_twice_is_the_identity(picture, annotation):
    swaps = {0: 1, 1: 0}
    once = flip(picture, annotation, swaps)
    assert once[1].relations[:, 2].tolist() == [1, 0, 2, 1]
    again, restored = flip(*once, swaps)
    assert np.array_equal(np.asarray(again), np.asarray(picture))
    assert np.array_equal(restored.boxes, annotation.boxes)
    assert np.array_equal(restored.relations, annotation.relations)


def test_a_box_shows_the_same_pixels_after_flip_and_crop(picture, annotation):
    x1, y1, x2, y2 = annotation.boxes[1].astype(int)
    pixels = np.asarray(picture)[y1:y2, x1:x2]
    flipped, changed = flip(picture, annotation, {})
    left, top, right, bottom = changed.boxes[1].astype(int)
    assert np.array_equal(np.asarray(flipped)[top:bottom, left:right][:, ::-1], pixels)
    cropped, changed = crop(picture, annotation, (8, 3, 25, 18), 0.3)
    left, top, right, bottom = changed.boxes[0].astype(int)
    assert np.array_equal(np.asarray(cropped)[top:bottom, left:right], pixels)


def test_a_crop_drops_hidden_entities_and_renumbers_relations(picture, annotation):
    # The first entity is outside; of the third 7 x 7 of 12 x 10 pixels stay: 41 %.
    cropped, changed = crop(picture, annotation, (8, 3, 25, 18), least_visible=0.4)
    assert cropped.size == (17, 15)
    assert changed.boxes.tolist() == [[2, 2, 12, 12], [10, 0, 17, 7]]
    assert changed.labels.tolist() == [0, 1]
    assert changed.relations.tolist() == [[0, 1, 1], [1, 0, 2]]
    _, changed = crop(picture, annotation, (8, 3, 25, 18), least_visible=0.5)
    assert changed.labels.tolist() == [0]
    assert changed.relations.shape == (0, 3)


def test_random_crops_always_show_something(picture, annotation):
    generator = np.random.default_rng(0)
    sizes = set()
    for _ in range(50):
        image, changed = augment(picture, annotation, Augmentation(least_crop=0.1), generator)
        sizes.add(image.size)
        assert len(changed.labels)
        assert (changed.boxes >= 0).all()
        assert (changed.boxes[:, 2:] <= image.size).all()
        assert (changed.boxes[:, 2:] > changed.boxes[:, :2]).all()
    assert len(sizes) > 10


def test_images_without_annotation_can_be_augmented(picture):
    empty = Annotation(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros((0, 3), np.int64))
    every = Augmentation(flip_probability=1.0, brightness=0.5, least_crop=0.5)
    image, changed = augment(picture, empty, every, np.random.default_rng(0))
    assert image.size == picture.size
    assert changed.boxes.shape == (0, 4)
    assert changed.relations.shape == (0, 3)


def test_light_changes_pixels_and_nothing_else(picture, annotation):
    image, changed = augment(
        picture, annotation, Augmentation(brightness=0.5), np.random.default_rng(0)
    )
    assert not np.array_equal(np.asarray(image), np.asarray(picture))
    assert changed is annotation


@pytest.mark.parametrize(
    "box",
    [[5, 5, 5, 9], [9, 5, 5, 9], [70, 5, 90, 9], [-9, 5, -2, 9], [5, 5, float("nan"), 9]],
    ids=["flat", "reversed", "beside", "before", "nan"],
)
def test_boxes_without_area_in_the_image_are_errors(box):
    record = squares_record(3)
    record["objects"][1]["bbox"] = box
    with pytest.raises(ValueError, match=r"squares-3: `objects\.bbox`.*64 x 64"):
        check_record(record, len(ENTITIES), len(PREDICATES))
