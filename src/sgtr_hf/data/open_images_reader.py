"""Reads the scene graphs of Open Images V6: the processed JSON files, and the published CSV."""

import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from .json_streaming import stream_items
from .record_source import Record, RecordSource


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
    names = _read_json(folder / "annotations" / "categories_dict.json")
    image_folder = folder / "images" if images is None else Path(images)

    def records() -> Iterator[Record]:
        for entry in stream_items(path, "item"):
            width, height = entry["img_size"]
            yield {
                "image": {"path": str(image_folder / f"{entry['img_fn']}.jpg"), "bytes": None},
                "image_id": str(entry["img_fn"]),
                "width": int(width),
                "height": int(height),
                "objects": [
                    {"id": index, "bbox": list(map(float, box)), "label": int(label)}
                    for index, (box, label) in enumerate(
                        zip(entry["bbox"], entry["det_labels"], strict=True)
                    )
                ],
                "relations": [
                    {"subject": subject, "object": object_, "predicate": predicate}
                    for subject, object_, predicate in entry["rel"]
                ],
            }

    return RecordSource(list(names["obj"]), list(names["rel"]), records)


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
        predicate_names: Of the data set; those of the file, sorted, if None, for which the file
            is read once more.

    Raises:
        ValueError: If a file is missing, or the rows are not sorted by image.
    """
    path, image_folder = Path(path), Path(images)
    with Path(class_descriptions).open(newline="") as file:
        names = {code: name for code, name, *_ in csv.reader(file) if code != "LabelName"}
    if predicate_names is None:
        predicate_names = sorted({row["RelationshipLabel"] for row in _rows(path)} - {"is"})
    labels = {code: position for position, code in enumerate(names)}
    predicates = {name: position for position, name in enumerate(predicate_names)}

    def records() -> Iterator[Record]:
        seen = set()
        for image_id, rows in itertools.groupby(_rows(path), key=lambda row: row["ImageID"]):
            if image_id in seen:
                raise ValueError(f"{path}: the rows of image {image_id} are not together; sort it.")
            seen.add(image_id)
            yield _record_of_rows(list(rows), image_folder / f"{image_id}.jpg", labels, predicates)

    return RecordSource(list(names.values()), predicate_names, records)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _record_of_rows(
    rows: list[dict[str, str]], image: Path, labels: dict[str, int], predicates: dict[str, int]
) -> Record:
    try:
        with Image.open(image) as picture:
            width, height = picture.size
    except OSError as error:
        raise ValueError(
            f"The image {image} cannot be opened, but its size is needed: {error}"
        ) from error
    entities: dict[tuple[Any, ...], int] = {}
    relations = []
    for row in rows:
        if row["RelationshipLabel"] == "is":
            continue
        ends = [
            entities.setdefault(_entity_key(row, number), len(entities)) for number in ("1", "2")
        ]
        predicate = predicates.get(row["RelationshipLabel"], -1)
        relations.append({"subject": ends[0], "object": ends[1], "predicate": predicate})
    objects = [
        {
            "id": index,
            "bbox": [x1 * width, y1 * height, x2 * width, y2 * height],
            "label": labels.get(code, -1),
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


def _entity_key(row: dict[str, str], number: str) -> tuple[Any, ...]:
    # The columns come as XMin, XMax, YMin, YMax.
    corners = (float(row[f"{side}{number}"]) for side in ("XMin", "YMin", "XMax", "YMax"))
    return (row[f"LabelName{number}"], *corners)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    content: dict[str, Any] = json.loads(path.read_text())
    return content
