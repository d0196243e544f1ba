"""Reads the scene graphs of Open Images V6: the processed JSON files, and the published CSV."""

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .json_streaming import read_json, stream_items
from .record_checks import box_from_corners, triplet, whole_number
from .record_source import Reading, Record, RecordSource, Unresolved


# How the published files are called.
CSV_PATTERN = "*{split}-annotations-vrd.csv"
# Names an attribute of an entity, not a relation between two.
_ATTRIBUTE = "is"
COLUMNS = ("ImageID", "LabelName1", "LabelName2", "XMin1", "XMax1", "YMin1", "YMax1", "XMin2",
           "XMax2", "YMin2", "YMax2", "RelationshipLabel")  # fmt: skip

Row = dict[str, str]


def read_open_images(
    folder: str | Path, split: str, images: str | Path | None = None
) -> RecordSource:
    """Read the processed files (PySGG, BGNN, SGTR): labels and predicates count from 0.

    Args:
        folder: Holds `annotations/vrd-{split}-anno.json` and `annotations/categories_dict.json`.
        split: "train", "val" or "test".
        images: Folder of the images; `images` in `folder` if None.

    Raises:
        ValueError: If a file is missing or is not in this format.
    """
    folder = Path(folder)
    path = folder / "annotations" / f"vrd-{split}-anno.json"
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    names = read_json(folder / "annotations" / "categories_dict.json")
    image_folder = folder / "images" if images is None else Path(images)

    def records(reading: Reading) -> Iterator[Record]:
        return reading.records(
            stream_items(path, "item"),
            lambda entry: _record(entry, image_folder),
            lambda entry: entry["img_fn"],
        )

    return RecordSource(list(names["obj"]), list(names["rel"]), records, str(path))


def _record(entry: dict[str, Any], folder: Path) -> Record:
    boxes, labels = entry["bbox"], entry["det_labels"]
    if len(boxes) != len(labels):
        raise ValueError(
            f"`bbox` and `det_labels` must have one length, got {len(boxes)} and {len(labels)}"
        )
    width, height = entry["img_size"]
    relations = (triplet(row, "rel") for row in entry["rel"])
    return {
        "image": {"path": str(folder / f"{entry['img_fn']}.jpg"), "bytes": None},
        "image_id": str(entry["img_fn"]),
        "width": whole_number(width, "img_size"),
        "height": whole_number(height, "img_size"),
        "objects": [
            {
                "id": index,
                "bbox": box_from_corners(box),
                "label": whole_number(label, "det_labels"),
            }
            for index, (box, label) in enumerate(zip(boxes, labels, strict=True))
        ],
        "relations": [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in relations
        ],
    }


def read_open_images_csv(
    path: str | Path,
    class_descriptions: str | Path,
    images: str | Path,
    *,
    predicate_names: list[str] | None = None,
) -> RecordSource:
    """Read `oidv6-*-annotations-vrd.csv`, whose rows are relations sorted by image.

    An entity is a distinct pair of class and box. "is", which names an attribute, is left out.

    Args:
        path: The CSV file.
        class_descriptions: CSV file of class codes and names.
        images: Folder of the images, which give the sizes that the normalised boxes need.
        predicate_names: Of the data set; those of the file and of other splits beside it, sorted,
            if None, for which these files are read as a whole.

    Raises:
        ValueError: If a file is missing, or the rows are not sorted by image.
    """
    path, image_folder = Path(path), Path(images)
    names = _class_names(Path(class_descriptions))
    if predicate_names is None:
        # One split does not have them all, and splits must agree on their numbers.
        files = {path, *path.parent.glob(CSV_PATTERN.format(split=""))}
        found = {row["RelationshipLabel"] for file in files for row in _rows(file)}
        predicate_names = sorted(found - {_ATTRIBUTE})
    labels = {code: position for position, code in enumerate(names)}
    predicates = {name: position for position, name in enumerate(predicate_names)}

    def records(reading: Reading) -> Iterator[Record]:
        def build(group: tuple[str, list[Row]]) -> Record:
            image_id, rows = group
            relations = [row for row in rows if row["RelationshipLabel"] != _ATTRIBUTE]
            if len(relations) < len(rows):
                reading.left_out["attributes (is)"] += len(rows) - len(relations)
            return _record_of_rows(relations, image_folder / f"{image_id}.jpg", labels, predicates)

        return reading.records(_rows_by_image(path), build, lambda group: group[0])

    return RecordSource(list(names.values()), predicate_names, records, str(path))


def _class_names(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with path.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if any(len(row) < 2 for row in rows):  # noqa: PLR2004
        raise ValueError(f"{path} must have two columns: codes and names of classes.")
    return {code: name for code, name, *_ in rows if code != "LabelName"}


def _rows_by_image(path: Path) -> Iterator[tuple[str, list[Row]]]:
    seen = set()
    for image_id, rows in itertools.groupby(_rows(path), key=lambda row: row["ImageID"]):
        if image_id in seen:
            raise ValueError(f"{path}: the rows of image {image_id} are not together; sort it.")
        seen.add(image_id)
        yield image_id, list(rows)


def _rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
        yield from reader


def _record_of_rows(
    rows: list[Row], image: Path, labels: dict[str, int], predicates: dict[str, int]
) -> Record:
    try:
        with Image.open(image) as picture:
            width, height = picture.size
    except OSError as error:
        raise ValueError(
            f"the image {image} cannot be opened, but its size is needed: {error}"
        ) from error
    entities: dict[tuple[Any, ...], int] = {}
    relations = []
    for row in rows:
        ends = [
            entities.setdefault(_entity_key(row, number), len(entities)) for number in ("1", "2")
        ]
        predicate = _position(predicates, row["RelationshipLabel"])
        relations.append({"subject": ends[0], "object": ends[1], "predicate": predicate})
    objects = [
        {
            "id": index,
            "bbox": [x1 * width, y1 * height, x2 * width, y2 * height],
            "label": _position(labels, code),
        }
        for (code, x1, y1, x2, y2), index in entities.items()
    ]
    return {
        "image": {"path": str(image), "bytes": None},
        "image_id": image.stem,
        "width": width,
        "height": height,
        "objects": objects,
        "relations": relations,
    }


def _position(positions: dict[str, int], name: str) -> int:
    return positions[name] if name in positions else Unresolved(name)


def _entity_key(row: Row, number: str) -> tuple[Any, ...]:
    # The columns come as XMin, XMax, YMin, YMax.
    corners = (_number(row, f"{side}{number}") for side in ("XMin", "YMin", "XMax", "YMax"))
    return (row[f"LabelName{number}"], *corners)


def _number(row: Row, column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{column}` must be a number, got {row[column]!r}") from error
