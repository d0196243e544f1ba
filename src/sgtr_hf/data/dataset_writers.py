"""Writes records as Parquet shards, COCO with relations, or PSG; whole, or not at all."""

import io
import itertools
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image

from .dataset_card import write_dataset_card
from .output_folder import JsonLists, embedded_image, unfinished_folder, write_image
from .record_source import Record, RecordSource


# Images of a shard: some tens of megabytes.
SHARD_IMAGES = 1000
# What `datasets` takes for the name of a split.
_SPLIT_NAME = r"\w+(\.\w+)*"
# Ids of images beyond any that a data set counts.
_FIRST_FREE_ID = 2**40
# Segment ids of a panoptic picture have three bytes; 0 is no segment.
_MAX_SEGMENT_ID = 2**24 - 1


def write_parquet(
    source: RecordSource,
    records: Iterable[Record],
    output: Path,
    split: str,
    *,
    embed_images: bool = True,
    shard_images: int = SHARD_IMAGES,
) -> int:
    """Write shards in the one schema, readable by `datasets.load_dataset(output)`, and a card.

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
    if not re.fullmatch(_SPLIT_NAME, split):
        raise ValueError(f"`split` must be made of letters, digits and _, got {split!r}.")
    if any(output.glob(f"{split}-*-of-*.parquet")):
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
    write_dataset_card(output, Path(source.place).name)
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
    image_ids = _ImageIds()
    with (
        unfinished_folder(output, split, keep=True) as folder,
        JsonLists(folder / "_annotations.coco.json", names) as lists,
    ):
        for record in records:
            image = image_ids.entry(record, write_image(record, folder))
            lists.add("images", image)
            ids = [next(numbers["annotations"]) for _ in record["objects"]]
            for annotation_id, entity in zip(ids, record["objects"], strict=True):
                lists.add("annotations", _coco_annotation(entity, annotation_id, image["id"]))
            for relation in record["relations"]:
                entry = {
                    "id": next(numbers["rel_annotations"]),
                    "image_id": image["id"],
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
    """Write `{split}.json`, an entry of `rel.json` (RelTR, EGTR), and the images in `{split}`.

    Categories and predicates count from 1, background before them; arguments and errors as of
    `write_parquet`.
    """
    relation_path, path = output / "rel.json", output / f"{split}.json"
    relations: dict[str, Any] = {}
    if relation_path.is_file():
        relations = json.loads(relation_path.read_text())
    if split in relations or path.exists():
        raise ValueError(f"{relation_path} has a split {split!r} already; name a new folder.")
    of_split: dict[str, list[list[int]]] = {}
    numbers, image_ids = itertools.count(1), _ImageIds()
    with unfinished_folder(output, split, keep=True) as folder:
        with JsonLists(folder / path.name, ("images", "annotations")) as lists:
            for record in records:
                file_name = f"{split}/{write_image(record, folder)}"
                image = image_ids.entry(record, file_name)
                lists.add("images", image)
                for entity in record["objects"]:
                    lists.add("annotations", _coco_annotation(entity, next(numbers), image["id"]))
                of_split[str(image["id"])] = [
                    [row["subject"], row["object"], row["predicate"] + 1]
                    for row in record["relations"]
                ]
            lists.finish(categories=_categories(source.entity_names))
        relations[split] = of_split
        relations["rel_categories"] = ["__background__", *source.predicate_names]
        (folder / relation_path.name).write_text(json.dumps(relations))
    for name in (path.name, relation_path.name):
        (output / split / name).replace(output / name)
    return len(of_split)


def write_psg(source: RecordSource, records: Iterable[Record], output: Path, split: str) -> int:
    """Write `psg.json` with boxes; masks become panoptic pictures where the records have any.

    All classes are listed as things, since the schema does not tell things and stuff apart. A file
    holds one split; arguments and errors as of `write_parquet`.
    """
    with (
        unfinished_folder(output, split, keep=True) as folder,
        JsonLists(folder / "psg.json", ("data", "test_image_ids")) as lists,
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


class Writer(NamedTuple):
    """A format that can be written.

    Args:
        write: Takes source, records, output folder and split; returns the number of images.
        validation: What the format calls the validation split.
        keeps: Those of attributes and masks that the format holds.
    """

    write: Callable[..., int]
    validation: str
    keeps: frozenset[str] = frozenset()

    def lost(self, source: RecordSource) -> list[str]:
        """Name what the records of a source have and this format has not."""
        has = {"attributes": bool(source.attribute_names), "masks": source.has_masks}
        return [name for name, present in has.items() if present and name not in self.keeps]

    def split_name(self, split: str) -> str:
        """Return what the format calls a split: "validation" and "val" are one."""
        return self.validation if split in ("validation", "val") else split


WRITERS: dict[str, Writer] = {
    "parquet": Writer(write_parquet, "validation", frozenset({"attributes", "masks"})),
    "coco-rel-annotations": Writer(write_coco_rel_annotations, "val"),
    "coco-rel": Writer(write_coco_rel, "val"),
    "psg": Writer(write_psg, "val", frozenset({"masks"})),
}


class _ImageIds:
    """Numbers for images, as COCO needs: their own ids, if the first image has a number for one.

    An id that is no number, or all of them if the first is none, is kept beside the number.
    """

    def __init__(self) -> None:
        self.counter: itertools.count[int] | None = None
        self.are_own = False

    def entry(self, record: Record, file_name: str) -> dict[str, Any]:
        """Return the entry of an image in `images`."""
        image_id = record["image_id"]
        is_number = image_id.isascii() and image_id.isdigit() and str(int(image_id)) == image_id
        if self.counter is None:
            self.are_own = is_number
            self.counter = itertools.count(_FIRST_FREE_ID if is_number else 1)
        is_own = self.are_own and is_number
        entry = {
            "id": int(image_id) if is_own else next(self.counter),
            "file_name": file_name,
            "width": record["width"],
            "height": record["height"],
        }
        return entry if is_own else entry | {"original_id": image_id}


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
    segment_ids = _segment_ids(record)
    segments = [
        {
            "id": number,
            "category_id": entity["label"],
            "iscrowd": 0,
            "isthing": 1,
            "area": int(_area(entity)),
        }
        for number, entity in zip(segment_ids, record["objects"], strict=True)
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
    if any(entity.get("mask") for entity in record["objects"]):
        entry["pan_seg_file_name"] = _write_panoptic(record, segment_ids, folder)
    return entry


def _segment_ids(record: Record) -> list[int]:
    """Their own ids, where a panoptic picture can hold them; else numbers from 1."""
    ids = [entity["id"] for entity in record["objects"]]
    fits = len(set(ids)) == len(ids) and all(0 < number <= _MAX_SEGMENT_ID for number in ids)
    return ids if fits else list(range(1, len(ids) + 1))


def _area(entity: dict[str, Any]) -> float:
    x1, y1, x2, y2 = entity["bbox"]
    return float((x2 - x1) * (y2 - y1))


def _write_panoptic(record: Record, segment_ids: list[int], folder: Path) -> str:
    """Paint the segments one over the other; a panoptic picture gives a pixel to one alone."""
    ids = np.zeros((record["height"], record["width"]), dtype=np.int64)
    for number, entity in zip(segment_ids, record["objects"], strict=True):
        mask = Image.open(io.BytesIO(entity["mask"]["bytes"]))
        ids[np.asarray(mask, dtype=np.bool_)] = number
    colors = np.stack((ids % 256, ids // 256 % 256, ids // 256**2), axis=-1).astype(np.uint8)
    name = f"{record['image_id']}-panoptic.png".replace("/", "_")
    Image.fromarray(colors).save(folder / name)
    return name
