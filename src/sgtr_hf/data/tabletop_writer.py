"""Writes a tabletop data set: Parquet shards in the one schema, and a data set card."""

import io
import itertools
import math
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from .schema import scene_graph_features
from .tabletop_objects import ENTITY_NAMES
from .tabletop_relations import PREDICATE_NAMES
from .tabletop_scenes import Scene, TabletopRenderer


SPLITS = ("train", "validation", "test")
JPEG_QUALITY = 88
# Images of a shard: about 50 MB, and enough shards for the readers of several processes.
SHARD_IMAGES = 5000
_renderer: list[TabletopRenderer] = []


def make_tabletop(
    output: Path,
    *,
    images: int = 10000,
    validation_images: int = 500,
    test_images: int = 500,
    seed: int = 0,
    workers: int | None = None,
    image_size: int = 256,
) -> None:
    """Render tabletop scenes into `output`, readable by `datasets.load_dataset(output)`.

    The same seed gives the same bytes, whatever the number of workers. The splits never share a
    scene: a scene's seed is made of `seed`, its split and its number.

    Args:
        output: A folder that is empty or does not exist.
        images: Training images.
        validation_images: Validation images.
        test_images: Test images.
        seed: Decides everything.
        workers: Processes; one a core if None.
        image_size: Width and height in pixels.

    Raises:
        ValueError: If a number is out of range or the folder is not empty.
    """
    counts = dict(zip(SPLITS, (images, validation_images, test_images), strict=True))
    if images < 1 or min(counts.values()) < 0:
        raise ValueError(f"`images` must be at least 1 and no split negative, got {counts}.")
    if seed < 0:
        raise ValueError(f"`seed` must be 0 or more, got {seed}.")
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a folder, but {output} is a file; name another.")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"`output` must be an empty folder, but {output} has files; name another.")
    output.mkdir(parents=True, exist_ok=True)
    statistics = _Statistics()
    with tempfile.TemporaryDirectory() as textures:
        pool = multiprocessing.get_context("spawn").Pool(
            workers or os.cpu_count(), _start_worker, (Path(textures), (image_size, image_size))
        )
        with pool, tqdm(total=sum(counts.values()), unit="image") as progress:
            for split_index, (split, count) in enumerate(counts.items()):
                jobs = ((seed, split_index, index) for index in range(count))
                records = pool.imap(_render_record, jobs, chunksize=8)
                for shard_path, shard in _shards(output, split, count, records):
                    rows = []
                    for record in shard:
                        statistics.add(split, record)
                        rows.append(record)
                        progress.update()
                    _write_shard(shard_path, rows)
    (output / "README.md").write_text(_card(statistics, counts, seed, image_size))


def record_of(scene: Scene, image_id: str) -> dict[str, Any]:
    """Turn a scene into a record of the schema, its picture as JPEG."""
    picture = io.BytesIO()
    scene.image.save(picture, "JPEG", quality=JPEG_QUALITY)
    objects = [
        {"id": index, "bbox": [float(value) for value in box], "label": label}
        for index, (box, label) in enumerate(zip(scene.boxes, scene.labels, strict=True))
    ]
    return {
        "image": {"bytes": picture.getvalue(), "path": None},
        "image_id": image_id,
        "width": scene.image.width,
        "height": scene.image.height,
        "objects": objects,
        "relations": [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in scene.relations
        ],
    }


def _start_worker(textures: Path, size: tuple[int, int]) -> None:
    folder = textures / str(os.getpid())
    folder.mkdir()
    _renderer.append(TabletopRenderer(folder, size))


def _render_record(job: tuple[int, int, int]) -> dict[str, Any]:
    seed, split_index, index = job
    scene = _renderer[0].render(np.random.SeedSequence(job))
    return record_of(scene, f"{SPLITS[split_index]}-{seed}-{index:06d}")


def _shards(
    output: Path, split: str, count: int, records: Iterator[dict[str, Any]]
) -> Iterator[tuple[Path, Iterator[dict[str, Any]]]]:
    """Cut a stream of records into shards of nearly equal length."""
    num_shards = math.ceil(count / SHARD_IMAGES)
    for shard in range(num_shards):
        length = count * (shard + 1) // num_shards - count * shard // num_shards
        path = output / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet"
        yield path, itertools.islice(records, length)


def _write_shard(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write under another name first: an interrupted run leaves no half shard."""
    features = scene_graph_features(ENTITY_NAMES, PREDICATE_NAMES)
    unfinished = path.with_suffix(".unfinished")
    Dataset.from_list(rows, features=features).to_parquet(unfinished)
    unfinished.replace(path)


class _Statistics:
    """What the card says of the training split."""

    def __init__(self) -> None:
        self.images = self.entities = 0
        self.predicates: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()

    def add(self, split: str, record: dict[str, Any]) -> None:
        if split != "train":
            return
        self.images += 1
        self.entities += len(record["objects"])
        self.classes.update(ENTITY_NAMES[entity["label"]] for entity in record["objects"])
        self.predicates.update(
            PREDICATE_NAMES[relation["predicate"]] for relation in record["relations"]
        )


def _card(statistics: _Statistics, counts: dict[str, int], seed: int, image_size: int) -> str:
    relations = sum(statistics.predicates.values())
    predicate_rows = "\n".join(
        f"| {name} | {statistics.predicates[name] / relations:.1%} |"
        for name in sorted(PREDICATE_NAMES, key=lambda name: -statistics.predicates[name])
    )
    class_rows = "\n".join(
        f"| {name} | {statistics.classes[name] / statistics.images:.2f} |" for name in ENTITY_NAMES
    )
    return f"""---
license: cc0-1.0
task_categories: [object-detection]
tags: [scene-graph-generation, synthetic]
pretty_name: Tabletop scenes
---
# Tabletop scenes

Rendered scenes of toys and household things on, under and around a small table, for scene graph
generation: every relation follows from the geometry of the scene and can be seen in the picture.
Bodies are dropped and settled by a physics engine and seen by its software renderer.

Made by

```
sgtr-hf make-tabletop OUTPUT --images {counts["train"]} \\
    --validation-images {counts["validation"]} --test-images {counts["test"]} \\
    --seed {seed} --image-size {image_size}
```

The same command gives the same bytes on the same kind of machine. No scene is in two splits.

Of the training split: {statistics.entities / statistics.images:.2f} entities and
{relations / statistics.images:.2f} relations an image.

| predicate | share |
|---|---|
{predicate_rows}

| class | an image |
|---|---|
{class_rows}

How relations are decided: "inside" an open box; "leaning on" what holds a tilted thing from the
side; "on" what carries it, or "supporting" when the carrier has the clearly smaller footprint;
"under" a table top; else the nearest neighbour on the same ground: "next to" if they nearly touch,
otherwise the direction as the viewer sees it, told of the one that looks smaller. A pair has at
most one relation. Boxes enclose the visible parts. A mirror image swaps "left of" and "right of".
"""
