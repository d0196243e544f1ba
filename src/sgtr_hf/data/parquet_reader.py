"""Reads Parquet shards, local or from the Hub: the one schema, and COCO columns with relations."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from .coco_reader import Numbering, number_names, objects_of, relations_by_id
from .record_checks import whole_number
from .record_source import Reading, Record, RecordSource
from .schema import vocabularies


_SAME_SPLITS = {"validation": ("validation", "val"), "val": ("val", "validation")}
COCO_COLUMNS = ("image", "image_id", "width", "height", "objects", "relations")


def read_parquet(path: str | Path, split: str) -> RecordSource:
    """Stream shards in the schema of `scene_graph_features`; pictures stay encoded.

    Args:
        path: A folder of shards, one of them, or a Hub id.
        split: Name of a split; that of a single shard may be any.

    Raises:
        ValueError: If there is no such split, or the columns are others.
    """
    stream = load_stream(path, split)
    id2label, id2predicate = vocabularies(stream.features)
    entity = stream.features["objects"].feature
    attributes = entity["attributes"].feature.names if "attributes" in entity else ()

    def records(reading: Reading) -> Iterator[Record]:
        return reading.records(_rows(stream, path), _whole, lambda row: row["image_id"])

    return RecordSource(
        list(id2label.values()),
        list(id2predicate.values()),
        records,
        str(path),
        attribute_names=attributes,
        has_masks="mask" in entity,
        count=_count(path, stream),
    )


def read_coco_parquet(
    path: str | Path, split: str, categories: str | Path | None = None
) -> RecordSource:
    """Stream shards with COCO columns, as of `maelic/*-coco-format` on the Hub.

    Objects have xywh boxes and `category_id`; relations name the ids of objects. Both may be
    lists of entries, or entries of lists, which older versions of `datasets` wrote.

    Args:
        path: A folder of shards, or a Hub id.
        split: Name of a split.
        categories: JSON file with `categories` and `rel_categories`; `categories.json` in the
            folder, or the description of the data set, if None.

    Raises:
        ValueError: If there is no such split, the columns are others, or no names are found.
    """
    stream = load_stream(path, split)
    missing = set(COCO_COLUMNS) - set(stream.column_names or ())
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(sorted(missing))}.")
    entries = _find_categories(path, stream, categories)
    labels, predicates = (
        number_names(entries[field], str(path), field) for field in ("categories", "rel_categories")
    )

    def records(reading: Reading) -> Iterator[Record]:
        return reading.records(
            _rows(stream, path),
            lambda row: _record(row, labels, predicates),
            lambda row: row["image_id"],
        )

    return RecordSource(
        labels.names, predicates.names, records, str(path), count=_count(path, stream)
    )


def load_stream(path: str | Path, split: str, **options: Any) -> datasets.IterableDataset:
    """Open a split without reading it; arguments and errors as of `open_split`."""
    return open_split(path, split, streaming=True, **options)


def open_split(path: str | Path, split: str, **options: Any) -> Any:
    """Open a split by its name, "val" and "validation" being one.

    Args:
        path: A folder of shards, one of them, or a Hub id.
        split: Name of a split; that of a single shard may be any.
        **options: For `datasets.load_dataset`, as `streaming` and `columns`.

    Raises:
        ValueError: If there is no such data set or split.
    """
    if not Path(path).exists() and not _may_be_on_hub(str(path)):
        raise ValueError(f"There is no file or folder {path}.")
    reasons = []
    for name in _SAME_SPLITS.get(split, (split,)):
        arguments: dict[str, Any] = {"path": str(path)}
        if Path(path).is_file():
            arguments = {"path": "parquet", "data_files": {name: str(path)}}
        try:
            return datasets.load_dataset(**arguments, split=name, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reasons.append(error)
    raise ValueError(f"{path} has no readable split {split!r}: {reasons[0]}") from reasons[0]


def _may_be_on_hub(path: str) -> bool:
    """Tell names of repositories from paths and names of files."""
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None
    return is_name and Path(path).suffix not in (".json", ".csv", ".h5", ".hdf5", ".parquet")


def _count(path: str | Path, stream: datasets.IterableDataset) -> int | None:
    """The number of rows, where the ends of the shards or the data set's card say it."""
    split = str(stream.split)
    shards = [Path(path)] if Path(path).is_file() else list(Path(path).glob(f"{split}-*.parquet"))
    if shards:
        return sum(_num_rows(shard) for shard in shards)
    info = (stream.info.splits or {}).get(split)
    return None if info is None else info.num_examples or None


def _num_rows(shard: Path) -> int:
    try:
        return int(pq.read_metadata(shard).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{shard} is not a readable Parquet file: {error}") from error


def _rows(stream: datasets.IterableDataset, path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield rows whose pictures stay encoded."""
    try:
        yield from stream.decode(False)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{path}: a shard cannot be read: {reason}.") from error


def _whole(row: dict[str, Any]) -> Record:
    """A list that is null is empty."""
    return row | {name: row[name] or [] for name in ("objects", "relations")}


def _record(row: dict[str, Any], labels: Numbering, predicates: Numbering) -> Record:
    entities = _entries(row["objects"])
    kept = {name: row[name] for name in ("image", "width", "height")}
    return kept | {
        "image_id": str(row["image_id"]),
        "width": whole_number(row["width"], "width"),
        "height": whole_number(row["height"], "height"),
        "objects": objects_of(entities, labels),
        "relations": relations_by_id(entities, _entries(row["relations"]), predicates),
    }


def _entries(value: Any) -> Sequence[dict[str, Any]]:
    """Turn a dictionary of lists into a list of dictionaries."""
    if not isinstance(value, dict):
        return list(value or ())
    columns = value.values()
    return [dict(zip(value, entry, strict=True)) for entry in zip(*columns, strict=True)]


def _find_categories(
    path: str | Path, stream: datasets.IterableDataset, categories: str | Path | None
) -> dict[str, Any]:
    file = _hub_or_local_file(path) if categories is None else Path(categories)
    try:
        text = stream.info.description if file is None else file.read_text()
        entries: dict[str, Any] = json.loads(text or "")
        if {"categories", "rel_categories"} <= set(entries):
            return entries
    except ValueError:
        pass
    raise ValueError(
        f"The names of {path} are not in categories.json nor in the description; give a JSON file "
        "with `categories` and `rel_categories`, `--vocabulary` on the command line."
    )


def _hub_or_local_file(path: str | Path) -> Path | None:
    """Return `categories.json` of the folder or of the data set on the Hub, if there is one."""
    if Path(path).exists():
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        file = folder / "categories.json"
        return file if file.is_file() else None
    try:
        found = huggingface_hub.hf_hub_download(str(path), "categories.json", repo_type="dataset")
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError):
        return None
    return Path(found)
