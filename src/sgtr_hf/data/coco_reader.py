"""Reads COCO files: detection alone, and the two ways in which projects add relations to them."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .coco_grouping import CocoImage, UnorderedAnnotationsError, group_by_image
from .json_streaming import read_list, stream_pairs
from .record_checks import box_from_size, triplet, whole_number
from .record_source import Reading, Record, RecordSource, Unresolved


class Numbering(NamedTuple):
    """How the numbers of a file become positions in a vocabulary."""

    names: list[str]
    positions: dict[int, int]

    def position(self, number: Any) -> int:
        """Return the position, or an `Unresolved` if the number has no name."""
        position = self.positions.get(number)
        return Unresolved(number) if position is None else position


def read_coco(
    path: str | Path, images: str | Path | None = None, *, index: bool = False
) -> RecordSource:
    """Read COCO detection: boxes without relations. Crowds are left out.

    Args:
        path: The JSON file.
        images: Folder of the images; that of the file if None.
        index: Read the annotations into a temporary database first, for files whose annotations
            are not in the order of their images; else the file is streamed.

    Raises:
        ValueError: If the file is missing or is not COCO.
    """
    path = Path(path)
    categories = number_names(read_list(path, "categories"), str(path), "categories")
    folder = _folder(path, images)

    def records(reading: Reading) -> Iterator[Record]:
        def build(group: CocoImage) -> Record:
            kept = _without_crowds(group.annotations, reading.left_out)
            return _record(group.image, kept, [], categories, folder)

        return reading.records(group_by_image(path, index=index, relations=False), build, _image_id)

    return RecordSource(categories.names, (), records, str(path))


def read_coco_rel(
    folder: str | Path,
    split: str,
    images: str | Path | None = None,
    *,
    index: bool = False,
    predicate_offset: int | None = None,
) -> RecordSource:
    """Read COCO with a `rel.json` beside it, as RelTR and EGTR do.

    Relations name the positions of subject and object in the image's list of annotations.

    Args:
        folder: Holds `train.json`, `val.json`, `test.json` and `rel.json`.
        split: "train", "val" or "test".
        images: Folder of the images; `folder` if None.
        index: As of `read_coco`.
        predicate_offset: Number of the first predicate: 1 if the list of names begins with
            background, which is recognised, else 0.

    Raises:
        ValueError: If a file is missing or is not in this format.
    """
    folder = Path(folder)
    path, relation_path = folder / f"{split}.json", folder / "rel.json"
    categories = number_names(read_list(path, "categories"), str(path), "categories")
    predicates = [str(name) for name in read_list(relation_path, "rel_categories")]
    if not predicates:
        raise ValueError(f"{relation_path} has no `rel_categories`.")
    has_background = is_background(predicates[0])
    offset = int(has_background) if predicate_offset is None else predicate_offset
    image_folder = _folder(path, images)

    def records(reading: Reading) -> Iterator[Record]:
        relations = _RelationsByImage(relation_path, split)

        def build(group: CocoImage) -> Record:
            triplets = (triplet(row) for row in relations.of(group.image["id"]))
            rows = [
                {"subject": subject, "object": object_, "predicate": _shifted(predicate, offset)}
                for subject, object_, predicate in triplets
            ]
            # Crowds stay: they count in the positions.
            return _record(group.image, group.annotations, rows, categories, image_folder)

        return reading.records(group_by_image(path, index=index, relations=False), build, _image_id)

    return RecordSource(categories.names, predicates[has_background:], records, str(path))


def read_coco_rel_annotations(
    path: str | Path, images: str | Path | None = None, *, index: bool = False
) -> RecordSource:
    """Read COCO with `rel_annotations`, as SGG-Benchmark does, counted from 0 or from 1.

    Relations name the ids of subject and object annotations. A category called background is left
    out of the vocabulary; no number is taken to be it.

    Args:
        path: The JSON file.
        images: Folder of the images; that of the file if None.
        index: As of `read_coco`.

    Raises:
        ValueError: If the file is missing or is not in this format.
    """
    path = Path(path)
    categories = number_names(read_list(path, "categories"), str(path), "categories")
    predicates = number_names(read_list(path, "rel_categories"), str(path), "rel_categories")
    folder = _folder(path, images)

    def build(group: CocoImage) -> Record:
        rows = relations_by_id(group.annotations, group.relations, predicates)
        return _record(group.image, group.annotations, rows, categories, folder)

    def records(reading: Reading) -> Iterator[Record]:
        groups = group_by_image(path, index=index, relations=True)
        if not index:
            groups = _with_checked_ends(path, groups)
        return reading.records(groups, build, _image_id)

    return RecordSource(categories.names, predicates.names, records, str(path))


def relations_by_id(
    entities: Sequence[dict[str, Any]], relations: Iterable[dict[str, Any]], predicates: Numbering
) -> list[dict[str, int]]:
    """Replace the ids of subject and object by their rows, and the predicate by its position."""
    rows = {entity["id"]: row for row, entity in enumerate(entities)}

    def row_of(entity_id: Any) -> int:
        return rows[entity_id] if entity_id in rows else Unresolved(entity_id)

    return [
        {
            "subject": row_of(relation["subject_id"]),
            "object": row_of(relation["object_id"]),
            "predicate": predicates.position(relation["predicate_id"]),
        }
        for relation in relations
    ]


def objects_of(
    annotations: Iterable[dict[str, Any]], categories: Numbering
) -> list[dict[str, Any]]:
    """Turn COCO annotations into entities of a record."""
    return [
        {
            "id": whole_number(annotation["id"], "id"),
            "bbox": box_from_size(annotation["bbox"]),
            "label": categories.position(annotation["category_id"]),
        }
        for annotation in annotations
    ]


def is_background(name: str) -> bool:
    """Tell whether a name in a vocabulary stands for nothing."""
    return name.strip("_ ").lower() in ("background", "no_relation", "no relation", "n/a", "bg")


def number_names(entries: Iterable[dict[str, Any]], source: str, field: str) -> Numbering:
    """Order categories by their ids, without background.

    Raises:
        ValueError: If there is none, or two have the same id.
    """
    try:
        named = sorted((int(entry["id"]), str(entry["name"])) for entry in entries)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: each of `{field}` must have `id` and `name`.") from error
    named = [(number, name) for number, name in named if not is_background(name)]
    if not named:
        raise ValueError(f"{source} has no `{field}`; is it in another format?")
    positions = {number: position for position, (number, _) in enumerate(named)}
    for field_name, values in (("id", positions), ("name", {name for _, name in named})):
        if len(values) < len(named):
            raise ValueError(f"{source}: two of `{field}` have the same {field_name}.")
    return Numbering([name for _, name in named], positions)


def _without_crowds(
    annotations: Iterable[dict[str, Any]], left_out: Counter[str]
) -> list[dict[str, Any]]:
    annotations = list(annotations)
    kept = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    if len(kept) < len(annotations):
        left_out["crowds"] += len(annotations) - len(kept)
    return kept


def _folder(path: Path, images: str | Path | None) -> Path:
    return path.parent if images is None else Path(images)


def _image_id(group: CocoImage) -> Any:
    return group.image["id"]


def _shifted(number: int, offset: int) -> int:
    """Count a predicate from 0; background itself is no predicate."""
    return number - offset if number >= offset else Unresolved(number)


def _record(
    image: dict[str, Any],
    annotations: Sequence[dict[str, Any]],
    relations: list[dict[str, int]],
    categories: Numbering,
    folder: Path,
) -> Record:
    return {
        "image": {"path": str(folder / image["file_name"]), "bytes": None},
        # Our writers keep an id that is not a number there.
        "image_id": str(image.get("original_id", image["id"])),
        "width": whole_number(image["width"], "width"),
        "height": whole_number(image["height"], "height"),
        "objects": objects_of(annotations, categories),
        "relations": relations,
    }


def _with_checked_ends(path: Path, groups: Iterator[CocoImage]) -> Iterator[CocoImage]:
    """In a streamed file, an end that is missing may only come later."""
    for group in groups:
        ids = {annotation.get("id") for annotation in group.annotations}
        for relation in group.relations:
            for name in ("subject_id", "object_id"):
                if relation.get(name) not in ids:
                    raise UnorderedAnnotationsError(
                        f"{path}: image {group.image['id']} has a relation whose {name} "
                        f"{relation.get(name)} is not among its annotations, which may not be in "
                        "the order of `images`; read with an index, `index=True` or `--index`."
                    )
        yield group


class _RelationsByImage:
    """Relations of a split of `rel.json`, in the order of the images or in any."""

    def __init__(self, path: Path, split: str) -> None:
        self.path, self.split = path, split
        self.pairs = stream_pairs(path, split)
        self.waiting: dict[str, list[list[int]]] = {}

    def of(self, image_id: Any) -> list[list[int]]:
        """Return the relations of an image; those that come before it wait in memory."""
        wanted = str(image_id)
        if wanted in self.waiting:
            return self.waiting.pop(wanted)
        for name, relations in self.pairs:
            if name == wanted:
                return relations
            self.waiting[name] = relations
        raise ValueError(
            f"{self.path}: `{self.split}` has no entry for image {wanted}; every image needs one, "
            "be it empty"
        )
