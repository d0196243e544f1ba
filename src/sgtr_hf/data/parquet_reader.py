"""Reads Parquet shards, local or from the Hub: the one schema, and COCO columns with relations."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .coco_reader import Numbering, number_names
from .record_source import Record, RecordSource
from .schema import vocabularies


def read_parquet(path: str | Path, split: str) -> RecordSource:
    """Stream shards in the schema of `scene_graph_features`; pictures stay encoded.

    Args:
        path: A folder of shards, or a Hub id.
        split: Name of a split.

    Raises:
        ValueError: If there is no such split, or the columns are others.
    """
    stream = load_stream(path, split)
    id2label, id2predicate = vocabularies(stream.features)
    entity = stream.features["objects"].feature
    attributes = entity["attributes"].feature.names if "attributes" in entity else ()

    def records() -> Iterator[Record]:
        yield from without_decoding(stream)

    return RecordSource(
        list(id2label.values()),
        list(id2predicate.values()),
        records,
        attribute_names=attributes,
        has_masks="mask" in entity,
    )


def read_coco_parquet(
    path: str | Path, split: str, categories: str | Path | None = None
) -> RecordSource:
    """Stream shards with COCO columns, as of `maelic/*-coco-format` on the Hub.

    Objects have xywh boxes and `category_id`; relations name the ids of objects.

    Args:
        path: A folder of shards, or a Hub id.
        split: Name of a split.
        categories: JSON file with `categories` and `rel_categories`; `categories.json` in the
            folder, or the description of the data set, if None.

    Raises:
        ValueError: If there is no such split, the columns are others, or no names are found.
    """
    stream = load_stream(path, split)
    missing = {"image", "image_id", "width", "height", "objects", "relations"} - set(
        stream.column_names or ()
    )
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
    entries = _find_categories(path, stream, categories)
    labels, predicates = (
        number_names(entries[field], str(path), field) for field in ("categories", "rel_categories")
    )

    def records() -> Iterator[Record]:
        for row in without_decoding(stream):
            yield _record(row, labels, predicates)

    return RecordSource(labels.names, predicates.names, records)


def load_stream(path: str | Path, split: str) -> datasets.IterableDataset:
    """Open a split without reading it.

    Raises:
        ValueError: If there is no such data set or split.
    """
    try:
        return datasets.load_dataset(str(path), split=split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"{path} has no readable split {split!r}: {error}") from error


def without_decoding(stream: datasets.IterableDataset) -> Iterator[Record]:
    """Yield rows whose pictures and masks stay bytes."""
    yield from stream.decode(False)


def _record(row: dict[str, Any], labels: Numbering, predicates: Numbering) -> Record:
    positions = {entity["id"]: position for position, entity in enumerate(row["objects"])}
    objects = []
    for entity in row["objects"]:
        x, y, width, height = entity["bbox"]
        label = labels.position(entity["category_id"])
        box = [x, y, x + width, y + height]
        objects.append({"id": entity["id"], "bbox": box, "label": label})
    relations = [
        {
            "subject": positions.get(relation["subject_id"], -1),
            "object": positions.get(relation["object_id"], -1),
            "predicate": predicates.position(relation["predicate_id"]),
        }
        for relation in row["relations"]
    ]
    kept = {name: row[name] for name in ("image", "width", "height")}
    return kept | {
        "image_id": str(row["image_id"]),
        "objects": objects,
        "relations": relations,
    }


def _find_categories(
    path: str | Path, stream: datasets.IterableDataset, categories: str | Path | None
) -> dict[str, Any]:
    file = Path(path) / "categories.json" if categories is None else Path(categories)
    try:
        text = file.read_text() if file.is_file() else stream.info.description
        entries: dict[str, Any] = json.loads(text or "")
        if {"categories", "rel_categories"} <= set(entries):
            return entries
    except ValueError:
        pass
    raise ValueError(
        f"The names of {path} are not in categories.json nor in the description; give a JSON file "
        "with `categories` and `rel_categories`."
    )
