"""Reads GQA scene graphs, and GQA200, which brings them to 200 classes and 100 predicates."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .coco_reader import is_background
from .json_streaming import stream_items, stream_pairs
from .record_source import Record, RecordSource


def read_gqa(
    path: str | Path,
    images: str | Path,
    entity_names: Sequence[str] | None = None,
    predicate_names: Sequence[str] | None = None,
) -> RecordSource:
    """Read `train_sceneGraphs.json` or `val_sceneGraphs.json`.

    Args:
        path: The JSON file. Its relations hang on their subjects, and its ids are strings.
        images: Folder of the images.
        entity_names: The vocabulary; what is not in it is left out. All names of the file, sorted,
            if None, for which the file is read once more.
        predicate_names: Likewise.

    Raises:
        ValueError: If the file is missing, or a relation points to an entity that is not there.
    """
    path, folder = Path(path), Path(images)
    if entity_names is None or predicate_names is None:
        found = _names_of_file(path)
        entity_names = found[0] if entity_names is None else entity_names
        predicate_names = found[1] if predicate_names is None else predicate_names
    labels = {name: position for position, name in enumerate(entity_names)}
    predicates = {name: position for position, name in enumerate(predicate_names)}

    def records() -> Iterator[Record]:
        for image_id, graph in stream_pairs(path, ""):
            yield _record(image_id, graph, labels, predicates, folder)

    return RecordSource(list(entity_names), list(predicate_names), records)


def _names_of_file(path: Path) -> tuple[list[str], list[str]]:
    entities: set[str] = set()
    predicates: set[str] = set()
    for _, graph in stream_pairs(path, ""):
        for entity in graph["objects"].values():
            entities.add(entity["name"])
            predicates.update(relation["name"] for relation in entity["relations"])
    return sorted(entities), sorted(predicates)


def _record(
    image_id: str,
    graph: dict[str, Any],
    labels: dict[str, int],
    predicates: dict[str, int],
    folder: Path,
) -> Record:
    rows: dict[str, int] = {}
    objects = []
    for name, entity in graph["objects"].items():
        if entity["name"] in labels:
            rows[name] = len(rows)
            x, y, width, height = (float(entity[side]) for side in ("x", "y", "w", "h"))
            box = [x, y, x + width, y + height]
            objects.append({"id": rows[name], "bbox": box, "label": labels[entity["name"]]})
    relations = []
    for name, entity in graph["objects"].items():
        for relation in entity["relations"]:
            if relation["object"] not in graph["objects"]:
                raise ValueError(
                    f"Image {image_id}: object {name} has a relation to {relation['object']}, "
                    "which the image does not have."
                )
            if name in rows and relation["object"] in rows and relation["name"] in predicates:
                relations.append(
                    {
                        "subject": rows[name],
                        "object": rows[relation["object"]],
                        "predicate": predicates[relation["name"]],
                    }
                )
    return {
        "image": {"path": str(folder / f"{image_id}.jpg"), "bytes": None},
        "image_id": image_id,
        "width": int(graph["width"]),
        "height": int(graph["height"]),
        "objects": objects,
        "relations": relations,
    }


def read_gqa200(folder: str | Path, split: str, images: str | Path | None = None) -> RecordSource:
    """Read GQA200 (SHA-GCL): lists side by side, labels and predicates from 1, background first.

    Args:
        folder: Holds `GQA_200_ID_Info.json`, `GQA_200_Train.json` and `GQA_200_Test.json`.
        split: "train" or "test".
        images: Folder of the images; `folder` if None.

    Raises:
        ValueError: If a file is missing, or its lists differ in length.
    """
    folder = Path(folder)
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    path = folder / f"GQA_200_{split.capitalize()}.json"
    names_path = folder / "GQA_200_ID_Info.json"
    if not names_path.is_file():
        raise ValueError(f"There is no file {names_path}.")
    entries = json.loads(names_path.read_text())
    entity_names, predicate_names = (
        [name for name in _listed_names(entries[field]) if not is_background(name)]
        for field in ("ind_to_classes", "ind_to_predicates")
    )
    image_folder = folder if images is None else Path(images)

    def records() -> Iterator[Record]:
        columns = ("filenames_all", "img_info_all", "gt_boxes_all", "gt_classes_all",
                   "relationships_all")  # fmt: skip
        rows = zip(*(stream_items(path, f"{column}.item") for column in columns), strict=True)
        for name, info, boxes, classes, relations in rows:
            yield {
                "image": {"path": str(image_folder / Path(name).name), "bytes": None},
                "image_id": Path(name).stem,
                "width": int(info["width"]),
                "height": int(info["height"]),
                "objects": [
                    {"id": index, "bbox": list(map(float, box)), "label": int(label) - 1}
                    for index, (box, label) in enumerate(zip(boxes, classes, strict=True))
                ],
                "relations": [
                    {"subject": int(subject), "object": int(object_), "predicate": int(number) - 1}
                    for subject, object_, number in relations
                ],
            }

    return RecordSource(entity_names, predicate_names, records)


def _listed_names(entries: Any) -> list[str]:
    """Names as a list, or as a dictionary by number."""
    if isinstance(entries, dict):
        return [str(entries[number]) for number in sorted(entries, key=int)]
    return list(map(str, entries))
