"""Reads COCO files: detection alone, and the two ways in which projects add relations to them."""

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .json_streaming import read_list, stream_items, stream_pairs
from .record_source import Record, RecordSource


class UnorderedAnnotationsError(ValueError):
    """Annotations that do not follow the order of the images; an index is needed."""


class Numbering(NamedTuple):
    """How the numbers of a file become positions in a vocabulary."""

    names: list[str]
    positions: dict[int, int]

    def position(self, number: int) -> int:
        """Return the position, or -1 if the number has no name; the check reports it."""
        return self.positions.get(number, -1)


def read_coco(
    path: str | Path, images: str | Path | None = None, *, index: bool = False
) -> RecordSource:
    """Read COCO detection: boxes without relations. Crowds are left out.

    Args:
        path: The JSON file.
        images: Folder of the images; that of the file if None.
        index: Read the annotations into a temporary database first, for files whose annotations
            are not in the order of their images; else the file is streamed.

    Raises:
        ValueError: If the file is missing or is not COCO.
    """
    path = Path(path)
    categories = number_names(read_list(path, "categories"), str(path), "categories")

    def records() -> Iterator[Record]:
        for image, annotations, _ in _images(path, index=index, relations=False):
            yield _record(image, annotations, [], categories, _folder(path, images))

    return RecordSource(categories.names, (), records)


def read_coco_rel(
    folder: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    index: bool = False,
    predicate_offset: int | None = None,
) -> RecordSource:
    """Read COCO with a `rel.json` beside it, as RelTR and EGTR do.

    Relations name the positions of subject and object in the image's list of annotations.

    Args:
        folder: Holds `train.json`, `val.json`, `test.json` and `rel.json`.
        split: "train", "val" or "test".
        images: Folder of the images; `folder` if None.
        index: As of `read_coco`.
        predicate_offset: Number of the first predicate: 1 if the list of names begins with
            background, which is recognised, else 0.

    Raises:
        ValueError: If a file is missing or is not in this format.
    """
    folder = Path(folder)
    path, relation_path = folder / f"{split}.json", folder / "rel.json"
    categories = number_names(read_list(path, "categories"), str(path), "categories")
    predicates = [str(name) for name in read_list(relation_path, "rel_categories")]
    if predicate_offset is None:
        predicate_offset = int(bool(predicates) and is_background(predicates[0]))

    def records() -> Iterator[Record]:
        relations = _RelationsByImage(relation_path, split)
        for image, annotations, _ in _images(path, index=index, relations=False):
            rows = [
                {"subject": subject, "object": object_, "predicate": predicate - predicate_offset}
                for subject, object_, predicate in relations.of(image["id"])
            ]
            # Crowds count in the positions.
            yield _record(image, annotations, rows, categories, _folder(path, images), crowds=True)

    return RecordSource(categories.names, predicates[predicate_offset:], records)


def read_coco_rel_annotations(
    path: str | Path, images: str | Path | None = None, *, index: bool = False
) -> RecordSource:
    """Read COCO with `rel_annotations`, as SGG-Benchmark does, counted from 0 or from 1.

    Relations name the ids of subject and object annotations. A category called background is left
    out of the vocabulary; no number is taken to be it.

    Args:
        path: The JSON file.
        images: Folder of the images; that of the file if None.
        index: As of `read_coco`.

    Raises:
        ValueError: If the file is missing or is not in this format.
    """
    path = Path(path)
    categories = number_names(read_list(path, "categories"), str(path), "categories")
    predicates = number_names(read_list(path, "rel_categories"), str(path), "rel_categories")

    def records() -> Iterator[Record]:
        for image, annotations, relations in _images(path, index=index, relations=True):
            positions = {entry["id"]: row for row, entry in enumerate(annotations)}
            if not index:
                _check_ends(path, image, relations, positions)
            rows = [
                {
                    "subject": positions.get(relation["subject_id"], -1),
                    "object": positions.get(relation["object_id"], -1),
                    "predicate": predicates.position(relation["predicate_id"]),
                }
                for relation in relations
            ]
            yield _record(image, annotations, rows, categories, _folder(path, images), crowds=True)

    return RecordSource(categories.names, predicates.names, records)


def _check_ends(
    path: Path,
    image: dict[str, Any],
    relations: Sequence[dict[str, Any]],
    positions: dict[int, int],
) -> None:
    """In a streamed file, an end that is missing may only come later."""
    for relation in relations:
        for name in ("subject_id", "object_id"):
            if relation[name] not in positions:
                raise UnorderedAnnotationsError(
                    f"{path}: image {image['id']} has a relation whose {name} {relation[name]} is "
                    "not among its annotations, which may not be in the order of `images`; read "
                    "with an index, `index=True` or `--index`."
                )


def is_background(name: str) -> bool:
    """Tell whether a name in a vocabulary stands for nothing."""
    return name.strip("_ ").lower() in ("background", "no_relation", "no relation", "n/a", "bg")


def number_names(entries: Iterable[dict[str, Any]], source: str, field: str) -> Numbering:
    """Order categories by their ids, without background.

    Raises:
        ValueError: If there is none.
    """
    named = sorted((int(entry["id"]), str(entry["name"])) for entry in entries)
    named = [(number, name) for number, name in named if not is_background(name)]
    if not named:
        raise ValueError(f"{source} has no `{field}`; is it in another format?")
    names = [name for _, name in named]
    return Numbering(names, {number: position for position, (number, _) in enumerate(named)})


def _folder(path: Path, images: str | Path | None) -> Path:
    return path.parent if images is None else Path(images)


def _record(
    image: dict[str, Any],
    annotations: Sequence[dict[str, Any]],
    relations: list[dict[str, int]],
    categories: Numbering,
    folder: Path,
    *,
    crowds: bool = False,
) -> Record:
    objects = []
    for annotation in annotations:
        if annotation.get("iscrowd") and not crowds:
            continue
        x, y, width, height = annotation["bbox"]
        objects.append(
            {
                "id": annotation["id"],
                "bbox": [x, y, x + width, y + height],
                "label": categories.position(annotation["category_id"]),
            }
        )
    return {
        "image": {"path": str(folder / image["file_name"]), "bytes": None},
        "image_id": str(image["id"]),
        "width": image["width"],
        "height": image["height"],
        "objects": objects,
        "relations": relations,
    }


_Grouped = Iterator[tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]]


def _images(path: Path, *, index: bool, relations: bool) -> _Grouped:
    """Yield images with their annotations and relations."""
    if index:
        return _indexed_images(path, relations=relations)
    return _streamed_images(path, relations=relations)


def _streamed_images(path: Path, *, relations: bool) -> _Grouped:
    """Follow the lists of a file side by side, as long as all are in the order of the images."""
    cursors = [_Cursor(path, "annotations")]
    if relations:
        cursors.append(_Cursor(path, "rel_annotations"))
    passed: set[Any] = set()
    for image in stream_items(path, "images.item"):
        groups = [cursor.take(image["id"], passed) for cursor in cursors]
        passed.add(image["id"])
        yield image, groups[0], groups[1] if relations else []
    for cursor in cursors:
        cursor.check_end(passed)


class _Cursor:
    """Groups of entries of one image, one after the other."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.groups = itertools.groupby(
            stream_items(path, f"{name}.item"), key=lambda entry: entry["image_id"]
        )
        self.next: tuple[Any, list[dict[str, Any]]] | None = None
        self._advance()

    def take(self, image_id: Any, passed: set[Any]) -> list[dict[str, Any]]:
        """Return the entries of an image, none if the next ones are another image's."""
        self._check(passed)
        if self.next is None or self.next[0] != image_id:
            return []
        entries = self.next[1]
        self._advance()
        return entries

    def check_end(self, passed: set[Any]) -> None:
        """Reject entries that no image has taken."""
        self._check(passed)
        if self.next is not None:
            raise ValueError(
                f"{self.path}: `{self.name}` has entries of the image {self.next[0]}, which "
                "`images` does not list, or not in this order."
            )

    def _check(self, passed: set[Any]) -> None:
        if self.next is not None and self.next[0] in passed:
            raise UnorderedAnnotationsError(
                f"{self.path}: `{self.name}` are not in the order of `images` (image "
                f"{self.next[0]} comes again); read with an index, `index=True` or `--index`."
            )

    def _advance(self) -> None:
        found = next(self.groups, None)
        self.next = None if found is None else (found[0], list(found[1]))


def _indexed_images(path: Path, *, relations: bool) -> _Grouped:
    """Look annotations up in a temporary database, which keeps memory small."""
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(Path(folder) / "index.sqlite")
        try:
            names = ("annotations", "rel_annotations") if relations else ("annotations",)
            for name in names:
                database.execute(f"CREATE TABLE {name} (image, entry)")
                database.executemany(
                    f"INSERT INTO {name} VALUES (?, ?)",
                    (
                        (entry["image_id"], json.dumps(entry))
                        for entry in stream_items(path, f"{name}.item")
                    ),
                )
                database.execute(f"CREATE INDEX {name}_image ON {name} (image)")
            for image in stream_items(path, "images.item"):
                found = [
                    [
                        json.loads(entry)
                        for (entry,) in database.execute(
                            f"SELECT entry FROM {name} WHERE image = ? ORDER BY rowid",
                            (image["id"],),
                        )
                    ]
                    for name in names
                ]
                yield image, found[0], found[1] if relations else []
        finally:
            database.close()


class _RelationsByImage:
    """Relations of a split of `rel.json`, in the order of the images or in any."""

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        self.pairs = stream_pairs(path, split)
        self.waiting: dict[str, list[list[int]]] = {}

    def of(self, image_id: Any) -> list[list[int]]:
        """Return the relations of an image; those that come before it wait in memory."""
        wanted = str(image_id)
        if wanted in self.waiting:
            return self.waiting.pop(wanted)
        for name, relations in self.pairs:
            if name == wanted:
                return relations
            self.waiting[name] = relations
        raise ValueError(
            f"{self.path}: `{self.split}` has no entry for image {wanted}; every image needs one, "
            "be it empty."
        )
