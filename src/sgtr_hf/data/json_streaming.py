"""Reads parts of JSON files that are larger than memory, one entry after the other."""

import json
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson


# Vocabularies stand at the end of most files; 4 MiB hold tens of thousands of names.
_END_BYTES = 2**22


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


def read_json(path: Path) -> Any:
    """Return a whole file, for those that are small.

    Raises:
        ValueError: If it is missing or not JSON.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_list(path: Path, name: str) -> list[Any]:
    """Return a whole list of the top level; [] without one.

    It is looked for at the end of the file first, then from its beginning, no further than the
    list's end. Errors are those of `stream_items`.
    """
    found = _list_at_end(path, name) if path.is_file() else None
    if found is None:
        found = next(_guarded(path, lambda file: ijson.items(file, name, use_float=True)), [])
    if not isinstance(found, list):
        raise ValueError(f"{path}: `{name}` must be a list, got {type(found).__name__}.")
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


def has_name(path: Path, name: str) -> bool:
    """Tell whether a file has a dictionary with this name in it, without parsing the file."""
    if path.stat().st_size == 0:
        return False
    quoted = json.dumps(name).encode()
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        position = content.find(quoted)
        while position >= 0:
            end = position + len(quoted)
            if content[end : end + 16].lstrip().startswith(b":"):
                return True
            position = content.find(quoted, end)
    return False


def _list_at_end(path: Path, name: str) -> list[Any] | None:
    """Find a list of the top level in the last bytes of a file."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _END_BYTES, 0))
        content = file.read()
    position = content.rfind(json.dumps(name).encode())
    if position < 0:
        return None
    try:
        # The rest of the file closes one bracket more than it opens, if and only if the name
        # belongs to the outermost dictionary.
        entries: dict[str, Any] = json.loads(b"{" + content[position:])
    except ValueError:
        return None
    return entries.get(name)


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
            # The other lines draw an arrow below the place.
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{path} is not JSON, or ends too early, after {count} entries: {reason}."
            ) from error
