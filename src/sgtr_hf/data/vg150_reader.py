"""Reads VG150: Visual Genome with 150 classes and 50 predicates, as HDF5 beside two JSON files."""

import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .json_streaming import stream_items
from .record_source import Record, RecordSource


# Boxes are stored for images whose longer side has this many pixels.
BOX_SCALE = 1024
# The first images of the training split that have relations.
NUM_VALIDATION = 5000
# Broken files that `image_data.json` lists and the HDF5 file leaves out.
MISSING_IMAGES = frozenset({1592, 1722, 4616, 4617})
IMAGE_PLACES = ("VG_100K", "VG_100K_2", "VG_100K.zip", "VG_100K_2.zip", "images.zip", "images2.zip")
SPLIT_NUMBERS = {"train": 0, "validation": 0, "test": 2}


def read_vg150(
    folder: str | Path,
    split: str,
    images: Sequence[str | Path] | None = None,
    *,
    num_validation: int = NUM_VALIDATION,
    without_relations: bool = False,
) -> RecordSource:
    """Read a split.

    Args:
        folder: Holds the HDF5 file, its dictionaries and `image_data.json`.
        split: "train", "validation" or "test"; validation is the beginning of the training split.
        images: Folders or zip files of the images, searched in this order; by default `VG_100K`
            and `VG_100K_2` in `folder`, as folders or zip files.
        num_validation: Images of the validation split.
        without_relations: Also images that have entities alone.

    Returns:
        Records; boxes are in pixels of the image, relations as annotated, duplicates included.

    Raises:
        ValueError: If a file or split is missing, or the files do not belong together.
        ImportError: If h5py is not installed.
    """
    folder = Path(folder)
    if split not in SPLIT_NUMBERS:
        raise ValueError(f"`split` must be one of {', '.join(SPLIT_NUMBERS)}, got {split!r}.")
    annotations = _find_file(folder, "*.h5")
    dictionaries = json.loads(_find_file(folder, "*dicts*.json").read_text())
    find_image = _image_finder(folder, images)
    attribute_names = _names(dictionaries.get("idx_to_attribute", {}))

    def records() -> Iterator[Record]:
        return _read(
            annotations,
            folder / "image_data.json",
            partial(_rows_of_split, split=split, num_validation=num_validation,
                    without_relations=without_relations),
            find_image,
            with_attributes=bool(attribute_names),
        )  # fmt: skip

    return RecordSource(
        _names(dictionaries["idx_to_label"]),
        _names(dictionaries["idx_to_predicate"]),
        records,
        attribute_names=attribute_names,
    )


def _read(
    annotations: Path,
    image_data: Path,
    rows_of_split: Callable[[Any], np.ndarray],
    find_image: Callable[[int], dict[str, Any]],
    *,
    with_attributes: bool,
) -> Iterator[Record]:
    import h5py

    with h5py.File(annotations, "r") as file:
        with_attributes = with_attributes and "attributes" in file
        chosen = np.zeros(len(file["split"]), dtype=np.bool_)
        chosen[rows_of_split(file)] = True
        row = -1
        for row, image in enumerate(_listed_images(image_data)):
            if row >= len(chosen):
                break
            if chosen[row]:
                yield _record(file, row, image, find_image, with_attributes=with_attributes)
        if row != len(chosen) - 1:
            raise ValueError(
                f"{image_data} lists {row + 1} images (without the four broken ones), but "
                f"{annotations} has {len(chosen)}; they do not belong together."
            )


def _listed_images(path: Path) -> Iterator[dict[str, Any]]:
    """Images in the order of the HDF5 rows, which skip the four broken ones."""
    for image in stream_items(path, "item"):
        if image["image_id"] not in MISSING_IMAGES:
            yield image


def _rows_of_split(
    file: Any, *, split: str, num_validation: int, without_relations: bool
) -> np.ndarray:
    has_boxes = file["img_to_first_box"][:] >= 0
    has_relations = file["img_to_first_rel"][:] >= 0
    is_split = (file["split"][:] == SPLIT_NUMBERS[split]) & has_boxes
    rows = np.flatnonzero(is_split & has_relations)
    if split == "validation":
        return rows[:num_validation]
    if split == "train":
        validation, rows = rows[:num_validation], rows[num_validation:]
    if without_relations:
        rows = np.flatnonzero(is_split)
        if split == "train":
            rows = np.setdiff1d(rows, validation)
    return rows


def _record(
    file: Any,
    row: int,
    image: dict[str, Any],
    find_image: Callable[[int], dict[str, Any]],
    *,
    with_attributes: bool,
) -> Record:
    first, last = int(file["img_to_first_box"][row]), int(file["img_to_last_box"][row])
    centres_and_sizes = file[f"boxes_{BOX_SCALE}"][first : last + 1].astype(np.float64)
    corner = centres_and_sizes[:, :2] - centres_and_sizes[:, 2:] / 2
    boxes = np.concatenate((corner, corner + centres_and_sizes[:, 2:]), axis=1)
    width, height = int(image["width"]), int(image["height"])
    boxes = (boxes * (max(width, height) / BOX_SCALE)).clip(0, [width, height] * 2)
    labels = file["labels"][first : last + 1, 0] - 1
    objects: list[dict[str, Any]] = [
        {"id": first + index, "bbox": box, "label": int(label)}
        for index, (box, label) in enumerate(zip(boxes.tolist(), labels, strict=True))
    ]
    if with_attributes:
        attributes = file["attributes"][first : last + 1]
        for entity, numbers in zip(objects, attributes, strict=True):
            # Padded with 0; the first attribute has number 1.
            entity["attributes"] = [int(number) - 1 for number in numbers if number > 0]
    return {
        "image": find_image(image["image_id"]),
        "image_id": str(image["image_id"]),
        "width": width,
        "height": height,
        "objects": objects,
        "relations": _relations(file, row, first),
    }


def _relations(file: Any, row: int, first_object: int) -> list[dict[str, int]]:
    """Relations point to rows of all objects of all images."""
    first, last = int(file["img_to_first_rel"][row]), int(file["img_to_last_rel"][row])
    if first < 0:
        return []
    ends = file["relationships"][first : last + 1] - first_object
    predicates = file["predicates"][first : last + 1, 0] - 1
    return [
        {"subject": int(subject), "object": int(object_), "predicate": int(predicate)}
        for (subject, object_), predicate in zip(ends, predicates, strict=True)
    ]


def _names(entries: dict[str, str]) -> list[str]:
    """Names in the order of their numbers, which begin at 1."""
    return [entries[number] for number in sorted(entries, key=int)]


def _find_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} must hold one file {pattern}, found {names}.")
    return found[0]


def _image_finder(
    folder: Path, images: Sequence[str | Path] | None
) -> Callable[[int], dict[str, Any]]:
    """Return a function from image id to the image entry of a record."""
    if images is None:
        names = (
            "VG_100K",
            "VG_100K_2",
            "VG_100K.zip",
            "VG_100K_2.zip",
            "images.zip",
            "images2.zip",
        )
        images = [folder / name for name in names if (folder / name).exists()]
    folders = [Path(path) for path in images if Path(path).is_dir()]
    archives = [zipfile.ZipFile(path) for path in images if Path(path).suffix == ".zip"]
    members = {
        Path(name).name: (archive, name)
        for archive in reversed(archives)
        for name in archive.namelist()
    }

    def find(image_id: int) -> dict[str, Any]:
        name = f"{image_id}.jpg"
        for place in folders:
            if (place / name).is_file():
                return {"path": str(place / name), "bytes": None}
        if name in members:
            archive, member = members[name]
            return {"path": name, "bytes": archive.read(member)}
        # Annotations can be looked at without the images.
        return {"path": name, "bytes": None}

    return find
