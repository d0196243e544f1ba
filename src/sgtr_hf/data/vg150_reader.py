"""Reads VG150: Visual Genome with 150 classes and 50 predicates, as HDF5 beside two JSON files."""

import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .json_streaming import read_json, stream_items
from .record_source import Reading, Record, RecordSource


# Boxes are stored for images whose longer side has this many pixels.
BOX_SCALE = 1024
# The first images of the training split that have relations.
NUM_VALIDATION = 5000
# Broken files that `image_data.json` lists and the HDF5 file leaves out.
MISSING_IMAGES = frozenset({1592, 1722, 4616, 4617})
IMAGE_PLACES = ("VG_100K", "VG_100K_2", "VG_100K.zip", "VG_100K_2.zip", "images.zip", "images2.zip")
SPLIT_NUMBERS = {"train": 0, "validation": 0, "test": 2}
DATASETS = (
    *("labels", f"boxes_{BOX_SCALE}", "predicates", "relationships", "split"),
    *("img_to_first_box", "img_to_last_box", "img_to_first_rel", "img_to_last_rel"),
)

FindImage = Callable[[int], dict[str, Any]]


def read_vg150(
    path: str | Path,
    split: str,
    images: Sequence[str | Path] | None = None,
    *,
    num_validation: int = NUM_VALIDATION,
    without_relations: bool = False,
) -> RecordSource:
    """Read a split.

    Args:
        path: The HDF5 file, or the folder of the only one; its dictionaries and
            `image_data.json` are beside it.
        split: "train", "validation" or "test"; validation is the beginning of the training split.
        images: Folders or zip files of the images, searched in this order; by default `VG_100K`
            and `VG_100K_2` in the folder, as folders or zip files.
        num_validation: Images of the validation split.
        without_relations: Also images that have entities alone.

    Returns:
        Records; boxes are in pixels of the image, relations as annotated, duplicates included.

    Raises:
        ValueError: If a file or split is missing, or the files do not belong together.
        ImportError: If h5py is not installed.
    """
    if split not in SPLIT_NUMBERS:
        raise ValueError(f"`split` must be one of {', '.join(SPLIT_NUMBERS)}, got {split!r}.")
    path = Path(path)
    annotations = _find_file(path, "*.h5") if path.is_dir() else path
    folder = annotations.parent
    dictionaries_path = _find_dictionaries(annotations)
    dictionaries = read_json(dictionaries_path)
    for name in ("idx_to_label", "idx_to_predicate"):
        if name not in dictionaries:
            raise ValueError(f"{dictionaries_path} has no `{name}`.")
    rows = _rows_of_split(annotations, split, num_validation, without_relations=without_relations)
    attribute_names = _names(dictionaries.get("idx_to_attribute", {}))
    if "attributes" not in _datasets_of(annotations):
        attribute_names = []
    find_image = _image_finder(folder, images)

    def records(reading: Reading) -> Iterator[Record]:
        import h5py

        with h5py.File(annotations, "r") as file:
            chosen = _chosen_images(folder / "image_data.json", annotations, rows)
            yield from reading.records(
                chosen,
                lambda entry: _record(file, *entry, find_image, bool(attribute_names)),
                lambda entry: entry[1]["image_id"],
            )

    return RecordSource(
        _names(dictionaries["idx_to_label"]),
        _names(dictionaries["idx_to_predicate"]),
        records,
        str(annotations),
        attribute_names=attribute_names,
        count=len(rows),
    )


def _datasets_of(annotations: Path) -> set[str]:
    import h5py

    try:
        with h5py.File(annotations, "r") as file:
            found = set(file)
    except OSError as error:
        raise ValueError(f"{annotations} is not a readable HDF5 file: {error}") from error
    missing = set(DATASETS) - found
    if missing:
        raise ValueError(f"{annotations} lacks {', '.join(sorted(missing))}; is it VG150?")
    return found


def _rows_of_split(
    annotations: Path, split: str, num_validation: int, *, without_relations: bool
) -> np.ndarray:
    import h5py

    _datasets_of(annotations)
    with h5py.File(annotations, "r") as file:
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


def _chosen_images(
    image_data: Path, annotations: Path, rows: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a split with their images, and compare the lengths in the end.

    Rows of the HDF5 file are the listed images without the four broken ones.
    """
    import h5py

    with h5py.File(annotations, "r") as file:
        is_chosen = np.zeros(len(file["split"]), dtype=np.bool_)
    is_chosen[rows] = True
    count = 0
    for image in stream_items(image_data, "item"):
        if image["image_id"] in MISSING_IMAGES:
            continue
        if count < len(is_chosen) and is_chosen[count]:
            yield count, image
        count += 1
    if count != len(is_chosen):
        raise ValueError(
            f"{image_data} lists {count} images (without the four broken ones), but {annotations} "
            f"has {len(is_chosen)}; they do not belong together."
        )


def _record(
    file: Any, row: int, image: dict[str, Any], find_image: FindImage, with_attributes: bool
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
    ends = file["relationships"][first : last + 1].astype(np.int64) - first_object
    predicates = file["predicates"][first : last + 1, 0].astype(np.int64) - 1
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
        raise ValueError(
            f"{folder} must hold one file {pattern}, found {names}; name the HDF5 file itself."
        )
    return found[0]


def _find_dictionaries(annotations: Path) -> Path:
    """Of several dictionaries, those named like the HDF5 file belong to it."""
    alike = annotations.with_name(f"{annotations.stem.replace('VG-SGG', 'VG-SGG-dicts')}.json")
    return alike if alike.is_file() else _find_file(annotations.parent, "*dicts*.json")


def _image_finder(folder: Path, images: Sequence[str | Path] | None) -> FindImage:
    """Return a function from image id to the image entry of a record."""
    if images is None:
        images = [folder / name for name in IMAGE_PLACES if (folder / name).exists()]
    for path in images:
        if not (Path(path).is_dir() or zipfile.is_zipfile(path)):
            raise ValueError(f"The images {path} must be a folder or a zip file.")
    folders = [Path(path) for path in images if Path(path).is_dir()]
    archives = [zipfile.ZipFile(path) for path in images if not Path(path).is_dir()]
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
            return {"path": name, "bytes": _unpack(*members[name])}
        # Annotations can be looked at without the images.
        return {"path": name, "bytes": None}

    return find


def _unpack(archive: zipfile.ZipFile, member: str) -> bytes:
    try:
        return archive.read(member)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{member} of {archive.filename} is damaged: {error}") from error
