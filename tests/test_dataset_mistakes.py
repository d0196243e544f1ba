"""What is wrong in a file is named by file, image and field, and dropped only on request."""

import json
import math
import zipfile

import h5py
import pytest
from PIL import Image

import dataset_files as files
import sgtr_hf
from sgtr_hf.data.coco_reader import read_coco, read_coco_rel, read_coco_rel_annotations
from sgtr_hf.data.dataset_formats import open_dataset
from sgtr_hf.data.gqa_reader import read_gqa, read_gqa200
from sgtr_hf.data.open_images_reader import read_open_images, read_open_images_csv
from sgtr_hf.data.psg_reader import read_psg
from sgtr_hf.data.record_source import DropReport, RecordSource
from sgtr_hf.data.vg150_reader import read_vg150
from sgtr_hf.data.visual_genome_reader import read_visual_genome


def change(path, edit):
    entries = json.loads(path.read_text())
    edit(entries)
    path.write_text(json.dumps(entries))


def open_images(folder, edit):
    files.write_open_images(folder)
    change(folder / "annotations" / "vrd-train-anno.json", edit)
    return read_open_images(folder, "train")


def psg(folder, edit):
    path = files.write_psg(folder)
    change(path, lambda content: edit(content["data"]))
    return read_psg(path, masks=True)


def coco(folder, edit):
    path = files.write_coco_rel(folder) / "train.json"
    change(path, edit)
    return read_coco(path)


def coco_rel(folder, edit):
    files.write_coco_rel(folder)
    change(folder / "rel.json", lambda content: edit(content["train"]))
    return read_coco_rel(folder, "train")


def coco_rel_annotations(folder, edit):
    path = files.write_coco_rel_annotations(folder, 1) / "train" / "_annotations.coco.json"
    change(path, edit)
    return read_coco_rel_annotations(path, index=True)


def gqa(folder, edit):
    path = files.write_json(folder / "train_sceneGraphs.json", files.gqa_graph())
    change(path, lambda content: edit(content["n161313"]))
    return read_gqa(path, folder, files.NAMES, files.PREDICATES)


def gqa200(folder, edit):
    files.write_gqa200(folder)
    change(folder / "GQA_200_Train.json", edit)
    return read_gqa200(folder, "train")


def visual_genome(folder, edit):
    files.write_visual_genome(folder)
    change(folder / "scene_graphs.json", lambda content: edit(content[0]))
    return read_visual_genome(folder, files.NAMES, files.PREDICATES)


def put(*path):
    """Set the value at a path of keys; the last of the arguments is the value."""
    *keys, last, value = path

    def edit(entries):
        for key in keys:
            entries = entries[key]
        if value is None:
            del entries[last]
        else:
            entries[last] = value

    return edit


# Format, what is done to its file, and the words of the message after the file's name.
MISTAKES = [
    (open_images, put(1, "bbox", None), r"entry 1 \(image b\) lacks `bbox`\. 1 good records"),
    (open_images, put(1, "img_fn", None), r"entry 1 lacks `img_fn`"),
    (open_images, put(1, "bbox", 0, [1, 2, 3]), r"image b\).*`bbox` must be four numbers"),
    (open_images, put(1, "bbox", 0, [9, 9, 5, 20]), r"Image b: `objects\[0\]\.bbox`.*80 x 160"),
    (open_images, put(1, "bbox", 0, [5, 5, 1e400, 9]), "not JSON|bbox"),
    (open_images, put(1, "bbox", [[1, 2, 3, 4]]), "one length, got 1 and 2"),
    (open_images, put(1, "det_labels", 0, 3), r"`objects\[0\]\.label` must be from 0 to 2, got 3"),
    (open_images, put(1, "det_labels", 0, "cup"), "`det_labels` must be a whole number"),
    (open_images, put(1, "rel", [[0, 5, 0]]), r"`relations\[0\]\.object` must be from 0 to 1"),
    (open_images, put(1, "rel", [[0, 1, 2]]), r"`relations\[0\]\.predicate`.*0 to 1, got 2"),
    (open_images, put(1, "rel", [[0, 1]]), "`rel` must hold subject, object and predicate"),
    (open_images, put(1, "img_size", [0, 9]), "Image b: `width` and `height` must be above 0"),
    (psg, put(1, "segments_info", None), r"entry 1 \(image id1\) lacks `segments_info`"),
    (psg, put(1, "annotations", 0, "bbox_mode", 4), "`bbox_mode` must be 0"),
    (psg, put(1, "pan_seg_file_name", "no.png"), "panoptic picture .*no.png cannot be opened"),
    (coco, put("annotations", 4, "bbox", None), r"entry 1 \(image 11\) lacks `bbox`"),
    (coco, put("annotations", 4, "bbox", [1, 2, "3", 4]), "`bbox` must be four numbers"),
    (coco, put("annotations", 4, "image_id", None), "entry 4 of `annotations` lacks `image_id`"),
    (coco, put("annotations", 4, "category_id", 9), r"label`.*got 9, which stands for nothing"),
    (coco, put("images", 1, "width", 2.5), "`width` must be a whole number, got 2.5"),
    (coco, put("images", 1, "id", None), "entry 1 of `images` lacks `id`"),
    (coco, put("categories", 0, "id", None), "each of `categories` must have `id` and `name`"),
    (coco, put("categories", 0, "id", 2), "two of `categories` have the same id"),
    (coco_rel, put("11", [[0, 1, 0]]), r"`relations\[0\]\.predicate`.*got 0, which stands for"),
    (coco_rel, put("11", None), "no entry for image 11"),
    (coco_rel_annotations, put("rel_annotations", 2, "object_id", 99),
     r"`relations\[0\]\.object`.*got 99, which stands for nothing"),
    (coco_rel_annotations, put("rel_annotations", 2, "image_id", 99), "image 99, which `images`"),
    (gqa, put("objects", "1001", "w", None), r"entry 0 \(image n161313\) lacks `w`"),
    (gqa200, put("gt_classes_all", 1, [0, 1]), r"label`.*got 0, which stands for nothing"),
    (visual_genome, put("relationships", 0, "subject_id", 77), r"subject`.*got 77, which stands"),
    (visual_genome, put("objects", 0, "h", None), r"entry 0 \(image 1\) lacks `h`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("read", "edit", "words"),
    MISTAKES,
    ids=[f"{m[0].__name__}-{i}" for i, m in enumerate(MISTAKES)],
)
def test_mistakes_name_file_image_and_field(read, edit, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        list(read(tmp_path, edit).checked())
    assert str(tmp_path) in str(caught.value)


def test_numbers_that_are_none_are_mistakes(tmp_path):
    """JSON has no such numbers, Parquet has."""
    for value in (math.nan, math.inf, -math.inf):
        record = {
            "image": {"path": "x", "bytes": None}, "image_id": "x", "width": 10, "height": 10,
            "objects": [{"id": 0, "bbox": [1, 1, value, 5], "label": 0}], "relations": [],
        }  # fmt: skip
        source = RecordSource(["cup"], [], lambda _, record=record: iter([record]), "some.parquet")
        with pytest.raises(ValueError, match=r"some\.parquet: Image x: `objects\[0\]\.bbox`"):
            list(source.checked())


def test_what_is_dropped_is_counted(tmp_path):
    def edit(entries):
        entries[1]["rel"].append([0, 5, 0])
        entries[1]["bbox"][0] = [50, 0, 40, 10]
        entries.insert(1, {"img_fn": "c"})

    source = open_images(tmp_path, edit)
    with pytest.raises(ValueError, match=r"entry 1 \(image c\) lacks.*1 good records"):
        list(source.checked())
    report = DropReport()
    _, second = source.checked("drop", report)
    assert second["relations"] == []
    assert [entity["label"] for entity in second["objects"]] == [2]
    assert report.counts == {
        "broken records": 1, "objects with a wrong bbox": 1, "relations with a wrong object": 1,
        "relations of dropped objects": 1,
    }  # fmt: skip
    assert len(report.examples) == 4


def test_wrong_attributes_go_alone(tmp_path):
    folder = files.write_vg150(tmp_path)
    with h5py.File(folder / "VG-SGG-with-attri.h5", "r+") as file:
        file["attributes"][-1] = [9, 1]
    source = read_vg150(folder, "test")
    with pytest.raises(ValueError, match=r"`objects\[2\]\.attributes\[0\]`.*0 to 1, got 8"):
        list(source.checked())
    report = DropReport()
    (record,) = source.checked("drop", report)
    assert [entity["attributes"] for entity in record["objects"]] == [[1], [], [0]]
    assert report.counts == {"attributes with a wrong number": 1}


def test_pictures_are_decoded_on_request(tmp_path):
    folder = files.write_open_images(tmp_path)
    source = read_open_images(folder, "train")
    picture = folder / "images" / "b.jpg"
    content = picture.read_bytes()
    # Its beginning says what a whole picture would.
    picture.write_bytes(content[: len(content) // 2])
    assert len(list(source.checked())) == 2
    with pytest.raises(ValueError, match=r"Image b: the picture .*b\.jpg cannot be read.*1 good"):
        list(source.checked(pictures=True))
    picture.write_bytes(b"no picture")
    with pytest.raises(
        ValueError, match=r"b\.jpg cannot be read: it is not a picture of any known"
    ):
        list(source.checked(pictures=True))
    picture.unlink()
    with pytest.raises(ValueError, match=r"Image b: the picture .*No such file"):
        list(source.checked(pictures=True))
    Image.new("RGB", (160, 80)).save(picture)
    with pytest.raises(ValueError, match=r"Image b: `width` and `height` are 80 and 160.*160 x 80"):
        list(source.checked(pictures=True))
    report = DropReport()
    assert len(list(source.checked("drop", report, pictures=True))) == 1
    assert report.counts == {"images with a wrong size": 1}
    # A picture that lies on its side, and says so, is turned when it is opened.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (160, 80)).save(picture, exif=exif)
    assert len(list(source.checked(pictures=True))) == 2


@pytest.mark.parametrize("name", ["no.json", "no.parquet", "folder", "deep/in/folders"])
def test_paths_that_are_not_there(name, tmp_path):
    for path in (tmp_path / name, f"{name}/./x.csv"):
        with pytest.raises(ValueError, match="There is no file or folder"):
            open_dataset(path)
        with pytest.raises(ValueError, match="There is no file or folder"):
            sgtr_hf.data.load(path)


def test_what_ends_a_reading_says_how_far_it_came(tmp_path):
    """A file that is wrong as a whole cannot be read on, whoever asked to drop."""
    folder = files.write_vg150(tmp_path / "vg")
    listed = json.loads((folder / "image_data.json").read_text())
    del listed[-1]["image_id"]
    (folder / "image_data.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"VG-SGG.*the next entry lacks `image_id`\. 2 good"):
        list(read_vg150(folder, "train", num_validation=1).checked("drop"))
    path = files.write_open_images_csv(tmp_path / "csv")
    path.write_bytes(path.read_bytes() + b"c,/m/\xff\n")
    arguments = (path.parent / "oidv6-class-descriptions.csv", path.parent / "images")
    source = read_open_images_csv(path, *arguments, predicate_names=files.PREDICATES)
    with pytest.raises(ValueError, match=r"the next entry cannot be read.*utf-8.* 0 good records"):
        list(source.checked())
    folder = files.write_coco_rel(tmp_path / "coco")
    change(folder / "train.json", put("images", 1, "id", None))
    with pytest.raises(ValueError, match=r"entry 1 of `images` lacks `id`\. 1 good records"):
        list(read_coco_rel(folder, "train"))


def test_damaged_archives_name_the_picture(tmp_path):
    folder = files.write_vg150(tmp_path)
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        archive.writestr("VG_100K/1597.jpg", b"a picture")
    content = (folder / "images.zip").read_bytes()
    (folder / "images.zip").write_bytes(content.replace(b"a picture", b"A PICTURE"))
    words = r"image 1597\) cannot be read: VG_100K/1597\.jpg of .*images\.zip is damaged.*0 good"
    with pytest.raises(ValueError, match=words):
        list(read_vg150(folder, "test").checked())
    report = DropReport()
    assert list(read_vg150(folder, "test").checked("drop", report)) == []
    assert report.counts == {"broken records": 1}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("oidv6-class-descriptions.csv", "/m/c\n", "must have two columns"),
        ("oidv6-train-annotations-vrd.csv", "ImageID,LabelName1\n", "lacks the columns LabelName2"),
    ],
)
def test_wrong_csv_files(name, content, words, tmp_path):
    path = files.write_open_images_csv(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        read_open_images_csv(path, tmp_path / "oidv6-class-descriptions.csv", tmp_path / "images")


def test_wrong_csv_rows(tmp_path):
    path = files.write_open_images_csv(tmp_path)
    lines = path.read_text().splitlines()
    arguments = (path, tmp_path / "oidv6-class-descriptions.csv", tmp_path / "images")
    path.write_text("\n".join([*lines[:2], lines[2].replace("0.05", "zero", 1)]))
    with pytest.raises(ValueError, match=r"\(image a\).*`XMin1` must be a number, got 'zero'"):
        list(read_open_images_csv(*arguments).checked())
    path.write_text("\n".join([*lines[:2], lines[2].replace("/m/t", "/m/x")]))
    with pytest.raises(ValueError, match=r"label`.*got '/m/x', which stands for nothing"):
        list(read_open_images_csv(*arguments).checked())
    path.write_text("\n".join(lines))
    (tmp_path / "images" / "b.jpg").unlink()
    with pytest.raises(ValueError, match=r"\(image b\).*cannot be opened, but its size.*1 good"):
        list(read_open_images_csv(*arguments).checked())


def test_wrong_vg150_files(tmp_path):
    folder = files.write_vg150(tmp_path)
    path = folder / "VG-SGG-with-attri.h5"
    with pytest.raises(ValueError, match="must be a folder or a zip file"):
        read_vg150(folder, "test", [folder / "image_data.json"])
    with h5py.File(path, "r+") as file:
        file["relationships"][-1] = [0, 1]
    with pytest.raises(ValueError, match=r"Image 1597: `relations\[1\]\.subject`"):
        list(read_vg150(path, "test").checked())
    with h5py.File(path, "r+") as file:
        del file["split"]
    with pytest.raises(ValueError, match="lacks split; is it VG150"):
        read_vg150(folder, "test")
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable HDF5 file"):
        read_vg150(folder, "test")


@pytest.mark.parametrize(
    ("read", "arguments"),
    [
        (read_coco, ["no.json"]), (read_coco_rel, ["", "train"]),
        (read_coco_rel_annotations, ["no.json"]), (read_psg, ["no.json"]),
        (read_open_images, ["", "train"]), (read_open_images_csv, ["no.csv", "no.csv", ""]),
        (read_gqa, ["no.json", ""]), (read_gqa200, ["", "train"]),
        (read_visual_genome, ["", ["cup"], ["on"]]), (read_vg150, ["", "train"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)  # fmt: skip
def test_missing_files_are_named(read, arguments, tmp_path):
    paths = [
        tmp_path / value if isinstance(value, str) and value != "train" else value
        for value in arguments
    ]
    with pytest.raises(ValueError, match=r"There is no file|must hold one file"):
        list(read(*paths))
