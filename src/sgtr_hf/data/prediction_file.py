"""Predicted graphs as Parquet: the record of annotated images, with scores.

What `sgtr-hf predict` writes and `sgtr-hf evaluate` reads. B images of a batch, P predicates.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from ..scene_graph import SceneGraph
from .psg_reader import encode_mask
from .schema import scene_graph_features, vocabularies


AnyArray = NDArray[Any]

# Images of a row group: a few megabytes with distributions.
GROUP_IMAGES = 64
_COLUMNS = ("image_id", "width", "height", "objects", "relations")
_ENTITY_FIELDS = ("bbox", "label", "score")
_RELATION_FIELDS = ("subject", "object", "predicate", "score")


class Prediction(NamedTuple):
    """A predicted graph and the image it is of."""

    image_id: str
    file_name: str | None
    """Name of the image's file, where it is known."""
    graph: SceneGraph


def prediction_features(
    entity_names: Sequence[str],
    predicate_names: Sequence[str],
    *,
    distributions: bool = False,
    masks: bool = False,
) -> datasets.Features:
    """Describe the record of a predicted graph: `scene_graph_features` with scores.

    Args:
        entity_names: Classes of entities, from 0, without background.
        predicate_names: Predicates, from 0, without background.
        distributions: Whether relations have "distribution", the score of every predicate.
        masks: Whether entities have a mask, an image of the whole picture's size.
    """
    features = scene_graph_features(entity_names, predicate_names, masks=masks)
    score = {"score": datasets.Value("float32")}
    relation = features["relations"].feature | score
    if distributions:
        relation["distribution"] = datasets.List(
            datasets.Value("float32"), length=len(predicate_names)
        )
    features["objects"] = datasets.List(features["objects"].feature | score)
    features["relations"] = datasets.List(relation)
    return features


class PredictionWriter(AbstractContextManager["PredictionWriter"]):
    """Writes predicted graphs one after the other; whole, or not at all.

    Args:
        path: The file, replaced if it is there.
        id2label: Names of all classes, from 0.
        id2predicate: Names of all predicates, from 0.
        distributions: Write `predicate_distributions`, which every graph with relations then needs.
        masks: Write `masks`, which every graph with entities then needs.
        constants: Columns of text that are the same in every record, as the model's name.

    Example:
        ```python
        with PredictionWriter(path, config.id2label, config.id2predicate) as writer:
            writer.write("2343729", graph, "images/2343729.jpg")
        ```
    """

    def __init__(
        self,
        path: Path,
        id2label: Mapping[int, str],
        id2predicate: Mapping[int, str],
        *,
        distributions: bool = False,
        masks: bool = False,
        constants: Mapping[str, str] | None = None,
    ) -> None:
        names = [
            [mapping[number] for number in range(len(mapping))]
            for mapping in (id2label, id2predicate)
        ]
        self.features = prediction_features(*names, distributions=distributions, masks=masks)
        self.constants = dict(constants or {})
        for name in self.constants:
            self.features[name] = datasets.Value("string")
        self.path, self.distributions, self.masks = path, distributions, masks
        self.count = 0
        self._num_names = [len(names) for names in vocabularies(self.features)]
        self._waiting: list[tuple[str, str | None, SceneGraph]] = []
        self._unfinished = path.with_name(f".unfinished-{path.name}")
        self._schema = self.features.arrow_schema
        self._file = pq.ParquetWriter(self._unfinished, self._schema)

    def write(self, image_id: str, graph: SceneGraph, image_path: str | None = None) -> None:
        """Add the graph of an image.

        Args:
            image_id: The image's id in the annotations that it is compared with.
            graph: Relations best first.
            image_path: Where the picture is.

        Raises:
            ValueError: If a class has no name, or distributions or masks are missing.
        """
        for name, is_wanted, count in (
            ("predicate_distributions", self.distributions, graph.num_relations),
            ("masks", self.masks, graph.num_entities),
        ):
            if is_wanted and count and getattr(graph, name) is None:
                raise ValueError(f"Image {image_id}: the graph has no `{name}` to write.")
        numbers = (("labels", graph.labels), ("relations", graph.relations[:, 2]))
        for (name, values), limit in zip(numbers, self._num_names, strict=True):
            if len(values) and values.max() >= limit:
                raise ValueError(
                    f"Image {image_id}: `{name}` must be below {limit}, the number of names, got "
                    f"{values.max()}."
                )
        self._waiting.append((image_id, image_path, graph))
        if len(self._waiting) >= GROUP_IMAGES:
            self._flush()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self._flush()
        self._file.close()
        if error is None:
            # Or a power failure could leave the name without the content.
            with self._unfinished.open("rb") as file:
                os.fsync(file.fileno())
            self._unfinished.replace(self.path)
        else:
            self._unfinished.unlink(missing_ok=True)

    def _flush(self) -> None:
        if not self._waiting:
            return
        ids, paths, graphs = zip(*self._waiting, strict=True)
        self._waiting = []
        sizes = np.array([graph.image_size for graph in graphs], dtype=np.int32)
        columns = {
            "image": pa.array([{"bytes": None, "path": path} for path in paths]),
            "image_id": pa.array(ids),
            "width": pa.array(sizes[:, 1]),
            "height": pa.array(sizes[:, 0]),
            "objects": self._objects(graphs),
            "relations": self._relations(graphs),
        }
        columns |= {name: pa.array([text] * len(ids)) for name, text in self.constants.items()}
        table = pa.table([columns[name] for name in self._schema.names], list(self._schema.names))
        self._file.write_table(table.cast(self._schema))
        self.count += len(graphs)

    def _objects(self, graphs: Sequence[SceneGraph]) -> pa.Array:
        boxes = np.concatenate([graph.boxes_xyxy for graph in graphs])
        counts = [graph.num_entities for graph in graphs]
        fields = {
            "id": np.concatenate([np.arange(count) for count in counts]),
            "bbox": pa.FixedSizeListArray.from_arrays(boxes.ravel(), 4),
            "label": np.concatenate([graph.labels for graph in graphs]),
            "score": np.concatenate([graph.scores for graph in graphs]),
        }
        if self.masks:
            masks = [mask for graph in graphs if graph.masks is not None for mask in graph.masks]
            fields["mask"] = [{"bytes": encode_mask(mask), "path": None} for mask in masks]
        return _lists(fields, counts, self.features["objects"].feature)

    def _relations(self, graphs: Sequence[SceneGraph]) -> pa.Array:
        relations = np.concatenate([graph.relations for graph in graphs])
        fields: dict[str, Any] = {
            "subject": relations[:, 0].astype(np.int32),
            "object": relations[:, 1].astype(np.int32),
            "predicate": relations[:, 2],
            "score": np.concatenate([graph.relation_scores for graph in graphs]),
        }
        if self.distributions:
            width = len(self.features["relations"].feature["predicate"].names)
            known = [graph.predicate_distributions for graph in graphs if graph.num_relations]
            table = np.concatenate([np.zeros((0, width), dtype=np.float32), *known])
            fields["distribution"] = pa.FixedSizeListArray.from_arrays(table.ravel(), width)
        counts = [graph.num_relations for graph in graphs]
        return _lists(fields, counts, self.features["relations"].feature)


class PredictionFile:
    """Predicted graphs of a Parquet file, or of all in a folder; iterating streams them.

    Args:
        path: A file, or a folder of files, read in the order of their names.

    Attributes:
        entity_names: Classes, from 0.
        predicate_names: Predicates, from 0.
        count: Number of images.

    Raises:
        ValueError: If there is no such file, or it is not of this kind.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.paths = sorted(self.path.glob("*.parquet")) if self.path.is_dir() else [self.path]
        if not self.paths:
            raise ValueError(f"The folder {path} has no Parquet file of predictions.")
        schemas = [_read_features(one) for one in self.paths]
        for one, features in zip(self.paths, schemas, strict=True):
            if vocabularies(features) != vocabularies(schemas[0]):
                raise ValueError(f"{one} has other names than {self.paths[0]}.")
        id2label, id2predicate = vocabularies(schemas[0])
        self.entity_names, self.predicate_names = (
            list(id2label.values()),
            list(id2predicate.values()),
        )
        self.count: int = sum(pq.read_metadata(one).num_rows for one in self.paths)

    def __iter__(self) -> Iterator[Prediction]:
        """Read the graphs, a few at a time.

        Raises:
            ValueError: With file, record, image and field of what is wrong, and the number of good
                records before it.
        """
        number = 0
        for path in self.paths:
            # What is read ahead would stay in memory to the end of the file.
            file = pq.ParquetFile(path, pre_buffer=False)
            columns = [name for name in ("image", *_COLUMNS) if name in file.schema_arrow.names]
            for batch in file.iter_batches(GROUP_IMAGES, columns=columns):
                for prediction in self._read(batch, f"{path}: record", number):
                    yield prediction
                    number += 1

    def _read(self, batch: pa.RecordBatch, place: str, number: int) -> Iterator[Prediction]:
        """Cut a batch into graphs; `number` is that of its first record."""
        row, image_id = 0, None
        try:
            reading = _BatchReading(batch, (self.entity_names, self.predicate_names))
            for row, image_id in enumerate(reading.image_ids):
                yield Prediction(image_id, reading.file_names[row], reading.graph(row))
        except (ValueError, OSError) as error:
            where = number + row
            known = "" if image_id is None else f" (image {image_id})"
            raise ValueError(
                f"{place} {where}{known}: {error} {where} good records were read before."
            ) from error


class _BatchReading:
    """A few records as flat arrays, and the graphs that they are cut into."""

    def __init__(self, batch: pa.RecordBatch, names: tuple[list[str], list[str]]) -> None:
        self.id2label, self.id2predicate = (dict(enumerate(one)) for one in names)
        self.image_ids = [str(value) for value in batch.column("image_id").to_pylist()]
        self.file_names = _file_names(batch)
        self.sizes = [batch.column(name).to_pylist() for name in ("height", "width")]
        self.entity_ends, self.entities = _fields(batch, "objects", _ENTITY_FIELDS, "mask")
        self.relation_ends, self.relations = _fields(
            batch, "relations", _RELATION_FIELDS, "distribution"
        )

    def graph(self, row: int) -> SceneGraph:
        entities = {
            name: _cut(values, self.entity_ends, row) for name, values in self.entities.items()
        }
        relations = {
            name: _cut(values, self.relation_ends, row) for name, values in self.relations.items()
        }
        masks = entities.get("mask")
        return SceneGraph(
            boxes_xyxy=entities["bbox"],
            labels=entities["label"],
            scores=entities["score"],
            relations=np.column_stack(
                (relations["subject"], relations["object"], relations["predicate"])
            ),
            relation_scores=relations["score"],
            image_size=(self.sizes[0][row], self.sizes[1][row]),
            id2label=self.id2label,
            id2predicate=self.id2predicate,
            predicate_distributions=relations.get("distribution"),
            masks=None if masks is None else decode_masks(masks),
        )


def decode_masks(entries: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_] | None:
    """Return (n, height, width) masks of image entries; None of nothing."""
    if not len(entries):
        return None
    return np.stack(
        [np.asarray(Image.open(io.BytesIO(entry["bytes"])), dtype=np.bool_) for entry in entries]
    )


def _lists(
    fields: Mapping[str, Any], counts: Sequence[int], features: Mapping[str, Any]
) -> pa.Array:
    """Lists of structures, one list an image, in the order of the features."""
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    arrays = []
    for name, feature in features.items():
        values = fields[name]
        is_array = isinstance(values, pa.Array)
        kind = feature.pa_type if hasattr(feature, "pa_type") else None
        arrays.append(values if is_array else pa.array(values, type=kind))
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(arrays, list(features)))


def _read_features(path: Path) -> datasets.Features:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        schema = pq.read_schema(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not Parquet: {error}") from error
    features = datasets.Features.from_arrow_schema(schema)
    missing = [name for name in _COLUMNS if name not in features]
    if missing:
        raise ValueError(
            f"{path} lacks the columns {', '.join(missing)}; write it with `sgtr-hf predict` or "
            "`sgtr_hf.data.prediction_file`."
        )
    vocabularies(features)
    for column, fields in (("objects", _ENTITY_FIELDS), ("relations", _RELATION_FIELDS)):
        lacking = [name for name in fields if name not in features[column].feature]
        if lacking:
            raise ValueError(
                f"{path}: `{column}` lack {', '.join(lacking)}; predictions need scores, is this "
                "an annotation?"
            )
    return features


def _file_names(batch: pa.RecordBatch) -> list[str | None]:
    if "image" not in batch.schema.names:
        return [None] * batch.num_rows
    paths = [(entry or {}).get("path") for entry in batch.column("image").to_pylist()]
    return [None if path is None else Path(path).name for path in paths]


def _fields(
    batch: pa.RecordBatch, column: str, names: Sequence[str], optional: str
) -> tuple[AnyArray, dict[str, Any]]:
    """Where the entries of each image end, and the fields of all entries behind each other."""
    lists = batch.column(column)
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    entries = lists.flatten()
    known = [entries.type.field(index).name for index in range(entries.type.num_fields)]
    fields = {name: _numbers(entries.field(name), f"{column}.{name}") for name in names}
    if optional in known:
        values = entries.field(optional)
        is_picture = pa.types.is_struct(values.type)
        fields[optional] = (
            values.to_pylist() if is_picture else _numbers(values, f"{column}.{optional}")
        )
    return np.concatenate(([0], np.cumsum(counts))), fields


def _numbers(values: pa.Array, name: str) -> AnyArray:
    """(n,), or (n, m) of lists of one length."""
    if values.null_count:
        raise ValueError(f"`{name}` must not be missing, but it is in one of the next records.")
    kind = values.type
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return np.asarray(values.to_numpy(zero_copy_only=False))
    flat = np.asarray(values.flatten().to_numpy(zero_copy_only=False))
    if not len(values):
        return flat.reshape(0, 4)
    if len(flat) % len(values):
        raise ValueError(f"`{name}` must have one length, but it has not in the next records.")
    return flat.reshape(len(values), -1)


def _cut(values: Any, ends: AnyArray, row: int) -> Any:
    return values[int(ends[row]) : int(ends[row + 1])]
