import io
import json
import zipfile

import datasets
import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

import dataset_files as files
from sgtr_hf.data import parquet_reader
from sgtr_hf.data.coco_grouping import UnorderedAnnotationsError
from sgtr_hf.data.coco_reader import read_coco, read_coco_rel, read_coco_rel_annotations
from sgtr_hf.data.dataset_formats import ReadOptions, open_dataset
from sgtr_hf.data.format_detection import detect_format
from sgtr_hf.data.gqa_reader import read_gqa, read_gqa200
from sgtr_hf.data.open_images_reader import read_open_images
from sgtr_hf.data.parquet_reader import read_coco_parquet
from sgtr_hf.data.psg_reader import read_psg
from sgtr_hf.data.record_graphs import RecordGraphs
from sgtr_hf.data.record_source import DropReport
from sgtr_hf.data.vg150_reader import read_vg150
from sgtr_hf.data.visual_genome_reader import read_visual_genome
from sgtr_hf.metrics.recall import SceneGraphRecall


def assert_known(record, row, *, boxes=True):
    """A record holds what `dataset_files` wrote for an image."""
    assert (record["width"], record["height"]) == files.SIZES[row]
    assert [entity["label"] for entity in record["objects"]] == files.LABELS[row]
    if boxes:
        assert [entity["bbox"] for entity in record["objects"]] == files.BOXES[row]
    triplets = [[row["subject"], row["object"], row["predicate"]] for row in record["relations"]]
    assert triplets == files.RELATIONS[row]


def assert_source(source):
    assert list(source.entity_names) == files.NAMES
    assert list(source.predicate_names) == files.PREDICATES
    records = list(source.checked())
    assert len(records) == 2
    for row, record in enumerate(records):
        assert_known(record, row)
        with Image.open(record["image"]["path"]) as image:
            assert image.size == files.SIZES[row]
    # A second reading gives the same.
    assert list(source) == records


def test_coco_rel(tmp_path):
    folder = files.write_coco_rel(tmp_path)
    assert detect_format(folder).name == "coco-rel"
    assert_source(read_coco_rel(folder, "train"))
    assert_source(read_coco_rel(folder, "val", index=True))


def test_coco_rel_without_background_counts_from_0(tmp_path):
    folder = files.write_coco_rel(tmp_path)
    entries = json.loads((folder / "rel.json").read_text())
    entries["rel_categories"] = files.PREDICATES
    entries["train"] = {
        name: [[s, o, p - 1] for s, o, p in rows] for name, rows in entries["train"].items()
    }
    files.write_json(folder / "rel.json", entries)
    assert_source(read_coco_rel(folder, "train"))


def test_every_image_needs_an_entry_of_relations(tmp_path):
    folder = files.write_coco_rel(tmp_path)
    entries = json.loads((folder / "rel.json").read_text())
    del entries["train"]["11"]
    files.write_json(folder / "rel.json", entries)
    with pytest.raises(ValueError, match="no entry for image 11"):
        list(read_coco_rel(folder, "train"))


@pytest.mark.parametrize(("base", "background"), [(0, False), (1, False), (1, True)])
def test_coco_rel_annotations_of_both_bases(tmp_path, base, background):
    folder = files.write_coco_rel_annotations(tmp_path, base, background=background)
    assert detect_format(folder).name == "coco-rel-annotations"
    assert_source(open_dataset(folder, "train"))
    path = folder / "train" / "_annotations.coco.json"
    assert_source(read_coco_rel_annotations(path, index=True))


def test_annotations_out_of_order_need_an_index(tmp_path):
    folder = files.write_coco_rel_annotations(tmp_path, 1)
    path = folder / "train" / "_annotations.coco.json"
    entries = json.loads(path.read_text())
    entries["annotations"].append(entries["annotations"].pop(0))
    files.write_json(path, entries)
    with pytest.raises(UnorderedAnnotationsError, match=r"object_id 100 .*index=True"):
        list(read_coco_rel_annotations(path))
    with pytest.raises(UnorderedAnnotationsError, match=r"image 10 comes again.*index=True"):
        list(read_coco(path))
    first = next(iter(read_coco_rel_annotations(path, index=True)))
    assert [entity["label"] for entity in first["objects"]] == [1, 2, 0]
    entries["annotations"][0]["image_id"] = 99
    files.write_json(path, entries)
    with pytest.raises(ValueError, match=r"image 99.*does not list"):
        list(read_coco(path))


def test_coco_detection_remaps_ids_and_leaves_crowds_out(tmp_path):
    files.write_images(tmp_path, ["a.jpg", "b.jpg"])
    annotations = files.coco_annotations(1)
    for annotation in annotations:
        # Sparse ids, as in COCO.
        annotation["category_id"] = {1: 44, 2: 1, 3: 67}[annotation["category_id"]]
    annotations.insert(1, annotations[0] | {"id": 99, "iscrowd": 1})
    categories = [
        {"id": 44, "name": "bottle"},
        {"id": 1, "name": "person"},
        {"id": 67, "name": "x"},
    ]
    path = files.write_json(
        tmp_path / "instances.json",
        {"annotations": annotations, "categories": categories,
         "images": files.coco_images(["a.jpg", "b.jpg"])},
    )  # fmt: skip
    assert detect_format(path).name == "coco"
    source = read_coco(path)
    assert source.entity_names == ["person", "bottle", "x"]
    assert [entity["label"] for entity in next(iter(source))["objects"]] == [1, 0, 2]


def test_open_images(tmp_path):
    folder = files.write_open_images(tmp_path)
    assert detect_format(folder).name == "open-images"
    assert_source(read_open_images(folder, "train"))


def test_open_images_csv(tmp_path):
    path = files.write_open_images_csv(tmp_path)
    assert detect_format(path).name == "open-images-csv"
    source = open_dataset(path, options=ReadOptions(images=[tmp_path / "images"]))
    assert source.predicate_names == files.PREDICATES
    report = DropReport()
    first, second = source.checked(report=report)
    assert report.left_out == {"attributes (is)": 1}
    # Entities come in the order of the relations: hand, cup, table.
    assert [entity["label"] for entity in first["objects"]] == [1, 0, 2]
    np.testing.assert_allclose(first["objects"][1]["bbox"], files.BOXES[0][0])
    assert first["relations"][1] == {"subject": 1, "object": 2, "predicate": 1}
    assert len(second["relations"]) == 1
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(ValueError, match="image a are not together"):
        list(source)


def test_splits_of_one_data_set_share_their_vocabulary(tmp_path):
    """Names found in a single split would get other numbers in each."""
    train = files.write_open_images_csv(tmp_path)
    lines = train.read_text().splitlines()
    # The validation split knows the first predicate alone.
    validation = tmp_path / "oidv6-validation-annotations-vrd.csv"
    validation.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert detect_format(tmp_path).name == "open-images-csv"
    options = ReadOptions([tmp_path / "images"])
    for split, count in (("train", 2), ("val", 1)):
        source = open_dataset(tmp_path, split, options)
        assert source.predicate_names == files.PREDICATES
        assert len(list(source.checked())) == count
    with pytest.raises(ValueError, match=r"has no file \*test-annotations-vrd\.csv"):
        open_dataset(tmp_path, "test", options)
    graph = files.gqa_graph()
    files.write_json(tmp_path / "gqa" / "train_sceneGraphs.json", graph)
    hand = graph["n161313"]["objects"]["1002"] | {"relations": []}
    few = {"2": graph["n161313"] | {"objects": {"1002": hand}}}
    path = files.write_json(tmp_path / "gqa" / "val_sceneGraphs.json", few)
    source = read_gqa(path, tmp_path)
    assert (source.entity_names, source.predicate_names) == (files.NAMES, files.PREDICATES)
    assert [entity["label"] for entity in next(iter(source))["objects"]] == [1]


def test_relations_of_a_crowd_are_relations(tmp_path):
    """A crowd counts in the positions that relations name, and is an entity like others."""
    files.write_coco_rel(tmp_path / "rel")
    files.write_coco_rel_annotations(tmp_path / "ids", 1)
    files.write_psg(tmp_path / "psg")
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    for source in (
        read_coco_rel(tmp_path / "rel", "train"),
        open_dataset(tmp_path / "ids"),
        read_psg(tmp_path / "psg" / "psg.json"),
    ):
        assert_source(source)
        graphs = [RecordGraphs(source).graph(record) for record in source]
        metric = SceneGraphRecall()
        metric.update(graphs, graphs)
        assert (metric.compute()["R@20"], metric.compute()["num_relations"]) == (1, 3)
    report = DropReport()
    records = list(read_coco(tmp_path / "rel" / "train.json").checked(report=report))
    assert [record["objects"] for record in records] == [[], []]
    assert report.left_out == {"crowds": 5}


def test_psg_boxes_masks_and_splits(tmp_path):
    path = files.write_psg(tmp_path)
    assert detect_format(tmp_path).name == "psg"
    assert detect_format(path).name == "psg"
    assert_source(read_psg(path))
    (test,) = read_psg(path, "test", masks=True)
    assert test["image_id"] == "id1"
    assert read_psg(path, masks=True).features()["objects"].feature["mask"]
    mask = np.asarray(Image.open(io.BytesIO(test["objects"][1]["mask"]["bytes"])))
    # The second segment covers the whole picture.
    assert mask.dtype == np.bool_
    assert mask.all()
    (train,) = read_psg(path, "train", keep_duplicates=True)
    assert len(train["relations"]) == 3
    with pytest.raises(ValueError, match='"train", "test" or None'):
        read_psg(path, "val")


def test_vg150_splits_scales_and_rows(tmp_path):
    folder = files.write_vg150(tmp_path)
    assert detect_format(folder).name == "vg150"
    splits = {
        split: [record["image_id"] for record in read_vg150(folder, split, num_validation=1)]
        for split in ("train", "validation", "test")
    }
    # 1592 is broken; the second and third of the others have no relations.
    assert splits == {"train": ["1595", "1596"], "validation": ["1591"], "test": ["1597"]}
    source = read_vg150(folder, "test")
    (record,) = source.checked()
    assert_known(record, 0, boxes=False)
    boxes = [entity["bbox"] for entity in record["objects"]]
    np.testing.assert_allclose(boxes, files.BOXES[0], atol=0.15)
    assert source.attribute_names == ["big", "red"]
    assert [entity["attributes"] for entity in record["objects"]] == [[1], [], [0, 1]]
    more = read_vg150(folder, "train", num_validation=1, without_relations=True)
    assert [record["image_id"] for record in more] == ["1593", "1595", "1596"]
    with pytest.raises(ValueError, match="must be one of train"):
        read_vg150(folder, "val")


def test_vg150_images_come_from_folders_or_zips(tmp_path):
    folder = files.write_vg150(tmp_path)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("VG_100K/1597.jpg", b"zipped")
    (record,) = read_vg150(folder, "test")
    assert record["image"]["bytes"] == b"zipped"
    (folder / "VG_100K_2").mkdir()
    (folder / "VG_100K_2" / "1597.jpg").write_bytes(b"plain")
    (record,) = read_vg150(folder, "test")
    assert record["image"]["path"] == str(folder / "VG_100K_2" / "1597.jpg")


def test_vg150_files_must_belong_together(tmp_path):
    folder = files.write_vg150(tmp_path)
    listed = json.loads((folder / "image_data.json").read_text())
    files.write_json(folder / "image_data.json", listed[:-1])
    with pytest.raises(ValueError, match="do not belong together"):
        list(read_vg150(folder, "test"))
    (folder / "VG-SGG-with-attri.h5").unlink()
    with pytest.raises(ValueError, match=r"one file \*\.h5, found none"):
        read_vg150(folder, "test")


@pytest.mark.parametrize("whole", [True, False])
def test_raw_visual_genome_uses_aliases(tmp_path, whole):
    folder = files.write_visual_genome(tmp_path, whole=whole)
    assert detect_format(folder).name == "visual-genome"
    source = read_visual_genome(folder, files.NAMES, files.PREDICATES, attribute_names=["red"])
    report = DropReport()
    (record,) = source.checked(report=report)
    assert_known(record, 0)
    assert [entity["attributes"] for entity in record["objects"]] == [[0], [], []]
    assert report.left_out == {
        "entities with names beyond the vocabulary": 1,
        "relations with names beyond the vocabulary": 1,
    }
    with pytest.raises(ValueError, match="needs `vocabulary`"):
        open_dataset(folder)
    listed = [{"image_id": number, "width": 200, "height": 100} for number in (1, 2)]
    files.write_json(folder / "image_data.json", listed)
    with pytest.raises(ValueError, match=r"differ at image 2.*of one version\?"):
        list(source)


def test_gqa_relations_hang_on_their_subjects(tmp_path):
    path = files.write_json(tmp_path / "train_sceneGraphs.json", files.gqa_graph())
    assert detect_format(path).name == "gqa"
    source = read_gqa(path, tmp_path)
    assert (source.entity_names, source.predicate_names) == (files.NAMES, files.PREDICATES)
    (record,) = source.checked()
    assert record["image_id"] == "n161313"
    relations = {tuple(relation.values()) for relation in record["relations"]}
    assert relations == {(1, 0, 0), (0, 2, 1)}
    broken = files.gqa_graph()
    broken["n161313"]["objects"]["1001"]["relations"][0]["object"] = "77"
    files.write_json(path, broken)
    with pytest.raises(
        ValueError, match=r"Image n161313: `relations\[0\]\.object`.*got '77', which"
    ):
        list(read_gqa(path, tmp_path).checked())


def test_gqa_leaves_out_what_no_vocabulary_names(tmp_path):
    path = files.write_json(tmp_path / "train_sceneGraphs.json", files.gqa_graph())
    vocabulary = {"labels": ["hand", "cup"], "predicates": ["holding"], "attributes": ["red"]}
    names = files.write_json(tmp_path / "names.json", vocabulary)
    options = ReadOptions([tmp_path], names, format_name="gqa")
    report = DropReport()
    (record,) = open_dataset(tmp_path, "train", options).checked(report=report)
    assert [entity["label"] for entity in record["objects"]] == [1, 0]
    assert [entity["attributes"] for entity in record["objects"]] == [[0], [0]]
    assert record["relations"] == [{"subject": 1, "object": 0, "predicate": 0}]
    assert set(report.left_out.values()) == {1}
    assert detect_format(path).name == detect_format(tmp_path).name == "gqa"


def test_gqa200_counts_from_1(tmp_path):
    folder = files.write_gqa200(tmp_path)
    assert detect_format(folder).name == "gqa200"
    assert_source(read_gqa200(folder, "train"))
    (only,) = read_gqa200(folder, "validation", num_validation=1)
    assert_known(only, 0)
    columns = files.gqa200_columns()
    columns["relationships_all"][0] = []
    files.write_json(folder / "GQA_200_Test.json", columns)
    report = DropReport()
    (second,) = read_gqa200(folder, "test").checked(report=report)
    assert_known(second, 1)
    assert report.left_out == {"images without boxes or relations": 1}
    files.write_json(folder / "GQA_200_Test.json", columns | {"gt_boxes_all": files.BOXES[:1]})
    with pytest.raises(ValueError, match="`gt_boxes_all` has 1 entries"):
        list(read_gqa200(folder, "test"))


def test_gqa200_skips_one_entry_of_the_test_file(tmp_path, monkeypatch):
    folder = files.write_gqa200(tmp_path)
    monkeypatch.setattr("sgtr_hf.data.gqa_reader._SKIPPED_ENTRY", 0)
    (only,) = read_gqa200(folder, "test")
    assert_known(only, 1)
    assert len(list(read_gqa200(folder, "train"))) == 2


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("as_lists", [False, True], ids=["entries", "lists"])
def test_hub_columns_of_coco_parquet(tmp_path, base, as_lists):
    folder = files.write_coco_rel_annotations(tmp_path / "coco", base)
    rows, names = files.coco_rows(folder)
    if as_lists:
        for row in rows:
            for column in ("objects", "relations"):
                keys = row[column][0]
                row[column] = {key: [entry[key] for entry in row[column]] for key in keys}
    target = tmp_path / "parquet"
    target.mkdir()
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(target / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="names of"):
        read_coco_parquet(target, "train")
    files.write_json(target / "categories.json", names)
    assert detect_format(target).name == "coco-parquet"
    source = read_coco_parquet(target, "train")
    assert source.count == 2
    for row, record in enumerate(source.checked()):
        assert_known(record, row)
        assert record["image"]["bytes"] is not None or record["image"]["path"]
    shard = next(target.glob("*.parquet"))
    assert detect_format(shard).name == "coco-parquet"
    assert len(list(open_dataset(shard).checked())) == 2


def test_names_of_a_hub_data_set_come_from_its_repository(tmp_path, monkeypatch):
    """The stream stands in for the Hub, of which only the download of one file is asked."""
    rows, names = files.coco_rows(files.write_coco_rel_annotations(tmp_path / "coco", 1))
    stream = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    downloaded = []

    def download(repository, name, repo_type):
        downloaded.append((repository, name, repo_type))
        return str(files.write_json(tmp_path / "categories.json", names))

    monkeypatch.setattr(parquet_reader, "load_stream", lambda *_: stream.to_iterable_dataset())
    monkeypatch.setattr(parquet_reader.huggingface_hub, "hf_hub_download", download)
    records = list(read_coco_parquet("someone/scenes-coco-format", "train").checked())
    assert_known(records[1], 1)
    assert downloaded == [("someone/scenes-coco-format", "categories.json", "dataset")]

    def missing(*_, **__):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(parquet_reader.huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(ValueError, match="names of someone/scenes"):
        read_coco_parquet("someone/scenes-coco-format", "train")
    described = stream.to_iterable_dataset()
    described.info.description = json.dumps(names)
    monkeypatch.setattr(parquet_reader, "load_stream", lambda *_: described)
    assert read_coco_parquet("someone/scenes", "train").predicate_names == files.PREDICATES


def test_relations_at_the_end_of_a_large_file_are_seen(tmp_path):
    """A file read as plain COCO would lose its relations without a word."""
    folder = files.write_coco_rel_annotations(tmp_path, 1)
    path = folder / "train" / "_annotations.coco.json"
    entries = json.loads(path.read_text())
    last = {name: entries.pop(name) for name in ("categories", "rel_categories", "rel_annotations")}
    entries["images"][0]["note"] = "x" * 200_000
    files.write_json(path, entries | last)
    assert detect_format(path).name == "coco-rel-annotations"
    assert_source(open_dataset(folder))


@pytest.mark.parametrize("layout", ["train2017", "folders"])
def test_folders_of_coco_files(tmp_path, layout):
    content = {
        "images": files.coco_images(["a.jpg", "b.jpg"]), "annotations": files.coco_annotations(1),
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(files.NAMES)],
    }  # fmt: skip
    if layout == "folders":
        files.write_images(tmp_path / "valid", ["a.jpg", "b.jpg"])
        files.write_json(tmp_path / "valid" / "_annotations.coco.json", content)
    else:
        files.write_images(tmp_path / "val2017", ["a.jpg", "b.jpg"])
        files.write_json(tmp_path / "annotations" / "instances_val2017.json", content)
    assert detect_format(tmp_path, "validation").name == "coco"
    first = next(open_dataset(tmp_path, "validation").checked(pictures=True))
    assert [entity["bbox"] for entity in first["objects"]] == files.BOXES[0]


def test_val_and_validation_are_one_split(tmp_path):
    folder = files.write_coco_rel(tmp_path / "reltr")
    assert_source(open_dataset(folder, "validation"))
    vg = files.write_vg150(tmp_path / "vg")
    assert open_dataset(vg, "val").count == 3


def test_unknown_formats_are_errors_with_a_remedy(tmp_path):
    path = files.write_json(tmp_path / "some.json", {"entries": []})
    with pytest.raises(ValueError, match=r"first entries: entries.*--from"):
        detect_format(path)
    with pytest.raises(ValueError, match=r"folder.*--from"):
        detect_format(tmp_path)
    with pytest.raises(ValueError, match="must be one of parquet"):
        open_dataset(path, "train", ReadOptions(format_name="yolo"))
