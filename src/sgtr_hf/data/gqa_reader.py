"""Reads GQA scene graphs, and GQA200, which brings them to 200 classes and 100 predicates."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .coco_reader import is_background
from .json_streaming import read_json, stream_items, stream_pairs
from .record_checks import box_from_corners, box_from_size, triplet, whole_number
from .record_source import Reading, Record, RecordSource, Unresolved


# How the published files are called.
FILE_PATTERN = "{split}_sceneGraphs.json"
# The first images of the test file that have relations.
NUM_GQA200_VALIDATION = 5000
# Of the test file, counted from 0; the published loaders skip it.
_SKIPPED_ENTRY = 5579
_COLUMNS = ("filenames_all", "img_info_all", "gt_boxes_all", "gt_classes_all", "relationships_all")


class _Vocabulary(NamedTuple):
    labels: dict[str, int]
    predicates: dict[str, int]
    attributes: dict[str, int]


def read_gqa(
    path: str | Path,
    images: str | Path,
    entity_names: Sequence[str] | None = None,
    predicate_names: Sequence[str] | None = None,
    *,
    attribute_names: Sequence[str] = (),
) -> RecordSource:
    """Read `train_sceneGraphs.json` or `val_sceneGraphs.json`.

    Args:
        path: The JSON file. Its relations hang on their subjects, and its ids are strings.
        images: Folder of the images.
        entity_names: The vocabulary; what is not in it is left out. All names of the file and of
            the other split beside it, sorted, if None, for which these files are read as a whole.
        predicate_names: Likewise.
        attribute_names: The vocabulary of attributes; what is not in it is left out.

    Raises:
        ValueError: If the file is missing or is not in this format.
    """
    path, folder = Path(path), Path(images)
    if entity_names is None or predicate_names is None:
        found = _names_of_splits(path)
        entity_names = found[0] if entity_names is None else entity_names
        predicate_names = found[1] if predicate_names is None else predicate_names
    vocabulary = _Vocabulary(
        *(
            {name: position for position, name in enumerate(names)}
            for names in (entity_names, predicate_names, attribute_names)
        )
    )

    def records(reading: Reading) -> Iterator[Record]:
        def build(entry: tuple[str, dict[str, Any]]) -> Record:
            return _record(*entry, vocabulary, folder, reading.left_out)

        return reading.records(stream_pairs(path, ""), build, lambda entry: entry[0])

    return RecordSource(
        list(entity_names),
        list(predicate_names),
        records,
        str(path),
        attribute_names=list(attribute_names),
    )


def _names_of_splits(path: Path) -> tuple[list[str], list[str]]:
    """Return the names of entities and relations; splits must agree on their numbers."""
    entities: set[str] = set()
    predicates: set[str] = set()
    for file in {path, *path.parent.glob(FILE_PATTERN.format(split="*"))}:
        for image_id, graph in stream_pairs(file, ""):
            try:
                for entity in graph["objects"].values():
                    entities.add(entity["name"])
                    predicates.update(relation["name"] for relation in entity["relations"])
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{file}: the names of image {image_id} cannot be read ({error!r}); is it GQA?"
                ) from error
    return sorted(entities), sorted(predicates)


def _record(
    image_id: str,
    graph: dict[str, Any],
    vocabulary: _Vocabulary,
    folder: Path,
    left_out: Counter[str],
) -> Record:
    rows: dict[str, int] = {}
    objects = []
    for name, entity in graph["objects"].items():
        if entity["name"] not in vocabulary.labels:
            left_out["entities with names beyond the vocabulary"] += 1
            continue
        rows[name] = len(rows)
        box = box_from_size([entity[side] for side in ("x", "y", "w", "h")], "x, y, w, h")
        kept = {"id": rows[name], "bbox": box, "label": vocabulary.labels[entity["name"]]}
        if vocabulary.attributes:
            named = dict.fromkeys(entity.get("attributes") or ())
            known = vocabulary.attributes
            kept["attributes"] = [known[attribute] for attribute in named if attribute in known]
        objects.append(kept)
    relations = []
    for name, entity in graph["objects"].items():
        for relation in entity["relations"]:
            end = relation["object"]
            is_named = name in rows and relation["name"] in vocabulary.predicates
            if not is_named or (end in graph["objects"] and end not in rows):
                left_out["relations with names beyond the vocabulary"] += 1
                continue
            relations.append(
                {
                    "subject": rows[name],
                    "object": rows[end] if end in rows else Unresolved(end),
                    "predicate": vocabulary.predicates[relation["name"]],
                }
            )
    return {
        "image": {"path": str(folder / f"{image_id}.jpg"), "bytes": None},
        "image_id": image_id,
        "width": whole_number(graph["width"], "width"),
        "height": whole_number(graph["height"], "height"),
        "objects": objects,
        "relations": relations,
    }


def read_gqa200(
    folder: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    num_validation: int = NUM_GQA200_VALIDATION,
) -> RecordSource:
    """Read GQA200 (SHA-GCL): lists side by side, labels and predicates from 1, background first.

    As its published loaders do, images without boxes or relations are left out, and so is entry
    5580 of the test file; validation is the beginning of the test split.

    Args:
        folder: Holds `GQA_200_ID_Info.json`, `GQA_200_Train.json` and `GQA_200_Test.json`.
        split: "train", "validation" or "test".
        images: Folder of the images; `folder` if None.
        num_validation: Images of the validation split.

    Raises:
        ValueError: If a file is missing, or its lists differ in length.
    """
    folder = Path(folder)
    if split not in ("train", "validation", "test"):
        raise ValueError(f'`split` must be "train", "validation" or "test", got {split!r}.')
    path = folder / f"GQA_200_{'Train' if split == 'train' else 'Test'}.json"
    entries = read_json(folder / "GQA_200_ID_Info.json")
    entity_names, predicate_names = (
        [name for name in _listed_names(entries[field]) if not is_background(name)]
        for field in ("ind_to_classes", "ind_to_predicates")
    )
    image_folder = folder if images is None else Path(images)

    def records(reading: Reading) -> Iterator[Record]:
        rows = _rows_of_split(path, split, num_validation, reading.left_out)
        return reading.records(
            rows, lambda row: _record_of_row(row, image_folder), lambda row: Path(row[0]).stem
        )

    return RecordSource(entity_names, predicate_names, records, str(path))


def _rows_of_split(
    path: Path, split: str, num_validation: int, left_out: Counter[str]
) -> Iterator[tuple[Any, ...]]:
    num_kept = 0
    for number, row in enumerate(_side_by_side(path)):
        if split != "train" and number == _SKIPPED_ENTRY:
            left_out["entry 5580 of the test file"] += 1
        elif not row[2] or not row[4]:
            left_out["images without boxes or relations"] += 1
        else:
            num_kept += 1
            yield row
        if split == "validation" and num_kept == num_validation:
            return


def _side_by_side(path: Path) -> Iterator[tuple[Any, ...]]:
    """Follow the lists of the file together."""
    columns = [stream_items(path, f"{column}.item") for column in _COLUMNS]
    for number, first in enumerate(columns[0]):
        row = [first]
        for name, column in zip(_COLUMNS[1:], columns[1:], strict=True):
            try:
                row.append(next(column))
            except StopIteration:
                raise ValueError(
                    f"{path}: `{name}` has {number} entries, `{_COLUMNS[0]}` has more."
                ) from None
        yield tuple(row)
    for name, column in zip(_COLUMNS[1:], columns[1:], strict=True):
        if next(column, None) is not None:
            raise ValueError(f"{path}: `{name}` has more entries than `{_COLUMNS[0]}`.")


def _record_of_row(row: tuple[Any, ...], folder: Path) -> Record:
    name, info, boxes, classes, relations = row
    if len(boxes) != len(classes):
        raise ValueError(
            f"`gt_boxes_all` and `gt_classes_all` must have one length, got {len(boxes)} and "
            f"{len(classes)}"
        )
    return {
        "image": {"path": str(folder / Path(name).name), "bytes": None},
        "image_id": Path(name).stem,
        "width": whole_number(info["width"], "width"),
        "height": whole_number(info["height"], "height"),
        "objects": [
            {
                "id": index,
                "bbox": box_from_corners(box, "gt_boxes_all"),
                "label": _from_1(label, "gt_classes_all"),
            }
            for index, (box, label) in enumerate(zip(boxes, classes, strict=True))
        ],
        "relations": [
            {"subject": subject, "object": object_, "predicate": _from_1(number, "predicate")}
            for subject, object_, number in (
                triplet(relation, "relationships_all") for relation in relations
            )
        ],
    }


def _from_1(number: Any, field: str) -> int:
    """Count from 0 what counts from 1; 0 is background, which nothing should be."""
    number = whole_number(number, field)
    return number - 1 if number > 0 else Unresolved(number)


def _listed_names(entries: Any) -> list[str]:
    """Names as a list, or as a dictionary by number."""
    if isinstance(entries, dict):
        return [str(entries[number]) for number in sorted(entries, key=int)]
    return list(map(str, entries))
