"""Reads parts of JSON files that are larger than memory, one entry after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson


def stream_items(path: Path, prefix: str) -> Iterator[Any]:
    """Yield the entries of a list.

    Args:
        path: A JSON file.
        prefix: Where the list is, as `ijson` writes it: "images.item", or "item" at the top.

    Raises:
        ValueError: If the file is missing, or is not JSON from some entry on.
    """
    yield from _guarded(path, lambda file: ijson.items(file, prefix, use_float=True))


def stream_pairs(path: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a dictionary; arguments and errors as of `stream_items`."""
    yield from _guarded(path, lambda file: ijson.kvitems(file, prefix, use_float=True))


def read_list(path: Path, name: str) -> list[Any]:
    """Return a whole list of the top level, reading no further than its end; [] without one.

    Errors are those of `stream_items`.
    """
    found: list[Any] = next(
        _guarded(path, lambda file: ijson.items(file, name, use_float=True)), []
    )
    return found


def top_level_names(path: Path, limit_bytes: int = 2**16) -> list[str]:
    """Return the names that a JSON file's dictionary begins with; none if it is a list.

    Args:
        path: A JSON file.
        limit_bytes: How much of it to read.
    """
    names: list[str] = []
    with path.open("rb") as file:
        beginning = file.read(limit_bytes)
    try:
        for prefix, event, value in ijson.parse(beginning):
            if prefix == "" and event == "map_key":
                names.append(value)
    except ijson.JSONError:
        # The beginning ends somewhere in the middle.
        pass
    return names


def _guarded(path: Path, open_items: Any) -> Iterator[Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    count = 0
    with path.open("rb") as file:
        try:
            for item in open_items(file):
                yield item
                count += 1
        except ijson.JSONError as error:
            raise ValueError(
                f"{path} is not JSON, or ends too early: {error}; {count} entries were read before."
            ) from error
