"""Writes the card of a data set in Parquet: what a folder holds, counted from its shards."""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import DatasetCardData

from .._version import __version__
from .schema import vocabularies


logger = logging.getLogger(__name__)

# Cards with this line are written anew when a split is added; without it they stay.
_MARK = "<!-- Written by sgtr-hf. Remove this line to keep your own changes. -->"
_SHOWN_PREDICATES = 60


@dataclass
class _Split:
    """What the shards of a split hold."""

    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    predicates: Counter[int] = field(default_factory=Counter)

    def row(self, name: str) -> str:
        images, entities, relations = self.images, self.labels.total(), self.predicates.total()
        per_image = max(images, 1)
        return (
            f"| {name} | {images} | {entities} ({entities / per_image:.1f} an image) | "
            f"{relations} ({relations / per_image:.1f} an image) |"
        )


def write_dataset_card(folder: Path, origin: str) -> None:
    """Describe the shards of a folder in its README.md, which also names the splits' files.

    A README.md that others wrote stays as it is.

    Args:
        folder: Holds `{split}-00000-of-00001.parquet` and the like.
        origin: What the records were read from.
    """
    card = folder / "README.md"
    if card.is_file() and _MARK not in card.read_text():
        logger.warning("%s is not ours and stays; check that its `configs` name all splits.", card)
        return
    shards: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*-of-*.parquet")):
        shards.setdefault(path.name.rsplit("-", 3)[0], []).append(path)
    if not shards:
        return
    first = next(iter(shards.values()))[0]
    features = datasets.Features.from_arrow_schema(pq.read_schema(first))
    splits = {name: _count(paths) for name, paths in shards.items()}
    text = (
        f"---\n{_metadata(folder, splits)}\n---\n{_MARK}\n{_text(folder, origin, splits, features)}"
    )
    unfinished = folder / ".README.md"
    unfinished.write_text(text)
    unfinished.replace(card)


def _count(paths: Iterable[Path]) -> _Split:
    """Read the columns of labels and predicates, and nothing else."""
    counts = _Split()
    for path in paths:
        with pq.ParquetFile(path) as file:
            counts.images += file.metadata.num_rows
            counts.labels.update(_leaf_values(file, "objects", "label"))
            counts.predicates.update(_leaf_values(file, "relations", "predicate"))
    return counts


def _leaf_values(file: pq.ParquetFile, column: str, leaf: str) -> dict[int, int]:
    """Count the values of a field of the entries of a list."""
    names = [file.schema.column(number).path for number in range(len(file.schema))]
    paths = [n for n in names if n.startswith(f"{column}.") and n.endswith(f".{leaf}")]
    if not paths:
        raise ValueError(
            f"The Parquet files have no `{column}` with `{leaf}`; this pushes scene graphs in the "
            "schema of docs/data.md, `sgtr-hf convert` makes them."
        )
    path = paths[0]
    values = [
        batch.column(0).flatten().field(leaf).to_numpy(zero_copy_only=False)
        for batch in file.iter_batches(columns=[path])
    ]
    if not values:
        return {}
    numbers, counts = np.unique(np.concatenate(values), return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


def _metadata(folder: Path, splits: dict[str, _Split]) -> str:
    data = DatasetCardData(
        pretty_name=folder.name,
        task_categories=["object-detection"],
        tags=["scene-graph-generation"],
        configs=[
            {
                "config_name": "default",
                "data_files": [
                    {"split": name, "path": f"{name}-*-of-*.parquet"} for name in splits
                ],
            }
        ],
    )
    return str(data.to_yaml())


def _text(folder: Path, origin: str, splits: dict[str, _Split], features: Any) -> str:
    id2label, id2predicate = vocabularies(features)
    entity = features["objects"].feature
    extras = [name for name in ("attributes", "mask") if name in entity]
    fields = ", ".join(f"`{name}`" for name in ("id", "bbox", "label", *extras))
    largest = max(splits.values(), key=lambda split: split.images)
    relations = max(largest.predicates.total(), 1)
    ranked = sorted(id2predicate, key=lambda number: -largest.predicates[number])
    predicates = "\n".join(
        f"| {id2predicate[number]} | {largest.predicates[number]} | "
        f"{largest.predicates[number] / relations:.2%} |"
        for number in ranked[:_SHOWN_PREDICATES]
    )
    rows = "\n".join(split.row(name) for name, split in splits.items())
    return f"""# {folder.name}

Images with scene graphs, converted from {origin} by sgtr-hf {__version__}. Licences of pictures and
annotations are those of the source.

| split | images | entities | relations |
|---|---|---|---|
{rows}

A record has `image`, `image_id`, `width`, `height`, `objects` with {fields}, and `relations` with
`subject`, `object`, `predicate`. A `bbox` is x1, y1, x2, y2 in pixels; subject and object are rows
of `objects`; `label` and `predicate` are class labels from 0, without background.

```python
import sgtr_hf

images = sgtr_hf.data.load("{folder.name}", "{next(iter(splits))}")
```

{len(id2predicate)} predicates, in the largest split:

| predicate | relations | share |
|---|---|---|
{predicates}

{len(id2label)} classes: {", ".join(id2label.values())}.
"""
