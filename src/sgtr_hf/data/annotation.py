"""Annotates a corpus with scene graphs: sharded, in bounded memory, resumed after a kill.

Every shard of the corpus is cut into chunks of a fixed number of pictures, and the graphs of a
chunk become one Parquet file, which is there when it is complete. What a chunk holds depends on
the corpus alone, so a run goes on where it, or another number of processes, stopped: files that are
there stay, and no picture is lost or doubled. Batches do not reach over the end of a chunk, hence
graphs do not depend on who computed them either.
"""

import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from ..image_processing.picture_reading import read_image
from ..modeling.batch_norm_folding import FoldedInference
from .corpus import Corpus, CorpusImage, Shard
from .prediction_file import PredictionWriter


# Names that begin so are no part of a data set to those who read the folder as one.
MANIFEST_NAME = "_annotation.json"
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# Batches that a worker may be ahead of the model.
_AHEAD = 2


@dataclass(frozen=True)
class AnnotationSettings:
    """What decides the files that are written.

    Args:
        model: Name of the model, a column of the files.
        revision: Commit or hash of the model, another column.
        batch_size: Pictures that go through the model together.
        chunk_images: Pictures of a file.
        threshold: Least score of a relation.
        top_k: Most relations a picture.
        graph_constraint: Keep one predicate for each ordered pair of entities.
        labels_per_entity: Classes of an entity that may each be a node of the graph.
        distributions: Write the score of every predicate, for recall without graph constraint.
        dtype: Of the model's weights, which decides the last digits of scores.
    """

    model: str
    revision: str
    batch_size: int = 8
    chunk_images: int = 1000
    threshold: float = 0.1
    top_k: int = 100
    graph_constraint: bool = False
    labels_per_entity: int = 1
    distributions: bool = False
    dtype: str = "float32"


class AnnotationReport(NamedTuple):
    """What a process did."""

    annotated: int
    """Pictures whose graphs were written."""
    present: int
    """Files of former runs that stayed."""
    broken: int
    """Pictures that could not be read; `_broken-*.jsonl` names them."""


class _Job(NamedTuple):
    """A batch of pictures to read, with the chunk that it belongs to."""

    chunk: str
    images: Sequence[CorpusImage]
    ends_chunk: bool
    ends_shard: str | None
    """Name of the shard that ends with this batch."""


class _Batch(NamedTuple):
    """The same, read."""

    job: _Job
    readable: Sequence[CorpusImage]
    sizes: Sequence[tuple[int, int]]
    """Heights and widths of the readable ones."""
    features: dict[str, torch.Tensor]
    """Inputs of the model; none if nothing could be read."""
    errors: Sequence[tuple[str, str]]
    """Id and reason of the others."""


class _Reader(Dataset[_Batch]):
    """Decodes and prepares the pictures of a job, in a worker of the loader."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __getitem__(self, job: _Job) -> _Batch:
        pictures, readable, errors = [], [], []
        for image in job.images:
            try:
                pictures.append(_decode(image))
                readable.append(image)
            except (OSError, SyntaxError, ValueError, TypeError) as error:
                errors.append((image.image_id, str(error)))
        try:
            features = self._prepare(pictures)
        except ValueError:
            # One has a shape that cannot be resized; the others must not be lost with it.
            kept = []
            for image, picture in zip(readable, pictures, strict=True):
                try:
                    self._prepare([picture])
                    kept.append((image, picture))
                except ValueError as error:
                    errors.append((image.image_id, str(error)))
            if not kept and len(pictures) > 1:
                # It is the image processor that cannot be.
                raise
            readable, pictures = [image for image, _ in kept], [picture for _, picture in kept]
            features = self._prepare(pictures)
        sizes = [(picture.height, picture.width) for picture in pictures]
        # Their encoded bytes have no further use, and would travel back between processes.
        names = [image._replace(encoded=None) for image in readable]
        return _Batch(job._replace(images=()), names, sizes, features, errors)

    def _prepare(self, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        if not pictures:
            return {}
        return dict(self.image_processor(images=pictures, return_tensors="pt"))


def _decode(image: CorpusImage) -> Image.Image:
    if image.encoded is None:
        return read_image(image.path)
    try:
        opened = Image.open(io.BytesIO(image.encoded))
    except _UNREADABLE as error:
        raise ValueError(f"The picture cannot be decoded: {error}") from error
    return read_image(opened)


class Annotator:
    """Writes the graphs of a process's share of a corpus.

    Args:
        model: Generates scene graphs; on its device, in evaluation mode.
        image_processor: Of the model.
        settings: What decides the files.
        output: Folder of the files; all processes share it.
        num_workers: Processes that read pictures; 0 reads them between batches.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image_processor: Any,
        settings: AnnotationSettings,
        output: Path,
        num_workers: int = 1,
    ) -> None:
        self.model, self.image_processor, self.settings = model, image_processor, settings
        self.output, self.num_workers = output, num_workers
        self._present = 0
        self._infer = FoldedInference()

    def run(
        self, corpus: Corpus, rank: int = 0, num_processes: int = 1, progress: Any = None
    ) -> AnnotationReport:
        """Annotate the shards of one of several processes, but for files that are there.

        Args:
            corpus: The same in every process.
            rank: Number of this process.
            num_processes: Number of processes.
            progress: Is told of pictures by `update(count)`, as a bar of tqdm.

        Raises:
            ValueError: If the folder holds files of another corpus or other settings.
        """
        self._check_manifest(corpus)
        self._present = 0
        self._infer = FoldedInference()
        loader = DataLoader(
            _Reader(self.image_processor),
            # Read one after the other, as the workers ask for them.
            sampler=self._jobs(corpus.shards[rank::num_processes]),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            prefetch_factor=_AHEAD if self.num_workers else None,
        )
        annotated = broken = 0
        batches = iter(loader)
        for first in batches:
            written, lost = self._write_chunk(first, batches, progress)
            annotated, broken = annotated + written, broken + lost
        return AnnotationReport(annotated, self._present, broken)

    def _jobs(self, shards: Sequence[Shard]) -> Iterator[_Job]:
        """Cut what is not there yet into batches."""
        size, batch_size = self.settings.chunk_images, self.settings.batch_size
        for shard in shards:
            num_present = self._count_present(shard)
            self._present += num_present
            if self._is_complete(shard, num_present):
                continue
            position = num_present * size
            images: list[CorpusImage] = []
            for image, is_last in _with_end(itertools.islice(shard.read(), position, None)):
                images.append(image)
                position += 1
                ends_chunk = is_last or position % size == 0
                if ends_chunk or len(images) == batch_size:
                    name = f"{shard.name}-{(position - 1) // size:05d}"
                    yield _Job(name, images, ends_chunk, shard.name if is_last else None)
                    images = []
            if position == num_present * size:
                # Killed after its last file, or without a picture.
                self._mark(shard.name, num_present)

    def _count_present(self, shard: Shard) -> int:
        """The number of files that a former run left, which are the first ones."""
        number = 0
        while self._file(f"{shard.name}-{number:05d}").exists():
            number += 1
        return number

    def _file(self, chunk: str) -> Path:
        return self.output / f"graphs-{chunk}.parquet"

    def _marker(self, shard_name: str) -> Path:
        """A file that says how many files the shard has, once all are there."""
        return self.output / f".complete-{shard_name}"

    def _mark(self, shard_name: str, num_files: int) -> None:
        self._marker(shard_name).write_text(f"{num_files}\n")

    def _is_complete(self, shard: Shard, num_present: int) -> bool:
        """Tell whether all files are there still; one may have been deleted to be made again."""
        try:
            return int(self._marker(shard.name).read_text()) == num_present
        except (FileNotFoundError, ValueError):
            return False

    def _write_chunk(
        self, first: _Batch, batches: Iterator[_Batch], progress: Any
    ) -> tuple[int, int]:
        """Write the file of a chunk from its first batch on; return graphs and losses."""
        settings, config, name = self.settings, self.model.config, first.job.chunk
        errors: list[tuple[str, str]] = []
        columns = {"model": settings.model, "revision": settings.revision}
        with PredictionWriter(
            self._file(name),
            config.id2label,
            config.id2predicate,
            distributions=settings.distributions,
            constants=columns,
        ) as writer:
            count, batch = 0, first
            while True:
                for image, graph in zip(batch.readable, self._graphs(batch), strict=True):
                    writer.write(image.image_id, graph, image.path)
                errors += batch.errors
                count += len(batch.readable)
                if progress is not None:
                    progress.update(len(batch.readable) + len(batch.errors))
                if batch.job.ends_chunk:
                    break
                batch = next(batches)
            # Before the file gets its name, so that no loss goes unnoticed.
            self._write_errors(name, errors)
        if batch.job.ends_shard is not None:
            self._mark(batch.job.ends_shard, 1 + int(name.rpartition("-")[2]))
        return count, len(errors)

    @torch.inference_mode()
    def _graphs(self, batch: _Batch) -> list[Any]:
        if not batch.readable:
            return []
        features = {name: value.to(self.model.device) for name, value in batch.features.items()}
        features["pixel_values"] = features["pixel_values"].to(self.model.dtype)
        settings = self.settings
        return list(
            self.image_processor.post_process_scene_graph(
                self._infer(self.model, **features),
                threshold=settings.threshold,
                top_k=settings.top_k,
                graph_constraint=settings.graph_constraint,
                labels_per_entity=settings.labels_per_entity,
                target_sizes=batch.sizes,
                id2label=self.model.config.id2label,
                id2predicate=self.model.config.id2predicate,
            )
        )

    def _write_errors(self, chunk: str, errors: Sequence[tuple[str, str]]) -> None:
        path = self.output / f"_broken-{chunk}.jsonl"
        # Of a run that was killed, which may have found other pictures here.
        path.unlink(missing_ok=True)
        lines = [json.dumps({"image_id": image_id, "error": text}) for image_id, text in errors]
        if lines:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _check_manifest(self, corpus: Corpus) -> None:
        """Note what decides the files, or compare it with what a former run noted."""
        manifest = {**asdict(self.settings), "corpus": corpus.fingerprint}
        path = self.output / MANIFEST_NAME
        self.output.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(self.output.glob("*.parquet")):
                raise ValueError(f"{self.output} holds Parquet files of something else.")
            # Processes that start together write the same.
            unfinished = path.with_name(f".{MANIFEST_NAME}-{os.getpid()}")
            unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            unfinished.replace(path)
            return
        known = json.loads(path.read_text(encoding="utf-8"))
        for name, value in manifest.items():
            if known.get(name) != value:
                raise ValueError(
                    f"{self.output} was begun with `{name}` {known.get(name)!r}, not {value!r}; "
                    "name another folder, or repeat the first command."
                )


def _with_end(images: Iterable[CorpusImage]) -> Iterator[tuple[CorpusImage, bool]]:
    """Say of each picture whether it is the last one."""
    waiting = None
    for image in images:
        if waiting is not None:
            yield waiting, False
        waiting = image
    if waiting is not None:
        yield waiting, True


def _as_it_is(batch: Any) -> Any:
    """Take the place of the loader's collation, which would make tensors of everything."""
    return batch
