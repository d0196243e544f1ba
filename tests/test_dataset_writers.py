import io
import json

import numpy as np
import pytest
from PIL import Image

import dataset_files as files
import sgtr_hf.cli
from sgtr_hf.data.coco_reader import read_coco_rel, read_coco_rel_annotations
from sgtr_hf.data.dataset_statistics import count_records
from sgtr_hf.data.dataset_writers import (
    WRITERS,
    write_coco_rel,
    write_coco_rel_annotations,
    write_parquet,
    write_psg,
)
from sgtr_hf.data.open_images_reader import read_open_images
from sgtr_hf.data.parquet_reader import read_parquet
from sgtr_hf.data.psg_reader import read_psg
from sgtr_hf.data.training_dataset import SceneGraphDataset, load_split
from sgtr_hf.data.vg150_reader import read_vg150


@pytest.fixture
def source(tmp_path):
    """Two records whose boxes need every bit of a float32."""
    folder = files.write_open_images(tmp_path / "source")
    path = folder / "annotations" / "vrd-train-anno.json"
    entries = json.loads(path.read_text())
    for entry in entries:
        boxes = np.array(entry["bbox"], dtype=np.float32)
        boxes[:, :2] += np.float32(1 / 3)
        boxes[:, 2:] -= np.float32(1 / 7)
        entry["bbox"] = boxes.astype(np.float64).tolist()
    files.write_json(path, entries)
    return read_open_images(folder, "train")


def assert_same(found, expected):
    assert list(found.entity_names) == list(expected.entity_names)
    assert list(found.predicate_names) == list(expected.predicate_names)
    pairs = list(zip(found, expected, strict=True))
    assert len(pairs) == 2
    for record, original in pairs:
        for name in ("image_id", "width", "height", "relations"):
            assert record[name] == original[name], name
        for entity, other in zip(record["objects"], original["objects"], strict=True):
            # To the last bit.
            assert list(entity["bbox"]) == other["bbox"]
            assert entity["label"] == other["label"]


READERS = {
    "parquet": (write_parquet, read_parquet),
    "coco-rel": (write_coco_rel, read_coco_rel),
    "coco-rel-annotations": (
        write_coco_rel_annotations,
        lambda folder, split: read_coco_rel_annotations(folder / split / "_annotations.coco.json"),
    ),
    "psg": (write_psg, lambda folder, split: read_psg(folder / split / "psg.json")),
}


@pytest.mark.parametrize("name", READERS)
def test_round_trips_change_nothing(name, source, tmp_path):
    write, read = READERS[name]
    target = tmp_path / "target"
    assert write(source, source.checked(), target, "train") == 2
    assert_same(read(target, "train"), source)
    # Pictures are the same files.
    original = (tmp_path / "source" / "images" / "a.jpg").read_bytes()
    if name != "parquet":
        assert original in [path.read_bytes() for path in target.rglob("*.jpg")]
    else:
        assert next(iter(read(target, "train")))["image"]["bytes"] == original
    with pytest.raises(ValueError, match="name a new folder"):
        write(source, source.checked(), target, "train")
    # A second split goes beside the first.
    assert write(source, source.checked(), target, "test") == 2
    assert not list(target.glob(".*"))
    if name == "parquet":
        assert_same(read(target, "train"), source)
        assert_same(read(target, "test"), source)


@pytest.mark.parametrize("ids", [["7", "500"], ["7", "seven"], ["seven", "7"], ["07", "7"]])
@pytest.mark.parametrize("name", ["coco-rel", "coco-rel-annotations"])
def test_ids_of_images_stay(name, ids, source, tmp_path):
    """COCO needs numbers; those that the images have are kept, others are kept beside."""
    write, read = READERS[name]
    records = [record | {"image_id": number} for record, number in zip(source, ids, strict=True)]
    write(source, records, tmp_path / "target", "train")
    assert [record["image_id"] for record in read(tmp_path / "target", "train")] == ids
    path = next((tmp_path / "target").rglob("*tra*.json" if name == "coco-rel" else "*.json"))
    numbers = [image["id"] for image in json.loads(path.read_text())["images"]]
    assert len(set(numbers)) == 2
    if ids == ["7", "500"]:
        assert numbers == [7, 500]


@pytest.mark.parametrize("name", ["coco-rel", "coco-rel-annotations", "psg"])
def test_two_pictures_of_one_name_are_an_error(name, source, tmp_path):
    records = [record | {"image_id": "same"} for record in source]
    with pytest.raises(ValueError, match="ids of images must differ"):
        READERS[name][0](source, records, tmp_path / "target", "train")
    assert not list((tmp_path / "target").rglob("*"))


def test_attributes_survive_in_parquet_alone(tmp_path):
    folder = files.write_vg150(tmp_path / "vg")
    source = read_vg150(folder, "test")
    records = [record | {"image": picture()} for record in source]
    write_parquet(source, records, tmp_path / "parquet", "test")
    again = read_parquet(tmp_path / "parquet", "test")
    assert again.attribute_names == ["big", "red"]
    (record,) = again.checked()
    assert [entity["attributes"] for entity in record["objects"]] == [[1], [], [0, 1]]
    # Boxes are computed in double precision and stored in single precision.
    boxes = [entity["bbox"] for entity in records[0]["objects"]]
    assert [entity["bbox"] for entity in record["objects"]] == np.float32(boxes).tolist()
    assert WRITERS["psg"].lost(again) == ["attributes"]
    assert WRITERS["parquet"].lost(again) == []


def picture():
    file = io.BytesIO()
    Image.new("RGB", (200, 100)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_the_card_counts_the_shards(source, tmp_path):
    target = tmp_path / "target"
    write_parquet(source, source.checked(), target, "train", shard_images=1)
    write_parquet(source, source.checked(), target, "minival")
    text = (target / "README.md").read_text()
    for line in (
        "| train | 2 | 5 (2.5 an image) | 3 (1.5 an image) |",
        "| minival | 2 | 5 (2.5 an image) | 3 (1.5 an image) |",
        "| on | 2 | 66.67% |",
        "3 classes: cup, hand, table.",
        "converted from vrd-train-anno.json by sgtr-hf",
    ):
        assert line in text
    # Without the card, a split of such a name would be taken for a part of train.
    assert_same(read_parquet(target, "minival"), source)
    assert_same(read_parquet(target, "train"), source)
    (target / "README.md").write_text("Mine.")
    write_parquet(source, source.checked(), target, "test")
    assert (target / "README.md").read_text() == "Mine."
    with pytest.raises(ValueError, match="letters, digits and _"):
        write_parquet(source, source.checked(), target, "my-split")


def test_paths_instead_of_pictures(source, tmp_path):
    write_parquet(source, source.checked(), tmp_path / "target", "train", embed_images=False)
    first = next(iter(read_parquet(tmp_path / "target", "train")))["image"]
    assert first["bytes"] is None
    assert first["path"] == str(tmp_path / "source" / "images" / "a.jpg")


def test_parquet_trains(source, tmp_path):
    write_parquet(source, source, tmp_path / "target", "train", shard_images=1)
    assert len(list((tmp_path / "target").glob("train-*-of-00002.parquet"))) == 2
    dataset = SceneGraphDataset(load_split(tmp_path / "target", "train"))
    dataset.check()
    assert dataset[1].reference.relations.tolist() == files.RELATIONS[1]


def test_masks_survive(tmp_path):
    source = read_psg(files.write_psg(tmp_path / "psg"), masks=True)
    write_parquet(source, source, tmp_path / "parquet", "train")
    again = read_parquet(tmp_path / "parquet", "train")
    assert again.has_masks
    write_psg(again, again, tmp_path / "back", "train")
    for found, expected in zip(
        read_psg(tmp_path / "back" / "train" / "psg.json", masks=True), source, strict=True
    ):
        # What a later segment covers, an earlier one has lost; here as in the original.
        assert [entity["id"] for entity in found["objects"]] == [
            entity["id"] for entity in expected["objects"]
        ]
        for entity, other in zip(found["objects"], expected["objects"], strict=True):
            assert entity["mask"]["bytes"] == other["mask"]["bytes"]


def test_a_failed_conversion_leaves_nothing(source, tmp_path):
    (tmp_path / "source" / "images" / "b.jpg").write_bytes(b"broken")
    for name, (write, _) in READERS.items():
        with pytest.raises(ValueError, match=r"Image b: the picture .* cannot be read"):
            write(source, source.checked(), tmp_path / "target", "train")
        assert not list((tmp_path / "target").rglob("*")), name


def run(capsys, *arguments):
    code = sgtr_hf.cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_convert_says_what_it_recognised(tmp_path, capsys):
    folder = files.write_coco_rel_annotations(tmp_path / "coco", 1)
    code, out, _ = run(capsys, "convert", folder, tmp_path / "parquet")
    assert code == 0
    assert "format coco-rel-annotations: " in out
    assert "2 images of 'train' as parquet; nothing was dropped" in out
    code, out, _ = run(
        capsys,
        "convert",
        tmp_path / "parquet",
        tmp_path / "psg",
        "--from",
        "parquet",
        "--to",
        "psg",
    )
    assert code == 0
    assert len(list(read_psg(tmp_path / "psg" / "train" / "psg.json"))) == 2
    for wrong in (["--from", "yolo"], ["--to", "yolo"], ["--to", "psg", "--no-embed"]):
        code, _, err = run(capsys, "convert", folder, tmp_path / "other", *wrong)
        assert code == 2
        assert wrong[-1] in err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("command", ["convert", "validate", "stats"])
def test_commands_show_how_far_they_are(command, tmp_path, capsys):
    folder = files.write_open_images(tmp_path / "source")
    target = [str(tmp_path / "target")] if command == "convert" else []
    assert sgtr_hf.cli.main([command, str(folder), *target]) == 0
    assert "2image [" in capsys.readouterr().err


def test_convert_takes_several_splits_and_renames_validation(tmp_path, capsys):
    folder = files.write_coco_rel(tmp_path / "reltr")
    code, out, _ = run(capsys, "convert", folder, tmp_path / "parquet", "--split", "train,val")
    assert code == 0
    assert "2 images of 'validation' as parquet" in out
    arguments = ["--split", "train,validation", "--to", "coco-rel"]
    assert run(capsys, "convert", tmp_path / "parquet", tmp_path / "back", *arguments)[0] == 0
    assert_same(read_coco_rel(tmp_path / "back", "val"), read_coco_rel(folder, "val"))


def test_convert_says_what_a_format_cannot_hold(tmp_path, capsys):
    path = files.write_psg(tmp_path / "psg")
    code, out, _ = run(
        capsys, "convert", path, tmp_path / "coco", "--masks", "--to", "coco-rel", "--split", "test"
    )
    assert code == 0
    assert "left out, as the format's benchmark does: 1 duplicate triplets" in out
    assert "coco-rel holds no masks; they were left out." in out


def test_convert_drops_on_request_alone(tmp_path, capsys):
    folder = files.write_open_images(tmp_path / "oi")
    (folder / "images" / "a.jpg").write_bytes(b"broken")
    code, _, err = run(capsys, "convert", folder, tmp_path / "parquet")
    assert code == 2
    assert "vrd-train-anno.json: Image a: the picture" in err
    code, out, _ = run(capsys, "convert", folder, tmp_path / "parquet", "--drop")
    assert code == 0
    assert "1 images of 'train' as parquet; dropped: 1 images with a wrong picture" in out


def test_convert_starts_again_with_an_index(tmp_path, capsys):
    folder = files.write_coco_rel_annotations(tmp_path / "coco", 1)
    path = folder / "train" / "_annotations.coco.json"
    entries = json.loads(path.read_text())
    entries["annotations"].append(entries["annotations"].pop(0))
    files.write_json(path, entries)
    code, out, err = run(capsys, "convert", folder, tmp_path / "parquet")
    assert code == 0, err
    assert "Starting again with an index" in out
    first = next(iter(read_parquet(tmp_path / "parquet", "train")))
    assert [entity["label"] for entity in first["objects"]] == [1, 2, 0]
    assert first["relations"][0] == {"subject": 0, "object": 2, "predicate": 0}


def test_validate_lists_everything_and_fixes(tmp_path, capsys):
    folder = files.write_open_images(tmp_path / "oi")
    assert run(capsys, "validate", folder)[0] == 0
    path = folder / "annotations" / "vrd-train-anno.json"
    entries = json.loads(path.read_text())
    entries[0]["rel"] += [[0, 7, 0], [0, 1, 9]]
    entries[1]["det_labels"][0] = 77
    entries.append({"img_fn": "c", "img_size": [9, 9]})
    files.write_json(path, entries)
    code, out, _ = run(capsys, "validate", folder)
    assert code == 1
    assert f"{path}: entry 2 (image c) lacks `bbox`." in out
    assert "Image a: `relations[2].object` must be from 0 to 2, got 7." in out
    assert "Image a: `relations[3].predicate` must be from 0 to 1, got 9." in out
    assert "Image b: `objects[0].label` must be from 0 to 2, got 77." in out
    assert "Split train: 3 images, 4 violations." in out
    code, out, _ = run(capsys, "validate", folder, "--fix", tmp_path / "fixed")
    assert code == 0
    assert "2 images, 4 violations; dropped: " in out
    assert "1 relations of dropped objects" in out
    assert "1 broken records" in out
    assert run(capsys, "validate", tmp_path / "fixed")[0] == 0


def test_validate_opens_the_pictures(tmp_path, capsys):
    folder = files.write_open_images(tmp_path / "oi")
    (folder / "images" / "a.jpg").unlink()
    code, out, _ = run(capsys, "validate", folder)
    assert code == 1
    assert "Image a: the picture" in out
    assert run(capsys, "validate", folder, "--no-pictures")[0] == 0


def test_stats_count_and_draw(tmp_path, capsys):
    folder = files.write_open_images(tmp_path / "oi")
    code, out, _ = run(capsys, "stats", folder, "--draw", tmp_path / "stats.png")
    assert code == 0
    assert "2 images, 5 entities (2.5 an image), 3 relations (1.5 an image)" in out
    assert "head (1): on 66.7%" in out
    assert "entities by area: 0 small (0.0%), 3 medium (60.0%), 2 large (40.0%)" in out
    assert "1 entities without a relation" not in out
    with Image.open(tmp_path / "stats.png") as drawing:
        assert drawing.width > 1000
    statistics = count_records(read_open_images(folder, "train"), [])
    assert "0 images" in str(statistics)
    assert statistics.groups()["tail"] == [0, 1]
    statistics.draw(tmp_path / "empty.png")


def test_stats_name_what_is_odd(tmp_path):
    folder = files.write_open_images(tmp_path / "oi")
    path = folder / "annotations" / "vrd-train-anno.json"
    entries = json.loads(path.read_text())
    entries[0]["rel"] = [[0, 1, 0], [0, 1, 0], [0, 1, 1], [2, 2, 0]]
    entries[1]["rel"] = []
    files.write_json(path, entries)
    source = read_open_images(folder, "train")
    statistics = count_records(source, source.checked())
    assert statistics.oddities == {
        "relations that come twice": 1, "pairs with several predicates": 1,
        "relations of an entity with itself": 1, "entities without a relation": 2,
        "images without a relation": 1,
    }  # fmt: skip
    assert statistics.triplets == {(0, 1, 0), (0, 1, 1), (2, 2, 0)}
