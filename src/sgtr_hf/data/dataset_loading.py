"""Opens annotated images for training or evaluation, in any format, in a line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from .._version import __version__
from .dataset_formats import ReadOptions, open_dataset
from .parquet_reader import COCO_COLUMNS, load_stream
from .record_source import RecordSource
from .resampling import ResamplingSettings
from .streaming_dataset import SceneGraphStream
from .training_augmentation import Augmentation
from .training_dataset import ANNOTATION_COLUMNS, SceneGraphDataset, load_split


# Files whose content becomes part of the records, so that their changes must be noticed.
_CONTENT_SUFFIXES = {".json", ".h5", ".hdf5", ".csv", ".txt", ".zip"}


def load(
    path: str | Path,
    split: str = "train",
    *,
    streaming: bool = False,
    augmentation: Augmentation | None = None,
    resampling: ResamplingSettings | None = None,
    seed: int = 0,
    options: ReadOptions | None = None,
) -> SceneGraphDataset | SceneGraphStream:
    """Open a split of annotated images.

    Files of other formats are read once, checked, and kept in the cache of `datasets`, with the
    paths of their pictures, until they change. Parquet is taken as it is; `check` of what is
    returned reads all annotations.

    Args:
        path: A folder of Parquet shards or one of them, a Hub id, or a file or folder of any known
            format.
        split: Its name; "validation" and "val" are one.
        streaming: Read shard by shard instead of having every image at hand.
        augmentation: Random changes of the images.
        resampling: How often images come in an epoch; not for streams.
        seed: Of augmentation and resampling.
        options: What a format needs beside path and split.

    Returns:
        A torch data set of `TrainingImage`s, for which `Collator` makes batches.

    Raises:
        ValueError: If there is no such data, its format is not known, or something in it is wrong.
    """
    if not streaming:
        rows = load_rows(path, split, options)
        return SceneGraphDataset(rows, augmentation, seed, resampling)
    if resampling is not None:
        raise ValueError("`resampling` needs every image at hand: set `streaming` to False.")
    return load_image_stream(path, split, augmentation, seed, options=options)


def load_rows(path: str | Path, split: str, options: ReadOptions | None = None) -> datasets.Dataset:
    """Open a split with every row at hand; arguments and errors as of `load`."""
    if _is_parquet(path, options):
        rows = load_split(path, split)
        if not _has_coco_columns(rows.features):
            return rows
    arguments = _arguments(path, split, options)
    source = _open(**arguments)
    try:
        return datasets.Dataset.from_generator(
            _records, features=source.features(), gen_kwargs=arguments
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def load_image_stream(
    path: str | Path,
    split: str,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    shuffle_buffer: int = 0,
    options: ReadOptions | None = None,
) -> SceneGraphStream:
    """Open a split to be read shard by shard; arguments and errors as of `load`.

    Args:
        path: As of `load`; a file of another format is a single shard.
        split: Its name.
        augmentation: Random changes of the images.
        seed: Of augmentation and order.
        shuffle_buffer: Images among which the next one is chosen at random.
        options: As of `load`.
    """
    if _is_parquet(path, options):
        stream = load_stream(path, split)
        if not _has_coco_columns(stream.features):
            # Only the columns that are asked for are read, and downloaded.
            annotations = load_stream(path, split, columns=list(ANNOTATION_COLUMNS))
            return SceneGraphStream(stream, augmentation, seed, shuffle_buffer, annotations)
    arguments = _arguments(path, split, options)
    stream = datasets.IterableDataset.from_generator(
        _records, features=_open(**arguments).features(), gen_kwargs=arguments
    )
    return SceneGraphStream(stream, augmentation, seed, shuffle_buffer)


def _is_parquet(path: str | Path, options: ReadOptions | None) -> bool:
    """Tell shards, and what may be on the Hub, from files of other formats."""
    if options is not None and options.format_name is not None:
        return options.format_name == "parquet"
    path = Path(path)
    if path.is_dir():
        return any(path.rglob("*.parquet"))
    return path.suffix == ".parquet" or not path.is_file()


def _has_coco_columns(features: datasets.Features) -> bool:
    return "file_name" in features and set(COCO_COLUMNS) <= set(features)


def _arguments(path: str | Path, split: str, options: ReadOptions | None) -> dict[str, Any]:
    """What the records depend on, of which `datasets` makes the key of its cache."""
    # Whether annotations are in the order of the images would only show on the way.
    options = (options or ReadOptions())._replace(with_index=True)
    return {
        "path": str(path),
        "split": split,
        "options": tuple(options),
        "files": _stamps(Path(path), options),
        "version": __version__,
    }


def _stamps(path: Path, options: ReadOptions) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that are read for the records."""
    if path.is_dir():
        files = [*path.glob("*"), *path.glob("*/*")]
    else:
        # HDF5 and CSV files need others beside them, JSON files stand alone.
        files = [path] if path.suffix == ".json" else [*path.parent.glob("*")]
    files += [*options.images, *([options.vocabulary] if options.vocabulary else [])]
    stamps = []
    for file in sorted(map(Path, files)):
        if file.suffix in _CONTENT_SUFFIXES and file.is_file():
            status = file.stat()
            stamps.append((str(file), status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def _open(path: str, split: str, options: tuple[Any, ...], **_: Any) -> RecordSource:
    return open_dataset(path, split, ReadOptions(*options))


def _records(**arguments: Any) -> Iterator[dict[str, Any]]:
    yield from _open(**arguments).checked()
