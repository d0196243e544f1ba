"""The first record of a long file comes without the rest of it, and memory stays small."""

import json
import tracemalloc

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dataset_files as files
from sgtr_hf.data.coco_reader import read_coco, read_coco_rel, read_coco_rel_annotations
from sgtr_hf.data.dataset_formats import FORMATS
from sgtr_hf.data.gqa_reader import read_gqa, read_gqa200
from sgtr_hf.data.open_images_reader import read_open_images, read_open_images_csv
from sgtr_hf.data.parquet_reader import read_coco_parquet, read_parquet
from sgtr_hf.data.psg_reader import read_psg
from sgtr_hf.data.schema import scene_graph_features
from sgtr_hf.data.vg150_reader import read_vg150
from sgtr_hf.data.visual_genome_reader import read_visual_genome


COUNT = 100_000
# More than a record and a parser's buffers, far less than a file of so many records.
MEMORY_LIMIT = 4 * 2**20
# The files are cut off at their ends: whoever reads on fails.
BROKEN = ', {"broken'


def repeat(entry):
    return ",".join([json.dumps(entry)] * COUNT)


def numbered(entry, name, first):
    """The same entry again and again, with another number each time."""
    before, after = json.dumps(entry | {name: "#"}).split('"#"')
    return ",".join(f"{before}{number}{after}" for number in range(first, first + COUNT))


def long_open_images(folder):
    files.write_open_images(folder)
    path = folder / "annotations" / "vrd-train-anno.json"
    first = json.loads(path.read_text())[0]
    path.write_text(f"[{repeat(first)}{BROKEN}")
    return read_open_images(folder, "train")


def long_psg(folder):
    path = files.write_psg(folder)
    entries = json.loads(path.read_text())
    first = entries.pop("data")[0]
    path.write_text(f'{json.dumps(entries)[:-1]}, "data": [{repeat(first)}{BROKEN}')
    return read_psg(path)


def long_coco_lists(path, names):
    """Lengthen the lists of a COCO file: all images before all annotations, as is usual."""
    entries = json.loads(path.read_text())
    of_first = {
        name: [entry for entry in entries[name] if entry["image_id"] == 10] for name in names
    }
    rest = {name: value for name, value in entries.items() if name not in ("images", *names)}
    lists = [f'"images": [{numbered(entries["images"][0], "id", first=10)}]']
    for number, name in enumerate(names):
        later = numbered(of_first[name][0], "image_id", first=11)
        # Only the last list may break off: JSON goes on after the others.
        end = BROKEN if number == len(names) - 1 else "]"
        lists.append(f'"{name}": [{json.dumps(of_first[name])[1:-1]}, {later}{end}')
    path.write_text(f"{json.dumps(rest)[:-1]}, {', '.join(lists)}")


def long_coco(folder):
    files.write_coco_rel(folder)
    long_coco_lists(folder / "train.json", ["annotations"])
    return read_coco(folder / "train.json")


def long_coco_rel(folder):
    files.write_coco_rel(folder)
    long_coco_lists(folder / "train.json", ["annotations"])
    triplets = json.dumps([[s, o, p + 1] for s, o, p in files.RELATIONS[0]])
    rows = ",".join(f'"{10 + number}": {triplets}' for number in range(COUNT))
    names = json.dumps({"rel_categories": ["__background__", *files.PREDICATES]})
    (folder / "rel.json").write_text(f'{names[:-1]}, "train": {{{rows}, "broken')
    return read_coco_rel(folder, "train")


def long_coco_rel_annotations(folder):
    files.write_coco_rel_annotations(folder, 1)
    path = folder / "train" / "_annotations.coco.json"
    long_coco_lists(path, ["annotations", "rel_annotations"])
    return read_coco_rel_annotations(path)


def long_visual_genome(folder):
    files.write_visual_genome(folder)
    for name in ("image_data.json", "scene_graphs.json"):
        first = json.loads((folder / name).read_text())[0]
        (folder / name).write_text(f"[{repeat(first)}{BROKEN}")
    return read_visual_genome(folder, files.NAMES, files.PREDICATES)


def long_pair(folder):
    """Visual Genome's objects and relationships in files of their own."""
    files.write_visual_genome(folder, whole=False)
    for name in ("image_data.json", "objects.json", "relationships.json"):
        first = json.loads((folder / name).read_text())[0]
        (folder / name).write_text(f"[{repeat(first)}{BROKEN}")
    return read_visual_genome(folder, files.NAMES, files.PREDICATES)


def long_gqa(folder):
    graph = json.dumps(next(iter(files.gqa_graph().values())))
    path = folder / "train_sceneGraphs.json"
    rows = (f'"n{number}": {graph}' for number in range(COUNT))
    path.write_text("{" + ",".join(rows) + ', "broken')
    return read_gqa(path, folder, files.NAMES, files.PREDICATES)


def long_gqa200(folder):
    files.write_gqa200(folder)
    columns = files.gqa200_columns()
    lists = [f'"{name}": [{repeat(rows[0])}' for name, rows in columns.items()]
    (folder / "GQA_200_Train.json").write_text("{" + "], ".join(lists) + BROKEN)
    return read_gqa200(folder, "train")


def long_csv(folder):
    path = files.write_open_images_csv(folder)
    header, *lines = path.read_text().splitlines()
    last = lines[2]
    # The rest belongs to one more image, whose numbers nobody could read.
    path.write_text("\n".join([header, *lines[:2], *[last.replace("b,", "c,0,", 1)] * COUNT]))
    descriptions = folder / "oidv6-class-descriptions.csv"
    return read_open_images_csv(
        path, descriptions, folder / "images", predicate_names=files.PREDICATES
    )


def long_vg150(folder):
    files.write_vg150(folder)
    with h5py.File(folder / "VG-SGG-with-attri.h5", "r+") as file:
        for name in ("split", *(f"img_to_{end}_{kind}" for end in ("first", "last")
                                for kind in ("box", "rel"))):  # fmt: skip
            values = file[name][:]
            del file[name]
            file[name] = np.concatenate((values, np.repeat(values[-1:], COUNT)))
        file["split"][:] = 2
    first = {"image_id": 1, "width": 200, "height": 100}
    (folder / "image_data.json").write_text(f"[{repeat(first)}{BROKEN}")
    return read_vg150(folder, "test")


def record():
    entities = zip(files.BOXES[0], files.LABELS[0], strict=True)
    return {
        "image": {"path": None, "bytes": b"picture"}, "image_id": "a", "width": 200, "height": 100,
        "objects": [{"id": i, "bbox": box, "label": label}
                    for i, (box, label) in enumerate(entities)],
        "relations": [{"subject": s, "object": o, "predicate": p}
                      for s, o, p in files.RELATIONS[0]],
    }  # fmt: skip


def write_groups(path, row, features=None):
    """Write a row as often as a long file has it, a thousand times a group."""
    table = datasets.Dataset.from_list([row], features=features).with_format("arrow")[:]
    group = pa.concat_tables([table] * 1000).combine_chunks()
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(COUNT // 1000):
            writer.write_table(group)


def break_after_two_groups(path):
    """Overwrite the other groups; the end of the file, which says where they are, stays.

    One group is read ahead.
    """
    third = pq.read_metadata(path).row_group(2).column(0)
    start = min(third.dictionary_page_offset or third.data_page_offset, third.data_page_offset)
    content = path.read_bytes()
    # Before the last four bytes, which are a name, there is the length of what tells the places.
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:start] + b"\xff" * (end - start) + content[end:])


def long_parquet(folder):
    path = folder / "train-00000-of-00001.parquet"
    write_groups(path, record(), scene_graph_features(files.NAMES, files.PREDICATES))
    break_after_two_groups(path)
    return read_parquet(folder, "train")


def long_coco_parquet(folder):
    rows, names = files.coco_rows(files.write_coco_rel_annotations(folder / "coco", 1))
    files.write_json(folder / "hub" / "categories.json", names)
    path = folder / "hub" / "train-00000-of-00001.parquet"
    write_groups(path, rows[0] | {"image": {"path": "a.jpg", "bytes": b"picture"}})
    break_after_two_groups(path)
    return read_coco_parquet(folder / "hub", "train")


def parquet_shards(folder):
    """Shards of which the second is broken, but for its end, which tells its length."""
    features = scene_graph_features(files.NAMES, files.PREDICATES)
    dataset = datasets.Dataset.from_list([record()] * 1000, features=features)
    dataset.to_parquet(folder / "train-00000-of-00002.parquet")
    content = (folder / "train-00000-of-00002.parquet").read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    broken = content[:4] + b"\xff" * (footer - 4) + content[footer:]
    (folder / "train-00001-of-00002.parquet").write_bytes(broken)
    return read_parquet(folder, "train")


READERS = {
    "open-images": long_open_images, "psg": long_psg, "coco": long_coco,
    "coco-rel": long_coco_rel, "coco-rel-annotations": long_coco_rel_annotations,
    "visual-genome": long_visual_genome, "visual-genome-pair": long_pair, "gqa": long_gqa,
    "gqa200": long_gqa200, "open-images-csv": long_csv, "vg150": long_vg150,
    "parquet": long_parquet, "coco-parquet": long_coco_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_the_first_record_comes_without_the_rest(name, tmp_path):
    source = READERS[name](tmp_path)
    first = next(iter(source))
    triplets = {(r["subject"], r["object"], r["predicate"]) for r in first["relations"]}
    # Plain COCO has no relations.
    assert len(triplets) == (0 if name == "coco" else len(files.RELATIONS[0]))
    assert len(first["objects"]) == len(files.BOXES[0])
    if "parquet" in name:
        assert source.count == COUNT


def test_every_reader_is_among_them():
    assert set(FORMATS) <= set(READERS)


@pytest.mark.parametrize("name", ["coco", "open-images", "vg150"])
def test_lists_that_are_passed_over_need_no_memory(name, tmp_path):
    source = READERS[name](tmp_path)
    tracemalloc.start()
    try:
        next(iter(source))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT


def test_a_file_that_breaks_off_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr("test_dataset_streaming.COUNT", 50)
    with pytest.raises(
        ValueError, match=r"vrd-train-anno\.json is not JSON.*after 50 entries.* 50 good"
    ):
        list(long_open_images(tmp_path))


def test_the_first_record_of_shards_comes_without_the_others(tmp_path):
    source = parquet_shards(tmp_path)
    assert source.count == 2000
    first = next(iter(source))
    assert len(first["objects"]) == 3
    with pytest.raises(ValueError, match=r"a shard cannot be read.* 1000 good records were read"):
        list(source)
    (tmp_path / "train-00001-of-00002.parquet").write_bytes(b"broken")
    with pytest.raises(
        ValueError, match=r"train-00001-of-00002\.parquet is not a readable Parquet"
    ):
        read_parquet(tmp_path, "train")
