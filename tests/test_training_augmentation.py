import logging

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import sgtr_hf
from sgtr_hf.data.training_augmentation import (
    Annotation,
    Augmentation,
    augment,
    crop,
    find_swaps,
    flip,
    resize,
)
from sgtr_hf.data.training_dataset import check_annotations
from tiny_training_run import ENTITIES, PREDICATES, squares_record, write_squares


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
    every = Augmentation(1.0, {}, brightness=0.5, least_crop=0.5)
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
    with pytest.raises(ValueError, match=r"squares-3: `objects\[1\]\.bbox`.*64 x 64"):
        check_annotations([record], len(ENTITIES), len(PREDICATES))


def augment_with_pil(image, annotation, augmentation, generator):
    """Mirror, crop and light once more, with Pillow and numpy alone."""
    boxes, labels, relations = annotation
    if generator.uniform() < augmentation.flip_probability:
        image = ImageOps.mirror(image)
        boxes = np.stack([image.width - boxes[:, 2], boxes[:, 1], image.width - boxes[:, 0],
                          boxes[:, 3]], axis=1)  # fmt: skip
        predicates = [augmentation.flip_swaps.get(p, p) for p in relations[:, 2].tolist()]
        relations = np.column_stack((relations[:, :2], predicates))
    share = generator.uniform(augmentation.least_crop, 1)
    width, height = (max(round(side * share), 1) for side in image.size)
    left = int(generator.integers(image.width - width + 1))
    top = int(generator.integers(image.height - height + 1))
    moved = (boxes - [left, top, left, top]).clip(0, [width, height, width, height])
    areas = [np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, moved)]
    kept = [i for i in range(len(boxes)) if areas[1][i] > 0 and areas[1][i] >= 0.3 * areas[0][i]]
    if kept:
        image = image.crop((left, top, left + width, top + height))
        boxes, labels = moved[kept], labels[kept]
        rows = [row for row in relations.tolist() if row[0] in kept and row[1] in kept]
        rows = [[kept.index(s), kept.index(o), p] for s, o, p in rows]
        relations = np.array(rows, dtype=np.int64).reshape(-1, 3)
    low, high = 1 - augmentation.brightness, 1 + augmentation.brightness
    image = ImageEnhance.Brightness(image).enhance(generator.uniform(low, high))
    return ImageEnhance.Contrast(image).enhance(generator.uniform(low, high)), (
        boxes, labels, relations,
    )  # fmt: skip


def test_torchvision_does_what_pillow_did_to_the_last_bit(picture, annotation):
    """Trained models, and cached features, depend on every number drawn in its order."""
    settings = Augmentation(0.5, {0: 1, 1: 0}, brightness=0.4, least_crop=0.4)
    for seed in range(30):
        image, changed = augment(picture, annotation, settings, np.random.default_rng(seed))
        expected, others = augment_with_pil(
            picture, annotation, settings, np.random.default_rng(seed)
        )
        assert image.tobytes() == expected.tobytes()
        for array, other in zip(changed, others, strict=True):
            assert array.dtype == other.dtype
            assert array.tobytes() == other.tobytes()


def test_a_box_at_the_right_border_gets_a_true_zero(picture, annotation):
    _, changed = flip(picture, annotation, {})
    assert changed.boxes[2, 0] == 0
    assert not np.signbit(changed.boxes[2, 0])


def test_the_resize_ladder_scales_boxes_and_keeps_the_limit(picture, annotation):
    image, changed = resize(picture, annotation, 40, 100)
    assert image.size == (60, 40)
    np.testing.assert_allclose(changed.boxes, annotation.boxes * 2)
    image, changed = resize(picture, annotation, 40, 45)
    assert image.size == (45, 30)
    np.testing.assert_allclose(changed.boxes, annotation.boxes * 1.5)
    settings = Augmentation(resize_sides=(10, 20, 30))
    sides = {
        min(augment(picture, annotation, settings, np.random.default_rng(seed))[0].size)
        for seed in range(30)
    }
    assert sides == {10, 20, 30}


def test_crops_come_with_their_probability(picture, annotation):
    settings = Augmentation(least_crop=0.5, crop_probability=0.25)
    generator = np.random.default_rng(0)
    sizes = [augment(picture, annotation, settings, generator)[0].size for _ in range(400)]
    assert 0.2 < np.mean([size != picture.size for size in sizes]) < 0.3


@pytest.mark.parametrize("field", ["saturation", "hue"])
def test_colors_change_pixels_and_nothing_else(picture, annotation, field):
    settings = Augmentation(**{field: 0.4})
    image, changed = augment(picture, annotation, settings, np.random.default_rng(0))
    assert image.tobytes() != picture.tobytes()
    assert changed is annotation
    gray = picture.convert("L").convert("RGB")
    image, _ = augment(gray, annotation, settings, np.random.default_rng(0))
    assert image.tobytes() == gray.tobytes()


def test_sizes_and_colors_are_those_of_pillow(picture, annotation):
    image, _ = resize(picture, annotation, 40, 100)
    assert image.tobytes() == picture.resize((60, 40), Image.Resampling.BILINEAR).tobytes()
    for seed in range(5):
        # The first number drawn is that of the mirror.
        _, number = np.random.default_rng(seed).uniform(size=2)
        settings = Augmentation(saturation=0.4)
        image, _ = augment(picture, annotation, settings, np.random.default_rng(seed))
        expected = ImageEnhance.Color(picture).enhance(0.6 + 0.8 * number)
        assert image.tobytes() == expected.tobytes()
        settings = Augmentation(hue=0.4)
        image, _ = augment(picture, annotation, settings, np.random.default_rng(seed))
        hue, *others = (np.asarray(band) for band in picture.convert("HSV").split())
        # The circle has 256 steps, of which torchvision takes 255 for a whole turn.
        turned = ((hue.astype(int) + int((0.8 * number - 0.4) * 255)) % 256).astype(np.uint8)
        bands = [Image.fromarray(band) for band in (turned, *others)]
        assert image.tobytes() == Image.merge("HSV", bands).convert("RGB").tobytes()


def test_left_and_right_are_found_by_name(caplog):
    names = ["on", "to the left of", "Right of", "left of", "to the right of", "left hand in",
             "bright", "right_of", "left_of"]  # fmt: skip
    with caplog.at_level(logging.INFO):
        swaps = find_swaps(dict(enumerate(names)))
    assert swaps == {1: 4, 4: 1, 2: 3, 3: 2, 7: 8, 8: 7}
    assert (
        "swaps the predicates to the left of / to the right of, Right of / left of" in caplog.text
    )
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no counterparts of the predicates left hand in" in warning.getMessage()
    caplog.clear()
    assert find_swaps({0: "on", 1: "wearing"}) == {}
    assert not caplog.records


def test_a_mirror_needs_to_know_what_changes_places(picture, annotation):
    unknown = Augmentation(flip_probability=1.0)
    with pytest.raises(ValueError, match=r"`flip_swaps` must be known.*for_predicates"):
        augment(picture, annotation, unknown, np.random.default_rng(0))
    known = unknown.for_predicates({0: "right of", 1: "on", 2: "left of"})
    assert known.flip_swaps == {0: 2, 2: 0}
    _, changed = augment(picture, annotation, known, np.random.default_rng(0))
    assert changed.relations[:, 2].tolist() == [2, 1, 0, 2]
    # What the caller says stays, and who does not mirror asks for nothing.
    told = Augmentation(1.0, {0: 1, 1: 0})
    assert told.for_predicates({0: "right of", 1: "left of"}) is told
    still = Augmentation(brightness=0.5)
    assert still.for_predicates({0: "right of", 1: "left of"}) is still


@pytest.mark.parametrize("streaming", [False, True], ids=["rows", "streamed"])
def test_loading_in_a_line_swaps_and_says_so(tmp_path, streaming, caplog):
    """Nobody who only asks for a mirror gets wrong directions."""
    data = write_squares(tmp_path)
    with caplog.at_level(logging.INFO):
        images = sgtr_hf.data.load(
            data, streaming=streaming, augmentation=Augmentation(flip_probability=1.0)
        )
    assert "swaps the predicates left of / right of" in caplog.text
    plain = sgtr_hf.data.load(data, streaming=streaming)
    for image, other in zip(images, plain, strict=True):
        swapped = [{0: 1, 1: 0}.get(row[2], row[2]) for row in other.known.relations.tolist()]
        assert image.known.relations[:, 2].tolist() == swapped
        assert np.array_equal(np.asarray(image.image), np.asarray(other.image)[:, ::-1])
