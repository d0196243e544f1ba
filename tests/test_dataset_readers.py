import io
import json
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image

import dataset_files as files
from sgtr_hf.data.coco_reader import (
    UnorderedAnnotationsError,
    read_coco,
    read_coco_rel,
    read_coco_rel_annotations,
)
from sgtr_hf.data.dataset_formats import detect_format, open_dataset
from sgtr_hf.data.gqa_reader import read_gqa, read_gqa200
from sgtr_hf.data.open_images_reader import read_open_images, read_open_images_csv
from sgtr_hf.data.parquet_reader import read_coco_parquet
from sgtr_hf.data.psg_reader import read_psg
from sgtr_hf.data.record_source import DropReport
from sgtr_hf.data.vg150_reader import read_vg150
from sgtr_hf.data.visual_genome_reader import read_visual_genome


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
    files.write_images(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / "oidv6-class-descriptions.csv").write_text("/m/c,cup\n/m/h,hand\n/m/t,table\n")
    codes = ["/m/c", "/m/h", "/m/t"]
    lines = ["ImageID,LabelName1,LabelName2,XMin1,XMax1,YMin1,YMax1,XMin2,XMax2,YMin2,YMax2,"
             "RelationshipLabel"]  # fmt: skip
    for row, name in enumerate("ab"):
        width, height = files.SIZES[row]
        for ends, predicate in [(r[:2], r[2]) for r in files.RELATIONS[row]]:
            fields = [codes[files.LABELS[row][end]] for end in ends]
            for end in ends:
                x1, y1, x2, y2 = files.BOXES[row][end]
                fields += [x1 / width, x2 / width, y1 / height, y2 / height]
            lines.append(",".join(map(str, [name, *fields, files.PREDICATES[predicate]])))
    # An attribute, which is not a relation.
    lines.append("b,/m/c,/m/Wooden,0.1,0.5,0.1,0.5,0.1,0.5,0.1,0.5,is")
    path = tmp_path / "oidv6-train-annotations-vrd.csv"
    path.write_text("\n".join(lines) + "\n")
    source = read_open_images_csv(
        path, tmp_path / "oidv6-class-descriptions.csv", tmp_path / "images"
    )
    assert source.predicate_names == files.PREDICATES
    first, second = source.checked()
    # Entities come in the order of the relations: hand, cup, table.
    assert [entity["label"] for entity in first["objects"]] == [1, 0, 2]
    np.testing.assert_allclose(first["objects"][1]["bbox"], files.BOXES[0][0])
    assert first["relations"][1] == {"subject": 1, "object": 2, "predicate": 1}
    assert len(second["relations"]) == 1
    path.write_text("\n".join([*lines, lines[1]]) + "\n")
    with pytest.raises(ValueError, match="image a are not together"):
        list(source)


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
    entities = [
        {"object_id": 7, "x": 10, "y": 20, "w": 40, "h": 40, "names": ["Mug."], "synsets": []},
        {"object_id": 8, "x": 30, "y": 30, "w": 60, "h": 50, "names": ["hand"], "synsets": []},
        {"object_id": 9, "x": 0, "y": 0, "w": 5, "h": 5, "names": ["dragon"], "synsets": []},
    ]
    table = {"object_id": 5, "x": 0, "y": 50, "w": 200, "h": 50, "name": "table", "synsets": []}
    image = {"image_id": 1, "width": 200, "height": 100}
    relations = [("Holds", entities[1], entities[0]), ("on", entities[0], table),
                 ("eats", entities[2], entities[0])]  # fmt: skip
    files.write_json(tmp_path / "image_data.json", [image])
    if whole:
        rows = [
            {"predicate": p, "subject_id": s["object_id"], "object_id": o["object_id"]}
            for p, s, o in relations
        ]
        graph = {"image_id": 1, "objects": [*entities, table], "relationships": rows}
        files.write_json(tmp_path / "scene_graphs.json", [graph])
    else:
        rows = [{"predicate": p, "subject": s, "object": o} for p, s, o in relations]
        files.write_json(tmp_path / "objects.json", [{"image_id": 1, "objects": entities}])
        files.write_json(tmp_path / "relationships.json", [{"image_id": 1, "relationships": rows}])
    (tmp_path / "object_alias.txt").write_text("cup,mug,beaker\n")
    (tmp_path / "relationship_alias.txt").write_text("holding,holds\n")
    source = read_visual_genome(tmp_path, files.NAMES, files.PREDICATES)
    (record,) = source.checked()
    assert_known(record, 0)


def gqa_graph():
    names = {"1001": "cup", "1002": "hand", "1003": "table"}
    objects = {}
    for row, (number, name) in enumerate(names.items()):
        x1, y1, x2, y2 = files.BOXES[0][row]
        objects[number] = {
            "name": name, "x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1, "attributes": [],
            "relations": [],
        }  # fmt: skip
    objects["1001"]["relations"] = [{"name": "on", "object": "1003"}]
    objects["1002"]["relations"] = [{"name": "holding", "object": "1001"}]
    return {"n161313": {"width": 200, "height": 100, "objects": objects}}


def test_gqa_relations_hang_on_their_subjects(tmp_path):
    path = files.write_json(tmp_path / "train_sceneGraphs.json", gqa_graph())
    assert detect_format(path).name == "gqa"
    source = read_gqa(path, tmp_path)
    assert (source.entity_names, source.predicate_names) == (files.NAMES, files.PREDICATES)
    (record,) = source.checked()
    assert record["image_id"] == "n161313"
    relations = {tuple(relation.values()) for relation in record["relations"]}
    assert relations == {(1, 0, 0), (0, 2, 1)}
    broken = gqa_graph()
    broken["n161313"]["objects"]["1001"]["relations"][0]["object"] = "77"
    files.write_json(path, broken)
    with pytest.raises(
        ValueError, match=r"Image n161313: `relations\[0\]\.object`.*got '77', which"
    ):
        list(read_gqa(path, tmp_path).checked())


def test_gqa200_counts_from_1(tmp_path):
    files.write_json(
        tmp_path / "GQA_200_ID_Info.json",
        {"ind_to_classes": ["__background__", *files.NAMES],
         "ind_to_predicates": ["__background__", *files.PREDICATES]},
    )  # fmt: skip
    files.write_images(tmp_path, ["a.jpg", "b.jpg"])
    files.write_json(
        tmp_path / "GQA_200_Train.json",
        {
            "filenames_all": ["x/a.jpg", "x/b.jpg"],
            "img_info_all": [{"width": w, "height": h} for w, h in files.SIZES],
            "gt_boxes_all": files.BOXES,
            "gt_classes_all": [[label + 1 for label in labels] for labels in files.LABELS],
            "relationships_all": [[[s, o, p + 1] for s, o, p in rows] for rows in files.RELATIONS],
        },
    )
    assert detect_format(tmp_path).name == "gqa200"
    assert_source(read_gqa200(tmp_path, "train"))


def test_the_first_record_comes_without_reading_the_rest(tmp_path):
    """The files are cut off after their beginnings: whoever read on would fail."""
    entry = {
        "img_fn": "a", "img_size": [200, 100], "bbox": files.BOXES[0],
        "det_labels": files.LABELS[0], "rel": files.RELATIONS[0],
    }  # fmt: skip
    folder = files.write_open_images(tmp_path / "oi")
    path = folder / "annotations" / "vrd-train-anno.json"
    with path.open("w") as file:
        file.write("[" + ",\n".join([json.dumps(entry)] * 100_000) + ",{broken")
    source = read_open_images(folder, "train")
    assert_known(next(iter(source)), 0)
    with pytest.raises(ValueError, match="100000 entries were read before"):
        list(source)

    path = files.write_psg(tmp_path / "psg")
    entries = json.loads(path.read_text())
    data = entries.pop("data")
    with path.open("w") as file:
        file.write(json.dumps(entries)[:-1] + ', "data": [')
        file.write(",".join([json.dumps(data[0])] * 100_000))
    source = read_psg(path)
    assert_known(next(iter(source)), 0)
    with pytest.raises(ValueError, match="100000 entries were read before"):
        list(source)


def test_a_relation_to_a_missing_entity_is_an_error_or_counted(tmp_path):
    folder = files.write_open_images(tmp_path)
    path = folder / "annotations" / "vrd-train-anno.json"
    entries = json.loads(path.read_text())
    entries[1]["rel"].append([0, 5, 0])
    entries[1]["bbox"][0] = [50, 0, 40, 10]
    files.write_json(path, entries)
    source = read_open_images(folder, "train")
    with pytest.raises(ValueError, match=r"Image b: `objects\[0\]\.bbox`.*1 good records"):
        list(source.checked())
    report = DropReport()
    _, second = source.checked("drop", report)
    assert second["relations"] == []
    assert [entity["label"] for entity in second["objects"]] == [2]
    assert report.counts == {
        "objects with a wrong bbox": 1, "relations with a wrong object": 1,
        "relations of dropped objects": 1,
    }  # fmt: skip


def test_hub_columns_of_coco_parquet(tmp_path):
    folder = files.write_coco_rel_annotations(tmp_path / "coco", 1)
    entries = json.loads((folder / "train" / "_annotations.coco.json").read_text())
    rows = []
    for image in entries["images"]:
        objects = [
            {name: a[name] for name in ("id", "category_id", "bbox", "area", "iscrowd")}
            for a in entries["annotations"]
            if a["image_id"] == image["id"]
        ]
        relations = [
            {name: r[name] for name in ("id", "subject_id", "object_id", "predicate_id")}
            for r in entries["rel_annotations"]
            if r["image_id"] == image["id"]
        ]
        rows.append(
            {"image": str(folder / "train" / image["file_name"]), "image_id": image["id"],
             "width": image["width"], "height": image["height"], "file_name": image["file_name"],
             "objects": objects, "relations": relations}
        )  # fmt: skip
    target = tmp_path / "parquet"
    target.mkdir()
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    dataset.to_parquet(target / "train-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="names of"):
        read_coco_parquet(target, "train")
    names = {name: entries[name] for name in ("categories", "rel_categories")}
    files.write_json(target / "categories.json", names)
    assert detect_format(target).name == "coco-parquet"
    records = list(read_coco_parquet(target, "train").checked())
    for row, record in enumerate(records):
        assert_known(record, row)
        assert record["image"]["bytes"] is not None or record["image"]["path"]


def test_unknown_formats_are_errors_with_a_remedy(tmp_path):
    path = files.write_json(tmp_path / "some.json", {"entries": []})
    with pytest.raises(ValueError, match=r"first entries: entries.*--from"):
        detect_format(path)
    with pytest.raises(ValueError, match=r"folder.*--from"):
        detect_format(tmp_path)
    with pytest.raises(ValueError, match="must be one of parquet"):
        open_dataset(path, "train", "yolo")
