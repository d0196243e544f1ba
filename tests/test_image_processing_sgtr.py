import base64
import contextlib
import io
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf import (
    DinoVitImageProcessor,
    DinoVitImageProcessorPil,
    SgtrImageProcessor,
    SgtrImageProcessorPil,
)
from sgtr_hf.image_processing.picture_reading import read_image


BACKENDS = [SgtrImageProcessor, SgtrImageProcessorPil]
PROCESSORS = [*BACKENDS, DinoVitImageProcessor, DinoVitImageProcessorPil]


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
        ("nowhere.jpg", ValueError, "nowhere.jpg cannot be read.*no such file"),
        ("", ValueError, "An empty name"),
        ("data:image/png;base64,zzz", ValueError, "after the comma must be a picture in base64"),
        ("data:image/png", ValueError, "after the comma must be a picture in base64"),
        (np.zeros((2, 4, 4, 3)), ValueError, "One picture is expected.*list"),
        (torch.zeros(1, 3, 4, 4), ValueError, "One picture is expected.*list"),
        (np.array([["a"]]), TypeError, "array of numbers"),
        (np.zeros((4, 4), complex), TypeError, "array of numbers"),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"relations": [[0, 1], [1, 0], [0, 1]]}, "`relations` must be rows of three"),
        ({"relations": [[0, 1, 2], [0, 1]]}, "`relations` must be rows of three"),
        ({"relations": [[]]}, "`relations` must be rows of three"),
        ({"relations": [0, 1, 2]}, "`relations` must be rows of three"),
        ({"relations": [["a", "b", "c"]]}, "`relations` must be rows of three"),
        ({"relations": {"subject": 0}}, "`relations` must be rows of three.*subject"),
        ({"relations": [{"subject": 0}]}, "`relations` must be rows of three.*subject"),
        ({"relations": 7}, "`relations` must be rows of three.*7"),
        ({"relations": [[0, 1, 2], [0.7, 1.2, 2.9]]}, r"relation \[0.7, 1.2, 2.9\].*whole"),
        ({"relations": [[0, 1, np.nan]]}, "relation .*nan.*whole"),
        ({"relations": [[0, 1, 2**40]]}, "relation .*whole"),
        ({"category_id": 1.7}, "category_id.*1.7"),
        ({"category_id": "mug"}, "category_id.*'mug'"),
        ({"category_id": True}, "category_id.*True"),
        ({"category_id": [1]}, r"category_id.*\[1\]"),
        ({"category_id": {}}, "category_id.*{}"),
        ({"category_id": None}, "category_id.*None"),
        ({"category_id": 2**70}, "category_id"),
        ({"bbox": 5}, r"`bbox` of `annotations\[0\]`.*got 5"),
        ({"bbox": ["a", 0, 1, 1]}, "`bbox` of.*'a'"),
        ({"bbox": ["0", "0", "1", "1"]}, "`bbox` of.*'0'"),
        ({"bbox": [[0, 1], [2, 3]]}, "`bbox` of"),
        ({"bbox": {"x": 1}}, "`bbox` of.*'x'"),
        ({"bbox": None}, "`bbox` of.*None"),
        ({"bbox": [0, 0, np.inf, 1]}, "`bbox` of.*inf"),
        ({"annotations": ["mug"]}, r"`annotations\[0\]` must be a dictionary.*'mug'"),
        ({"annotations": "mug"}, "`annotations` must be a list.*'mug'"),
        ({"annotations": {"bbox": []}}, "`annotations` must be a list"),
    ],
)
def test_values_of_annotations_are_not_bent_to_fit(change, words):
    entry = {"bbox": [0, 0, 10, 10], "category_id": 1}
    own = {name: value for name, value in change.items() if name in entry}
    rest = {name: value for name, value in change.items() if name not in entry}
    annotation = {"image_id": "seven", "annotations": [entry | own, entry], **rest}
    with pytest.raises(ValueError, match=f"seven.*{words}"):
        SgtrImageProcessor()(make_picture(), annotations=annotation)


@pytest.mark.parametrize("relations", [[[0, 2, 3], [2, 0, 1]], [[0.0, 2.0, 3.0], [2.0, 0, 1]]])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_relations_may_be_arrays(relations, kind):
    entries = [{"bbox": kind([0, 0, 9, 9]), "category_id": number} for number in (0, 1.0, 2)]
    annotation = {"image_id": 7, "annotations": entries, "relations": kind(relations)}
    labels = SgtrImageProcessor()(make_picture(), annotations=annotation).labels[0]
    assert labels["relations"].tolist() == [[0, 2, 3], [2, 0, 1]]
    assert labels["class_labels"].tolist() == [0, 1, 2]
    for none in ([], np.zeros((0, 3)), torch.zeros(0, 3), None):
        annotation["relations"] = none
        labels = SgtrImageProcessor()(make_picture(), annotations=annotation).labels[0]
        assert labels["relations"].shape == (0, 3)


@pytest.mark.parametrize(
    ("annotations", "words"),
    [
        ("a", "`annotations` must be a dictionary, or a list"),
        (7, "`annotations` must be a dictionary, or a list"),
        (["mug"], r"`annotations\[0\]` must be a dictionary.*'mug'"),
    ],
)
def test_annotations_are_dictionaries(annotations, words):
    with pytest.raises(TypeError, match=words):
        SgtrImageProcessor()(make_picture(), annotations=annotations)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="2 images"):
        SgtrImageProcessor()([make_picture()] * 2, annotations=[ANNOTATION])


WRONG_SETTINGS = [
    ({"image_std": [0, 0, 0]}, ValueError, "`image_std` must be 3 numbers above 0"),
    ({"image_std": -1.0}, ValueError, "`image_std` must be 3 numbers above 0"),
    ({"image_mean": [np.nan] * 3}, ValueError, "`image_mean` must be 3 finite numbers.*nan"),
    ({"image_mean": [0.5, 0.5]}, ValueError, "`image_mean` must be 3 finite numbers"),
    ({"image_mean": "abc"}, ValueError, "`image_mean` must be 3 finite numbers.*'abc'"),
    ({"rescale_factor": -1.0}, ValueError, "`rescale_factor` must be above 0.*-1.0"),
    ({"rescale_factor": "a"}, TypeError, "`rescale_factor` must be a number.*'a'"),
    ({"size": {"shortest_edge": -3}}, ValueError, "`size` must have.*-3 as its shortest_edge"),
    ({"size": {"height": 2.5, "width": 4}}, ValueError, "`size` must have.*2.5 as its height"),
    ({"pad_size": {"height": 0, "width": 4}}, ValueError, "`pad_size` must have.*0 as its height"),
    ({"do_resize": "no"}, TypeError, "`do_resize` must be True or False, got 'no'"),
    ({"resample": 9}, ValueError, "`resample` must be one of.*9"),
]


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(("settings", "error", "words"), WRONG_SETTINGS)
def test_wrong_settings_are_errors_at_construction(processor, settings, error, words):
    with pytest.raises(error, match=words):
        processor(**settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["BGR", "gbr", 1])
def test_other_channel_orders_are_errors(backend, order):
    with pytest.raises(ValueError, match=f"`channel_order` must be one of .*{order!r}"):
        backend(channel_order=order)
    with pytest.raises(TypeError, match="`legacy_open_border` must be True or False"):
        backend(legacy_open_border="no")
    with pytest.raises(ValueError, match="`legacy_box_offset` must be finite"):
        backend(legacy_box_offset=np.inf)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_settings_of_a_call_are_checked_too(processor):
    with pytest.raises(ValueError, match="`image_std` must be 3 numbers above 0"):
        processor()(make_picture(), image_std=[0.0, 0.0, 0.0])


@pytest.mark.parametrize("processor", PROCESSORS)
def test_unknown_settings_are_errors_unless_a_file_has_them(tmp_path, processor):
    with pytest.raises(TypeError, match=r"has no setting channel_ordr; it has .*size"):
        processor(channel_ordr="bgr")
    # Of another version of this package or of transformers.
    stored = processor().to_dict() | {"later": 1, "processor_class": "X", "auto_map": {}}
    assert processor.from_dict(stored).later == 1
    assert processor(processor_class="X").to_dict() == processor().to_dict()


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("value", [0.5, [0.5], (0.5,), [0.5, 0.5, 0.5]])
def test_one_number_counts_for_all_channels(tmp_path, processor, value):
    made = processor(image_mean=value, image_std=value)
    assert made.image_mean == made.image_std == (0.5, 0.5, 0.5)
    made.save_pretrained(tmp_path)
    assert processor.from_pretrained(tmp_path).to_dict() == made.to_dict()
    expected = processor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    found, wanted = (one(make_picture(), return_tensors="pt") for one in (made, expected))
    assert torch.equal(found.pixel_values, wanted.pixel_values)
    called = processor()(make_picture(), image_mean=value, image_std=value, return_tensors="pt")
    assert torch.equal(called.pixel_values, wanted.pixel_values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_floats_without_rescaling_too(backend):
    processor = backend(do_rescale=False, do_normalize=False, do_resize=False)
    values = processor(make_picture(), return_tensors="pt").pixel_values
    assert values.dtype == torch.float32
    assert torch.equal(values[0], torch.tensor(np.asarray(make_picture())).permute(2, 0, 1))


def encoded(picture):
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


@contextlib.contextmanager
def serve(replies):
    """Serve contents by path: bytes, or a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            reply = replies[self.path]
            is_content = isinstance(reply, bytes)
            self.send_response(200 if is_content else reply)
            self.end_headers()
            self.wfile.write(reply if is_content else b"<html>no</html>")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_pictures_are_read_from_urls():
    replies = {"/good": encoded(make_picture()), "/gone": 404, "/busy": 503, "/page": b"<html>"}
    with serve(replies) as address:
        assert np.array_equal(read_image(f"{address}/good", timeout=30), make_picture())
        for path, words in (("gone", "404 Not Found"), ("busy", "503"), ("page", "no format of")):
            with pytest.raises(ValueError, match=f"{address}/{path} cannot be read.*{words}"):
                read_image(f"{address}/{path}", timeout=30)
        # The server does not speak TLS.
        secure = address.replace("http", "https")
        with pytest.raises(ValueError, match=f"{secure}/good cannot be read.*download failed"):
            read_image(f"{secure}/good", timeout=30)
    with pytest.raises(ValueError, match=f"{address}/good cannot be read.*download failed"):
        read_image(f"{address}/good", timeout=30)


def test_a_server_that_keeps_silent_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        with pytest.raises(ValueError, match=f"{url} cannot be read.*Timeout"):
            read_image(url, timeout=0.2)


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a..b/c.png"])
def test_addresses_that_are_none(url):
    with pytest.raises(ValueError, match="cannot be read as a picture: the download failed"):
        read_image(url, timeout=5)


@pytest.mark.parametrize(
    ("timeout", "error"),
    [("x", TypeError), (True, TypeError), (-1, ValueError), (0, ValueError), (np.nan, ValueError)],
)
def test_the_timeout_is_a_positive_number(tmp_path, timeout, error):
    make_picture().save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", "http://127.0.0.1:9/a.png"):
        with pytest.raises(error, match=f"`timeout` must be a number.*{timeout}"):
            read_image(source, timeout=timeout)


def test_contents_of_files_are_read():
    content = encoded(make_picture())
    text = base64.b64encode(content).decode()
    for source in (content, bytearray(content), text, f"data:image/png;base64,{text}"):
        assert np.array_equal(read_image(source), make_picture())


def test_messages_do_not_hold_contents(tmp_path):
    for source in (b"\x00\xff" * 5000, "a" * 50_000, "data:image/png;base64," + "a" * 50_000):
        with pytest.raises(ValueError, match="cannot be read as a picture") as caught:
            read_image(source)
        assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="it is a folder or a device"):
        read_image(tmp_path)


def test_contents_above_the_limit_are_refused(monkeypatch):
    content = encoded(Image.new("RGB", (30, 30)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for source in (content, base64.b64encode(content).decode()):
        with pytest.raises(ValueError, match="limit of 100 pixels"):
            read_image(source)


def test_tensors_of_training_are_read():
    values = torch.from_numpy(np.asarray(make_picture()).copy()).permute(2, 0, 1) / 255
    for tensor in (values.clone().requires_grad_(), values.bfloat16(), values.half()):
        found = np.asarray(read_image(tensor)).astype(int)
        assert np.abs(found - np.asarray(make_picture())).max() <= 1


def test_colours_multiplied_by_opacity_are_read():
    picture = make_picture().convert("LA").convert("La")
    assert np.array_equal(read_image(picture), make_picture().convert("L").convert("RGB"))
