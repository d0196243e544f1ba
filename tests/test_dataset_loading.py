"""`sgtr_hf.data.load` opens every format, and reads again what has changed."""

import json
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

import dataset_files as files
import sgtr_hf
from sgtr_hf.data.dataset_formats import FORMATS, ReadOptions, open_dataset
from sgtr_hf.data.dataset_writers import write_parquet
from sgtr_hf.data.open_images_reader import read_open_images


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def vocabulary(folder, **names):
    entries = {"labels": files.NAMES, "predicates": files.PREDICATES} | names
    return files.write_json(folder / "names" / "names.json", entries)


def gqa(folder):
    files.write_images(folder / "images", ["n161313.jpg", "other.jpg"])
    return files.write_json(folder / "train_sceneGraphs.json", files.gqa_graph())


def vg150(folder):
    files.write_vg150(folder)
    files.write_images(folder / "VG_100K", ["1597.jpg", "other.jpg"])
    return folder


def visual_genome(folder):
    files.write_visual_genome(folder)
    files.write_images(folder, ["1.jpg", "other.jpg"])
    return folder


def parquet(folder):
    source = read_open_images(files.write_open_images(folder / "source"), "train")
    write_parquet(source, source.checked(), folder / "shards", "train")
    return folder / "shards"


def coco_parquet(folder):
    rows, names = files.coco_rows(files.write_coco_rel_annotations(folder / "coco", 1))
    files.write_json(folder / "hub" / "categories.json", names)
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(folder / "hub" / "train-00000-of-00001.parquet")
    return folder / "hub"


# What makes the files and returns the path; the split; what else the format needs.
OPENED = {
    "parquet": (parquet, "train", {}),
    "one shard": (lambda folder: next(parquet(folder).glob("*.parquet")), "train", {}),
    "coco-parquet": (coco_parquet, "train", {}),
    "vg150": (vg150, "test", {}),
    "coco": (lambda folder: files.write_coco_rel(folder) / "train.json", "train", {}),
    "coco-rel": (files.write_coco_rel, "train", {}),
    "coco-rel-annotations": (
        lambda folder: files.write_coco_rel_annotations(folder, 0), "train", {},
    ),
    "open-images": (files.write_open_images, "train", {}),
    "open-images-csv": (files.write_open_images_csv, "train", {"images": ["images"]}),
    "psg": (files.write_psg, "train", {}),
    "visual-genome": (visual_genome, "train", {"vocabulary": "names/names.json"}),
    "gqa": (gqa, "train", {"images": ["images"]}),
    "gqa200": (files.write_gqa200, "train", {}),
}  # fmt: skip


def test_every_format_is_among_them():
    assert set(FORMATS) <= set(OPENED)


@pytest.mark.parametrize("name", OPENED)
def test_every_format_opens_in_a_line(name, tmp_path):
    make, split, settings = OPENED[name]
    path = make(tmp_path)
    vocabulary(tmp_path)
    if "images" in settings:
        settings = {"images": tuple(tmp_path / image for image in settings["images"])}
    elif "vocabulary" in settings:
        settings = {"vocabulary": tmp_path / settings["vocabulary"]}
    options = ReadOptions(**settings)
    records = list(open_dataset(path, split, options))
    images = sgtr_hf.data.load(path, split, options=options)
    streamed = sgtr_hf.data.load(path, split, options=options, streaming=True)
    assert len(images) == len(records) > 0
    for record, image, other in zip(records, images, streamed, strict=True):
        assert image.image.size == (record["width"], record["height"])
        # Boxes are kept in single precision.
        boxes = [entity["bbox"] for entity in record["objects"]]
        np.testing.assert_array_equal(image.known.boxes, np.float32(boxes))
        assert image.known.labels.tolist() == [entity["label"] for entity in record["objects"]]
        assert image.known.relations.tolist() == [
            [row["subject"], row["object"], row["predicate"]] for row in record["relations"]
        ]
        assert other.annotation == image.annotation
        assert other.image.tobytes() == image.image.tobytes()


def test_a_changed_vocabulary_is_read_again(tmp_path):
    folder = visual_genome(tmp_path / "vg")
    path = vocabulary(tmp_path)
    options = ReadOptions(vocabulary=path)
    assert sgtr_hf.data.load(folder, options=options)[0].known.relations[0, 2] == 0
    vocabulary(tmp_path, predicates=list(reversed(files.PREDICATES)))
    assert sgtr_hf.data.load(folder, options=options)[0].known.relations[0, 2] == 1


def test_changed_files_beside_the_one_named_are_read_again(tmp_path):
    folder = vg150(tmp_path / "vg")
    path = folder / "VG-SGG-with-attri.h5"
    assert sgtr_hf.data.load(path, "test").id2label[0] == files.NAMES[0]
    dictionaries = folder / "VG-SGG-dicts-with-attri.json"
    names = json.loads(dictionaries.read_text())
    names["idx_to_label"]["1"] = "beaker"
    files.write_json(dictionaries, names)
    assert sgtr_hf.data.load(path, "test").id2label[0] == "beaker"


def test_changed_archives_are_read_again(tmp_path):
    folder = files.write_vg150(tmp_path / "vg")
    options = ReadOptions(images=(tmp_path / "pictures.zip",))
    shades = []
    for shade in (0, 40):
        Image.new("RGB", (200, 100), (shade, 0, 0)).save(tmp_path / "1597.png")
        with zipfile.ZipFile(options.images[0], "w") as archive:
            archive.write(tmp_path / "1597.png", "1597.jpg")
        image = sgtr_hf.data.load(folder, "test", options=options)[0].image
        shades.append(image.getpixel((0, 0))[0])
    assert shades == [0, 40]


def test_a_split_called_val_is_the_validation_split(tmp_path):
    source = read_open_images(files.write_open_images(tmp_path / "source"), "train")
    write_parquet(source, source.checked(), tmp_path / "shards", "val")
    for name in ("val", "validation"):
        assert len(sgtr_hf.data.load(tmp_path / "shards", name)) == 2
        found = open_dataset(tmp_path / "shards", name)
        assert found.count == len(list(found)) == 2
    with pytest.raises(ValueError, match="no readable split 'test'"):
        open_dataset(tmp_path / "shards", "test")
