"""Reads raw Visual Genome: free names for entities and predicates, brought to a vocabulary."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .json_streaming import stream_items
from .record_source import Record, RecordSource


def read_visual_genome(
    folder: str | Path,
    entity_names: Sequence[str],
    predicate_names: Sequence[str],
    images: str | Path | None = None,
) -> RecordSource:
    """Read `scene_graphs.json`, or `objects.json` and `relationships.json`, with alias files.

    Names are lowered and stripped, and replaced by what `object_alias.txt` and
    `relationship_alias.txt` say (lines of a name and its aliases, separated by commas). Entities
    and relations whose names are not in the vocabulary are left out, as in VG150; entities that
    only a relation mentions are added.

    Args:
        folder: Holds the files and `image_data.json`.
        entity_names: The vocabulary of entities.
        predicate_names: The vocabulary of predicates.
        images: Folder of the images; `folder` if None.

    Raises:
        ValueError: If a file is missing, or the files do not have the same images in one order.
    """
    folder = Path(folder)
    image_folder = folder if images is None else Path(images)
    objects = _Vocabulary(entity_names, folder / "object_alias.txt")
    predicates = _Vocabulary(predicate_names, folder / "relationship_alias.txt")

    def records() -> Iterator[Record]:
        images_by_id = stream_items(folder / "image_data.json", "item")
        for image, (image_id, entities, relations) in zip(
            images_by_id, _graphs(folder), strict=True
        ):
            if image["image_id"] != image_id:
                raise ValueError(
                    f"{folder}: image_data.json and the annotations differ at image "
                    f"{image['image_id']} and {image_id}; are they of one version?"
                )
            yield _record(image, entities, relations, (objects, predicates), image_folder)

    return RecordSource(list(entity_names), list(predicate_names), records)


class _Vocabulary:
    """Positions of names and of their aliases."""

    def __init__(self, names: Sequence[str], aliases: Path) -> None:
        self.positions = {normalize(name): position for position, name in enumerate(names)}
        self.canonical = _read_aliases(aliases) if aliases.is_file() else {}

    def find(self, name: str) -> int | None:
        """Return the position of a name, or None if it is not in the vocabulary."""
        name = normalize(name)
        return self.positions.get(self.canonical.get(name, name))


def normalize(name: str) -> str:
    """Lower a name, and take marks and spaces at its ends off."""
    return " ".join(name.lower().strip(" .,;:!?'\"").split())


def _read_aliases(path: Path) -> dict[str, str]:
    canonical: dict[str, str] = {}
    for line in path.read_text().splitlines():
        name, *aliases = (normalize(part) for part in line.split(","))
        # The first line that names an alias counts.
        for alias in aliases:
            canonical.setdefault(alias, name)
    return canonical


def _graphs(folder: Path) -> Iterator[tuple[int, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield image id, entities and relations of all images."""
    whole = folder / "scene_graphs.json"
    if whole.is_file():
        for graph in stream_items(whole, "item"):
            by_id = {entity["object_id"]: entity for entity in graph["objects"]}
            relations = [
                relation
                | {
                    "subject": by_id[relation["subject_id"]],
                    "object": by_id[relation["object_id"]],
                }
                for relation in graph["relationships"]
            ]
            yield graph["image_id"], graph["objects"], relations
        return
    rows = zip(
        stream_items(folder / "objects.json", "item"),
        stream_items(folder / "relationships.json", "item"),
        strict=True,
    )
    for objects, relations in rows:
        if objects["image_id"] != relations["image_id"]:
            raise ValueError(
                f"{folder}: objects.json and relationships.json differ at image "
                f"{objects['image_id']} and {relations['image_id']}; are they of one version?"
            )
        yield objects["image_id"], objects["objects"], relations["relationships"]


def _record(
    image: Mapping[str, Any],
    entities: Sequence[dict[str, Any]],
    relations: Sequence[dict[str, Any]],
    vocabularies: tuple[_Vocabulary, _Vocabulary],
    folder: Path,
) -> Record:
    objects, predicates = vocabularies
    rows: dict[int, int] = {}
    kept: list[dict[str, Any]] = []
    ends = (relation[role] for relation in relations for role in ("subject", "object"))
    for entity in (*entities, *ends):
        label = objects.find(_name(entity))
        if entity["object_id"] in rows or label is None:
            continue
        rows[entity["object_id"]] = len(kept)
        x, y, width, height = (float(entity[side]) for side in ("x", "y", "w", "h"))
        box = [x, y, x + width, y + height]
        kept.append({"id": entity["object_id"], "bbox": box, "label": label})
    named = (
        (
            rows.get(relation["subject"]["object_id"]),
            rows.get(relation["object"]["object_id"]),
            predicates.find(relation["predicate"]),
        )
        for relation in relations
    )
    return {
        "image": {"path": str(folder / f"{image['image_id']}.jpg"), "bytes": None},
        "image_id": str(image["image_id"]),
        "width": int(image["width"]),
        "height": int(image["height"]),
        "objects": kept,
        "relations": [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in named
            if subject is not None and object_ is not None and predicate is not None
        ],
    }


def _name(entity: Mapping[str, Any]) -> str:
    """The name of an entity: `name` in some versions, the first of `names` in others."""
    if "name" in entity:
        return str(entity["name"])
    names = entity.get("names") or [""]
    return str(names[0])
