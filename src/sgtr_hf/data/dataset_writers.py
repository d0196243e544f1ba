"""Writes records as Parquet shards, COCO with relations, or PSG; whole, or not at all."""

import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .record_source import Record, RecordSource


# Images of a shard: some tens of megabytes.
SHARD_IMAGES = 1000
_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


def write_parquet(
    source: RecordSource,
    records: Iterable[Record],
    output: Path,
    split: str,
    *,
    embed_images: bool = True,
    shard_images: int = SHARD_IMAGES,
) -> int:
    """Write shards in the one schema, readable by `datasets.load_dataset(output)`.

    Args:
        source: Gives the vocabularies.
        records: Of the source, checked.
        output: Folder of the data set; other splits in it stay.
        split: Name of the split.
        embed_images: Put the pictures into the shards; else their paths.
        shard_images: Images of a shard.

    Returns:
        Number of images.

    Raises:
        ValueError: If a picture cannot be read, or the split is there already.
    """
    if any(output.glob(f"{split}-*.parquet")):
        raise ValueError(f"{output} has a split {split!r} already; name a new folder.")
    features = source.features()
    count = 0
    with unfinished_folder(output, f".{split}") as folder:
        shards: list[Path] = []
        iterator = iter(records)
        while rows := list(itertools.islice(iterator, shard_images)):
            if embed_images:
                rows = [row | {"image": embedded_image(row)} for row in rows]
            shard = folder / f"{len(shards)}.parquet"
            datasets.Dataset.from_list(rows, features=features).to_parquet(shard)
            shards.append(shard)
            count += len(rows)
        for number, shard in enumerate(shards):
            shard.rename(output / f"{split}-{number:05d}-of-{len(shards):05d}.parquet")
    return count


def write_coco_rel_annotations(
    source: RecordSource, records: Iterable[Record], output: Path, split: str
) -> int:
    """Write `{split}/_annotations.coco.json` with `rel_annotations` (SGG-Benchmark), and images.

    Ids of annotations and relations count from 1 over the split, those of categories from 1, as
    that project's loader needs. Boxes become x, y, width, height; arguments and errors as of
    `write_parquet`.
    """
    names = ("images", "annotations", "rel_annotations")
    numbers = {name: itertools.count(1) for name in names}
    with (
        unfinished_folder(output, split, keep=True) as folder,
        _JsonLists(folder / "_annotations.coco.json", names) as lists,
    ):
        for record in records:
            image_id = next(numbers["images"])
            file_name = write_image(record, folder)
            lists.add("images", _coco_image(record, image_id, file_name))
            ids = [next(numbers["annotations"]) for _ in record["objects"]]
            for annotation_id, entity in zip(ids, record["objects"], strict=True):
                lists.add("annotations", _coco_annotation(entity, annotation_id, image_id))
            for relation in record["relations"]:
                entry = {
                    "id": next(numbers["rel_annotations"]),
                    "image_id": image_id,
                    "subject_id": ids[relation["subject"]],
                    "object_id": ids[relation["object"]],
                    "predicate_id": relation["predicate"] + 1,
                }
                lists.add("rel_annotations", entry)
        lists.finish(
            categories=_categories(source.entity_names),
            rel_categories=_categories(source.predicate_names),
        )
    return lists.counts["images"]


def write_coco_rel(
    source: RecordSource, records: Iterable[Record], output: Path, split: str
) -> int:
    """Write `{split}.json` and an entry of `rel.json` (RelTR, EGTR), and the images beside them.

    Categories and predicates count from 1, background before them; arguments and errors as of
    `write_parquet`.
    """
    output.mkdir(parents=True, exist_ok=True)
    relation_path = output / "rel.json"
    relations: dict[str, Any] = {}
    if relation_path.is_file():
        relations = json.loads(relation_path.read_text())
    if split in relations:
        raise ValueError(f"{relation_path} has a split {split!r} already; name a new folder.")
    of_split: dict[str, list[list[int]]] = {}
    numbers = itertools.count(1)
    with _JsonLists(output / f"{split}.json", ("images", "annotations")) as lists:
        for image_id, record in enumerate(records, start=1):
            file_name = write_image(record, output)
            lists.add("images", _coco_image(record, image_id, file_name))
            for entity in record["objects"]:
                lists.add("annotations", _coco_annotation(entity, next(numbers), image_id))
            of_split[str(image_id)] = [
                [row["subject"], row["object"], row["predicate"] + 1] for row in record["relations"]
            ]
        lists.finish(categories=_categories(source.entity_names))
    relations[split] = of_split
    relations["rel_categories"] = ["__background__", *source.predicate_names]
    relation_path.write_text(json.dumps(relations))
    return len(of_split)


def write_psg(source: RecordSource, records: Iterable[Record], output: Path, split: str) -> int:
    """Write `psg.json` with boxes; masks become panoptic pictures where the records have any.

    All classes are listed as things, since the schema does not tell things and stuff apart. A file
    holds one split; arguments and errors as of `write_parquet`.
    """
    with (
        unfinished_folder(output, split, keep=True) as folder,
        _JsonLists(folder / "psg.json", ("data", "test_image_ids")) as lists,
    ):
        for record in records:
            lists.add("data", _psg_entry(record, folder))
            if split == "test":
                lists.add("test_image_ids", record["image_id"])
        lists.finish(
            thing_classes=list(source.entity_names),
            stuff_classes=[],
            predicate_classes=list(source.predicate_names),
        )
    return lists.counts["data"]


WRITERS: dict[str, Callable[[RecordSource, Iterable[Record], Path, str], int]] = {
    "parquet": write_parquet,
    "coco-rel-annotations": write_coco_rel_annotations,
    "coco-rel": write_coco_rel,
    "psg": write_psg,
}


def embedded_image(record: Record) -> dict[str, Any]:
    """Return the image entry of a record with the bytes of its file, which are not changed.

    Raises:
        ValueError: If the file is missing or is not a picture.
    """
    entry = record["image"]
    if isinstance(entry, Image.Image):
        file = io.BytesIO()
        entry.save(file, entry.format or "PNG")
        return {"bytes": file.getvalue(), "path": None}
    content = entry.get("bytes")
    try:
        if content is None:
            content = Path(entry["path"]).read_bytes()
        Image.open(io.BytesIO(content)).verify()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"Image {record['image_id']}: the picture {entry.get('path')} cannot be read: {error}"
        ) from error
    return {"bytes": content, "path": Path(entry.get("path") or "").name or None}


def write_image(record: Record, folder: Path) -> str:
    """Write a record's picture into a folder as it is, and return its file name."""
    content = embedded_image(record)["bytes"]
    suffix = _SUFFIXES.get(Image.open(io.BytesIO(content)).format or "", ".img")
    name = f"{record['image_id']}{suffix}".replace("/", "_")
    (folder / name).write_bytes(content)
    return name


@contextmanager
def unfinished_folder(output: Path, name: str, *, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary folder in `output`; with `keep` it becomes `output/name` in the end.

    Raises:
        ValueError: If `output/name` is there already.
    """
    target = output / name
    if keep and target.exists():
        raise ValueError(f"{target} exists already; name a new folder.")
    output.mkdir(parents=True, exist_ok=True)
    folder = output / f".unfinished-{name.strip('.')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if keep:
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _JsonLists:
    """A JSON file of several lists that grow at the same time, without keeping them in memory."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self.counts = path, dict.fromkeys(names, 0)
        self.parts = {name: path.with_name(f".{path.name}.{name}") for name in names}
        self.files = {name: part.open("w") for name, part in self.parts.items()}

    def __enter__(self) -> "_JsonLists":
        return self

    def __exit__(self, *_: object) -> None:
        for name, file in self.files.items():
            file.close()
            self.parts[name].unlink(missing_ok=True)

    def add(self, name: str, entry: Any) -> None:
        """Append to a list."""
        separator = ",\n" if self.counts[name] else ""
        self.files[name].write(separator + json.dumps(entry))
        self.counts[name] += 1

    def finish(self, **others: Any) -> None:
        """Write the file, with other entries after the lists."""
        with self.path.open("w") as target:
            target.write("{")
            for name, file in self.files.items():
                file.close()
                target.write(f'"{name}": [\n')
                with self.parts[name].open() as part:
                    shutil.copyfileobj(part, target)
                target.write("\n],\n")
            rest = ",\n".join(f'"{name}": {json.dumps(entry)}' for name, entry in others.items())
            target.write(rest + "}\n")


def _coco_image(record: Record, image_id: int, file_name: str) -> dict[str, Any]:
    sizes = {name: record[name] for name in ("width", "height")}
    return {"id": image_id, "file_name": file_name, **sizes}


def _coco_annotation(entity: dict[str, Any], annotation_id: int, image_id: int) -> dict[str, Any]:
    x1, y1, x2, y2 = entity["bbox"]
    width, height = x2 - x1, y2 - y1
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": entity["label"] + 1,
        "bbox": [x1, y1, width, height],
        "area": width * height,
        "iscrowd": 0,
    }


def _categories(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def _psg_entry(record: Record, folder: Path) -> dict[str, Any]:
    segments = [
        {
            "id": number,
            "category_id": entity["label"],
            "iscrowd": 0,
            "isthing": 1,
            "area": int(_area(entity)),
        }
        for number, entity in enumerate(record["objects"], start=1)
    ]
    entry = {
        "file_name": write_image(record, folder),
        "height": record["height"],
        "width": record["width"],
        "image_id": record["image_id"],
        "segments_info": segments,
        "annotations": [
            {"bbox": list(entity["bbox"]), "bbox_mode": 0, "category_id": entity["label"]}
            for entity in record["objects"]
        ],
        "relations": [
            [row["subject"], row["object"], row["predicate"]] for row in record["relations"]
        ],
    }
    if any("mask" in entity for entity in record["objects"]):
        entry["pan_seg_file_name"] = _write_panoptic(record, folder)
    return entry


def _area(entity: dict[str, Any]) -> float:
    x1, y1, x2, y2 = entity["bbox"]
    return float((x2 - x1) * (y2 - y1))


def _write_panoptic(record: Record, folder: Path) -> str:
    """Paint the segments one over the other; a panoptic picture gives a pixel to one alone."""
    ids = np.zeros((record["height"], record["width"]), dtype=np.int64)
    for number, entity in enumerate(record["objects"], start=1):
        mask = Image.open(io.BytesIO(entity["mask"]["bytes"]))
        ids[np.asarray(mask, dtype=np.bool_)] = number
    colors = np.stack((ids % 256, ids // 256 % 256, ids // 256**2), axis=-1).astype(np.uint8)
    name = f"{record['image_id']}-panoptic.png"
    Image.fromarray(colors).save(folder / name)
    return name
