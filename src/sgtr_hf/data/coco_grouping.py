"""Brings the lists of a COCO file together, image by image, without reading them whole."""

import itertools
import json
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .json_streaming import stream_items


class UnorderedAnnotationsError(ValueError):
    """Annotations that do not follow the order of the images; an index is needed."""


class CocoImage(NamedTuple):
    """An image of a COCO file with its entries of the other lists."""

    image: dict[str, Any]
    annotations: list[dict[str, Any]]
    relations: list[dict[str, Any]]


def group_by_image(path: Path, *, index: bool, relations: bool) -> Iterator[CocoImage]:
    """Yield images with their annotations.

    Args:
        path: The JSON file.
        index: Look entries up in a temporary database; else follow the lists side by side, which
            needs all of them in the order of the images.
        relations: Read `rel_annotations` too.

    Raises:
        UnorderedAnnotationsError: Without an index, if the lists are not in one order.
        ValueError: If an entry does not say which image it belongs to, or names one that is not
            listed.
    """
    lists = ("annotations", "rel_annotations") if relations else ("annotations",)
    return _look_up(path, lists) if index else _follow(path, lists)


def _follow(path: Path, lists: tuple[str, ...]) -> Iterator[CocoImage]:
    cursors = [_Cursor(path, name) for name in lists]
    passed: set[Any] = set()
    for image in _images(path):
        groups = [cursor.take(image["id"], passed) for cursor in cursors]
        passed.add(image["id"])
        yield CocoImage(image, groups[0], groups[1] if len(groups) > 1 else [])
    for cursor in cursors:
        cursor.check_end(passed)


def _images(path: Path) -> Iterator[dict[str, Any]]:
    for number, image in enumerate(stream_items(path, "images.item")):
        if not isinstance(image, dict) or "id" not in image:
            raise ValueError(f"{path}: entry {number} of `images` lacks `id`.")
        yield image


def _entries(path: Path, name: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield the entries of a list with their images' ids."""
    for number, entry in enumerate(stream_items(path, f"{name}.item")):
        if not isinstance(entry, dict) or "image_id" not in entry:
            raise ValueError(f"{path}: entry {number} of `{name}` lacks `image_id`.")
        yield entry["image_id"], entry


class _Cursor:
    """Groups of entries of one image, one after the other."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.groups = itertools.groupby(_entries(path, name), key=lambda pair: pair[0])
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
            raise UnorderedAnnotationsError(
                f"{self.path}: `{self.name}` has entries of the image {self.next[0]}, which "
                "`images` does not list, or not in this order; read with an index, `index=True` "
                "or `--index`."
            )

    def _check(self, passed: set[Any]) -> None:
        if self.next is not None and self.next[0] in passed:
            raise UnorderedAnnotationsError(
                f"{self.path}: `{self.name}` are not in the order of `images` (image "
                f"{self.next[0]} comes again); read with an index, `index=True` or `--index`."
            )

    def _advance(self) -> None:
        found = next(self.groups, None)
        self.next = None if found is None else (found[0], [entry for _, entry in found[1]])


def _look_up(path: Path, lists: tuple[str, ...]) -> Iterator[CocoImage]:
    with tempfile.TemporaryDirectory() as folder:
        database = sqlite3.connect(Path(folder) / "index.sqlite")
        try:
            for name in lists:
                _fill(database, path, name)
            for image in _images(path):
                found = [_take(database, name, image["id"]) for name in lists]
                yield CocoImage(image, found[0], found[1] if len(found) > 1 else [])
            for name in lists:
                _check_all_taken(database, path, name)
        finally:
            database.close()


def _fill(database: sqlite3.Connection, path: Path, name: str) -> None:
    database.execute(f"CREATE TABLE {name} (image, entry, taken)")
    database.executemany(
        f"INSERT INTO {name} VALUES (?, ?, 0)",
        ((image_id, json.dumps(entry)) for image_id, entry in _entries(path, name)),
    )
    database.execute(f"CREATE INDEX {name}_image ON {name} (image)")


def _take(database: sqlite3.Connection, name: str, image_id: Any) -> list[dict[str, Any]]:
    rows = database.execute(
        f"SELECT entry FROM {name} WHERE image = ? ORDER BY rowid", (image_id,)
    ).fetchall()
    database.execute(f"UPDATE {name} SET taken = 1 WHERE image = ?", (image_id,))
    return [json.loads(entry) for (entry,) in rows]


def _check_all_taken(database: sqlite3.Connection, path: Path, name: str) -> None:
    row = database.execute(f"SELECT image FROM {name} WHERE taken = 0 LIMIT 1").fetchone()
    if row is not None:
        raise ValueError(
            f"{path}: `{name}` has entries of the image {row[0]}, which `images` does not list."
        )
