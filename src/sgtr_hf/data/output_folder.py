"""How data sets get onto a disk: whole, or not at all, and without keeping them in memory."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from .record_checks import picture_bytes, picture_reason
from .record_source import Record


_SUFFIXES = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}


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
    try:
        content = picture_bytes(entry)
        Image.open(io.BytesIO(content)).verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Image {record['image_id']}: the picture {entry.get('path')} cannot be read: "
            f"{picture_reason(error)}."
        ) from error
    return {"bytes": content, "path": Path(entry.get("path") or "").name or None}


def write_image(record: Record, folder: Path) -> str:
    """Write a record's picture into a folder as it is, and return its file name.

    Raises:
        ValueError: If it cannot be read, or another record of this id was written.
    """
    content = embedded_image(record)["bytes"]
    suffix = _SUFFIXES.get(Image.open(io.BytesIO(content)).format or "", ".img")
    name = f"{record['image_id']}{suffix}".replace("/", "_")
    try:
        with (folder / name).open("xb") as file:
            file.write(content)
    except FileExistsError as error:
        raise ValueError(
            f"Image {record['image_id']}: there are two records whose picture is {name}; ids of "
            "images must differ."
        ) from error
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


class JsonLists:
    """A JSON file of several lists that grow at the same time, without keeping them in memory.

    Args:
        path: The file, which is there once `finish` was called.
        names: Of the lists.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self.counts = path, dict.fromkeys(names, 0)
        self.parts = {name: path.with_name(f".{path.name}.{name}") for name in names}
        self.files = {name: part.open("w") for name, part in self.parts.items()}

    def __enter__(self) -> "JsonLists":
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
