import logging

import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf import SgtrImageProcessor, SgtrImageProcessorPil
from sgtr_hf.image_processing.picture_reading import read_image


BACKENDS = [SgtrImageProcessor, SgtrImageProcessorPil]


def make_picture(width=100, height=60, seed=0):
    rows, columns = np.mgrid[0:height, 0:width]
    phase = np.random.default_rng(seed).uniform(0, 6)
    pixels = [127 + 120 * np.sin(rows / 9 + columns / 13 + phase + shift) for shift in (0, 1, 2)]
    return Image.fromarray(np.stack(pixels, axis=-1).astype(np.uint8))


ANNOTATION = {
    "image_id": "seven",
    "annotations": [
        {"bbox": [0, 0, 10, 30], "category_id": 1},
        {"bbox": [5, 5, 0, 9], "category_id": 2},
        {"bbox": [20, 10, 300, 20], "category_id": 0},
        {"bbox": [1, 1, 5, 5], "category_id": 0, "iscrowd": 1},
    ],
    "relations": [[0, 2, 3], [1, 2, 0], [2, 0, 1], [0, 3, 1]],
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_padding_and_mask(backend):
    processor = backend(size={"shortest_edge": 54, "longest_edge": 90})
    features = processor([make_picture(), make_picture(50, 60)], return_tensors="pt")
    # 60 x 100 becomes 54 x 90; 60 x 50 becomes 64 x 54.
    assert features.pixel_values.shape == (2, 3, 64, 90)
    assert features.pixel_mask.sum((1, 2)).tolist() == [54 * 90, 64 * 54]
    assert features.pixel_values[0, :, 54:].abs().sum() == 0
    assert features.pixel_values[1, :, :, 54:].abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_relations_stay_right_when_boxes_go(backend, caplog):
    # transformers' logger does not hand on to the root logger that caplog listens to.
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        processor = backend(size={"height": 30, "width": 40})
        labels = processor(make_picture(), annotations=ANNOTATION, return_tensors="pt").labels[0]
    finally:
        logger.removeHandler(caplog.handler)
    assert labels.class_labels.tolist() == [1, 0]
    assert labels.relations.tolist() == [[0, 1, 3], [1, 0, 1]]
    expected = torch.tensor([[0.05, 0.25, 0.1, 0.5], [0.6, 1 / 3, 0.8, 1 / 3]])
    torch.testing.assert_close(labels.boxes, expected)
    assert labels.orig_size.tolist() == [60, 100]
    assert labels["size"].tolist() == [30, 40]


def test_boxes_are_relative_to_the_image_not_to_its_padding():
    processor = SgtrImageProcessor(size={"height": 60, "width": 100}, pad_size=None)
    annotation = {"image_id": 0, "annotations": [{"bbox": [0, 0, 100, 60], "category_id": 0}]}
    alone = processor(make_picture(), annotations=annotation, return_tensors="pt")
    padded = processor(
        make_picture(),
        annotations=annotation,
        pad_size={"height": 128, "width": 128},
        return_tensors="pt",
    )
    assert padded.pixel_values.shape[-2:] == (128, 128)
    assert torch.equal(alone.labels[0].boxes, padded.labels[0].boxes)


def test_backends_agree():
    arguments = {"size": {"shortest_edge": 54, "longest_edge": 90}}
    torchvision = SgtrImageProcessor(**arguments)(make_picture(), return_tensors="pt")
    pil = SgtrImageProcessorPil(**arguments)(make_picture(), return_tensors="pt")
    assert (torchvision.pixel_values - pil.pixel_values).abs().max() < 0.04


@pytest.mark.parametrize("backend", BACKENDS)
def test_bgr_without_scale_is_what_the_original_wants(backend):
    processor = backend(
        do_resize=False,
        do_rescale=False,
        image_mean=[103.53, 116.28, 123.675],
        image_std=[1.0, 1.0, 1.0],
        channel_order="bgr",
    )
    picture = make_picture()
    values = processor(picture, return_tensors="pt").pixel_values[0]
    blue = np.asarray(picture)[..., 2].astype(np.float32) - np.float32(103.53)
    torch.testing.assert_close(values[0], torch.from_numpy(blue), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_survive_saving(tmp_path, backend):
    processor = backend(channel_order="bgr", image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = backend.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.to_dict()["image_processor_type"] == "SgtrImageProcessor"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I", "F", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    picture = make_picture()
    read = read_image(picture.convert(mode))
    assert read.mode == "RGB"
    assert read.size == picture.size
    grey = np.asarray(picture.convert("L")).astype(float)
    found = np.asarray(read.convert("L")).astype(float)
    assert np.abs(grey - found).max() < 40


def test_black_and_white_becomes_rgb():
    read = read_image(Image.new("1", (3, 2), 1))
    assert read.mode == "RGB"
    assert np.asarray(read).min() == 255


def test_sixteen_bits_are_scaled_not_cut_off():
    wide = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(read_image(wide))[0, :, 0].tolist() == [0, 128, 255]


def test_transparency_becomes_white():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert np.asarray(read_image(clear)).min() == 255


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(100, 60).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(str(tmp_path / "turned.jpg")).size == (60, 100)


def test_arrays_and_tensors_of_any_layout():
    picture = make_picture()
    array = np.asarray(picture)
    for source in (
        array,
        array.transpose(2, 0, 1),
        torch.from_numpy(array.copy()),
        array.astype(np.float32) / 255,
    ):
        assert np.abs(np.asarray(read_image(source)).astype(int) - array).max() <= 1


def test_a_broken_file_is_a_clear_error(tmp_path):
    whole = tmp_path / "whole.jpg"
    make_picture(400, 400).save(whole)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(whole.read_bytes()[:600])
    with pytest.raises(ValueError, match="cannot be"):
        read_image(str(broken))
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_image(text)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (7, TypeError, "int"),
        (np.zeros((5, 5, 5)), ValueError, "channels"),
        (np.full((4, 4), np.nan), ValueError, "finite"),
        (np.full((4, 4), -1.0), ValueError, "negative"),
        ("nowhere.jpg", ValueError, "nowhere"),
    ],
)
def test_what_is_no_picture(source, error, words):
    with pytest.raises(error, match=words):
        read_image(source)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"relations": [[0, 4, 0]]}, "missing entity"),
        ({"relations": [[0, 1, -1]]}, "negative predicate"),
        ({"annotations": [{"bbox": [0, 0, 1], "category_id": 0}]}, "bbox"),
        ({"annotations": [{"bbox": [0, 0, 1, 1], "category_id": -1}]}, "category_id"),
        ({"annotations": None}, "annotations"),
    ],
)
def test_wrong_annotations_name_the_image(change, words):
    with pytest.raises(ValueError, match="seven") as caught:
        SgtrImageProcessor()(make_picture(), annotations=ANNOTATION | change)
    assert words in str(caught.value)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="2 images"):
        SgtrImageProcessor()([make_picture()] * 2, annotations=[ANNOTATION])
