"""Reads raw Visual Genome: free names for entities and predicates, brought to a vocabulary."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .json_streaming import stream_items
from .record_checks import box_from_size, whole_number
from .record_source import Reading, Record, RecordSource, Unresolved


def read_visual_genome(
    folder: str | Path,
    entity_names: Sequence[str],
    predicate_names: Sequence[str],
    images: str | Path | None = None,
    *,
    attribute_names: Sequence[str] = (),
) -> RecordSource:
    """Read `scene_graphs.json`, or `objects.json` and `relationships.json`, with alias files.

    Names are lowered and stripped, and replaced by what `object_alias.txt` and
    `relationship_alias.txt` say (lines of a name and its aliases, separated by commas). Entities,
    relations and attributes whose names are not in the vocabulary are left out, as in VG150;
    entities that only a relation mentions are added.

    Args:
        folder: Holds the files and `image_data.json`.
        entity_names: The vocabulary of entities.
        predicate_names: The vocabulary of predicates.
        images: Folder of the images; `folder` if None.
        attribute_names: The vocabulary of attributes, which `scene_graphs.json` has.

    Raises:
        ValueError: If a file is missing, or the files do not have the same images in one order.
    """
    folder = Path(folder)
    image_folder = folder if images is None else Path(images)
    vocabularies = _Vocabularies(
        _Vocabulary(entity_names, folder / "object_alias.txt"),
        _Vocabulary(predicate_names, folder / "relationship_alias.txt"),
        _Vocabulary(attribute_names, None),
    )

    def records(reading: Reading) -> Iterator[Record]:
        def build(entry: _Graph) -> Record:
            return _record(entry, vocabularies, image_folder, reading.left_out)

        return reading.records(_graphs(folder), build, lambda entry: entry.image["image_id"])

    return RecordSource(
        list(entity_names),
        list(predicate_names),
        records,
        str(folder),
        attribute_names=list(attribute_names),
    )


class _Graph(NamedTuple):
    """An image with its entities and relations, as the files have them."""

    image: dict[str, Any]
    entities: list[dict[str, Any]]
    relations: list[dict[str, Any]]


class _Vocabulary:
    """Positions of names and of their aliases."""

    def __init__(self, names: Sequence[str], aliases: Path | None) -> None:
        self.positions = {normalize(name): position for position, name in enumerate(names)}
        has_aliases = aliases is not None and aliases.is_file()
        self.canonical = _read_aliases(aliases) if aliases is not None and has_aliases else {}

    def find(self, name: str) -> int | None:
        """Return the position of a name, or None if it is not in the vocabulary."""
        name = normalize(name)
        return self.positions.get(self.canonical.get(name, name))


class _Vocabularies(NamedTuple):
    entities: _Vocabulary
    predicates: _Vocabulary
    attributes: _Vocabulary


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


def _graphs(folder: Path) -> Iterator[_Graph]:
    """Yield the images with their entities and relations."""
    images = stream_items(folder / "image_data.json", "item")
    graphs = _annotated(folder)
    for image in images:
        found = next(graphs, None)
        if found is None or found[0] != image["image_id"]:
            other = "end" if found is None else f"come to {found[0]}"
            raise ValueError(
                f"{folder}: image_data.json and the annotations differ at image "
                f"{image['image_id']}, where the annotations {other}; are they of one version?"
            )
        yield _Graph(image, found[1], found[2])
    found = next(graphs, None)
    if found is not None:
        raise ValueError(
            f"{folder}: image_data.json ends before the annotations' image {found[0]}; are they "
            "of one version?"
        )


def _annotated(folder: Path) -> Iterator[tuple[int, list[dict[str, Any]], list[dict[str, Any]]]]:
    """Yield image id, entities and relations of all images."""
    whole = folder / "scene_graphs.json"
    if whole.is_file():
        for graph in stream_items(whole, "item"):
            yield graph["image_id"], graph["objects"], graph["relationships"]
        return
    relations = stream_items(folder / "relationships.json", "item")
    for entry in stream_items(folder / "objects.json", "item"):
        other = next(relations, None)
        if other is None or entry["image_id"] != other["image_id"]:
            raise ValueError(
                f"{folder}: objects.json and relationships.json differ at image "
                f"{entry['image_id']}; are they of one version?"
            )
        yield entry["image_id"], entry["objects"], other["relationships"]


def _record(
    graph: _Graph, vocabularies: _Vocabularies, folder: Path, left_out: Counter[str]
) -> Record:
    rows: dict[int, int] = {}
    known: set[int] = set()
    kept: list[dict[str, Any]] = []
    for entity in (*graph.entities, *_entities_of_relations(graph)):
        number = entity["object_id"]
        if number in known:
            continue
        known.add(number)
        label = vocabularies.entities.find(_name(entity))
        if label is None:
            left_out["entities with names beyond the vocabulary"] += 1
            continue
        rows[number] = len(kept)
        kept.append(_object(entity, label, vocabularies.attributes))
    image_id = graph.image["image_id"]
    return {
        "image": {"path": str(folder / f"{image_id}.jpg"), "bytes": None},
        "image_id": str(image_id),
        "width": whole_number(graph.image["width"], "width"),
        "height": whole_number(graph.image["height"], "height"),
        "objects": kept,
        "relations": _relations(graph, rows, known, vocabularies.predicates, left_out),
    }


def _object(entity: Mapping[str, Any], label: int, attributes: _Vocabulary) -> dict[str, Any]:
    box = box_from_size([entity[side] for side in ("x", "y", "w", "h")], "x, y, w, h")
    kept: dict[str, Any] = {"id": entity["object_id"], "bbox": box, "label": label}
    if attributes.positions:
        found = (attributes.find(str(name)) for name in entity.get("attributes") or ())
        kept["attributes"] = list(dict.fromkeys(number for number in found if number is not None))
    return kept


def _relations(
    graph: _Graph,
    rows: Mapping[int, int],
    known: set[int],
    predicates: _Vocabulary,
    left_out: Counter[str],
) -> list[dict[str, int]]:
    relations = []
    for relation in graph.relations:
        ends = [_end(relation, role) for role in ("subject", "object")]
        predicate = predicates.find(str(relation["predicate"]))
        if predicate is None or any(end in known and end not in rows for end in ends):
            left_out["relations with names beyond the vocabulary"] += 1
            continue
        subject, object_ = (rows[end] if end in known else Unresolved(end) for end in ends)
        relations.append({"subject": subject, "object": object_, "predicate": predicate})
    return relations


def _entities_of_relations(graph: _Graph) -> Iterator[dict[str, Any]]:
    for relation in graph.relations:
        for role in ("subject", "object"):
            if isinstance(relation.get(role), dict):
                yield relation[role]


def _end(relation: Mapping[str, Any], role: str) -> int:
    """The id of a subject or object, which is given whole or by `subject_id` or `object_id`."""
    if isinstance(relation.get(role), dict):
        return whole_number(relation[role]["object_id"], f"{role}.object_id")
    return whole_number(relation[f"{role}_id"], f"{role}_id")


def _name(entity: Mapping[str, Any]) -> str:
    """The name of an entity: `name` in some versions, the first of `names` in others."""
    if "name" in entity:
        return str(entity["name"])
    names = entity.get("names") or [""]
    return str(names[0])
