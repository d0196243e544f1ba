"""Pictures to annotate, in shards: any folder of images, Parquet, Hub or streamed data set."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from ..image_processing.picture_reading import IMAGE_SUFFIXES
from .parquet_reader import load_stream


# Columns that are taken for an id, if the data has them.
_ID_COLUMNS = ("image_id", "id", "__key__", "file_name")


class CorpusImage(NamedTuple):
    """A picture that was not opened yet."""

    image_id: str
    path: str | None
    """Its file, or the name it had in the data set."""
    encoded: bytes | None
    """What the file holds, where it is not on this disk."""


class Shard(NamedTuple):
    """A part of a corpus that one process reads."""

    name: str
    num_images: int | None
    """Where it is known without reading."""
    read: Callable[[], Iterator[CorpusImage]]
    """Starts from the beginning each time, in the same order."""


@dataclass(frozen=True)
class Corpus:
    """All shards of a corpus, in their order.

    Args:
        shards: Every process sees the same.
        fingerprint: Changes when the list of files or the chosen columns do; of local Parquet
            files, when their sizes do.
    """

    shards: Sequence[Shard]
    fingerprint: str


def open_corpus(
    source: str | Path,
    split: str,
    shard_images: int,
    *,
    image_column: str | None = None,
    id_column: str | None = None,
) -> Corpus:
    """Open a corpus without reading its pictures.

    Args:
        source: A folder with image files, in sub-folders too; a Parquet file or a folder of them;
            or a Hub id, which is streamed.
        split: Of a data set; a folder of images has none.
        shard_images: Images that a shard of a folder has; other data comes in its own shards.
        image_column: Column of the pictures; the only one of images if None.
        id_column: Column of ids that differ; found, or numbers if None.

    Raises:
        ValueError: If there is no such data, or its columns are others.
    """
    path = Path(source)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        return _open_folder(path, shard_images)
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise ValueError(f"{path} must be a folder of images, or Parquet.")
    stream = load_stream(source, split)
    # Rows say what they hold only when the first is read.
    features = stream.features or stream._resolve_features().features
    image_column = _find_image_column(features, image_column, str(source))
    id_column = _find_id_column(features, id_column)
    wanted = [name for name in (image_column, id_column) if name is not None]
    stream = stream.select_columns(wanted).cast_column(image_column, datasets.Image(decode=False))
    names = [f"{number:05d}" for number in range(stream.num_shards)]
    columns = [f"{image_column} {id_column} {split}"]
    shards = [
        Shard(name, None, _StreamReader(stream, number, (image_column, id_column)))
        for number, name in enumerate(names)
    ]
    return Corpus(shards, _hash([*_describe_source(path, str(source)), *columns, *names]))


def _open_folder(folder: Path, shard_images: int) -> Corpus:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"The folder {folder} and its sub-folders hold no image "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})."
        )
    names = [file.relative_to(folder).as_posix() for file in files]
    ids = _file_ids(names)
    shards = []
    for number, first in enumerate(range(0, len(files), shard_images)):
        rows = range(first, min(first + shard_images, len(files)))
        images = [CorpusImage(ids[row], str(files[row]), None) for row in rows]
        shards.append(Shard(f"{number:05d}", len(images), images.__iter__))
    return Corpus(shards, _hash(names))


def _describe_source(path: Path, source: str) -> list[str]:
    """Names and sizes of local files, wherever they lie; the id of a data set of the Hub."""
    if not path.exists():
        return [source]
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    return [f"{file.relative_to(folder).as_posix()} {file.stat().st_size}" for file in files]


def _file_ids(names: Sequence[str]) -> list[str]:
    """Names without their endings, where that leaves them different."""
    stems = [str(Path(name).with_suffix("")) for name in names]
    seen: dict[str, int] = {}
    for stem in stems:
        seen[stem] = seen.get(stem, 0) + 1
    return [stem if seen[stem] == 1 else name for stem, name in zip(stems, names, strict=True)]


class _StreamReader:
    """Reads one shard of a stream."""

    def __init__(
        self, stream: datasets.IterableDataset, number: int, columns: tuple[str, str | None]
    ) -> None:
        self.stream, self.number, self.columns = stream, number, columns

    def __call__(self) -> Iterator[CorpusImage]:
        image_column, id_column = self.columns
        rows = self.stream.shard(num_shards=self.stream.num_shards, index=self.number)
        for row, record in enumerate(rows):
            image = record[image_column] or {"path": None, "bytes": None}
            image_id = f"{self.number:05d}-{row:08d}" if id_column is None else record[id_column]
            yield CorpusImage(str(image_id), image["path"], image["bytes"])


def _find_image_column(features: Any, name: str | None, place: str) -> str:
    images = [one for one, kind in features.items() if isinstance(kind, datasets.Image)]
    if name is None and len(images) == 1:
        return str(images[0])
    if name is None or name not in features:
        raise ValueError(
            f"{place} has the columns {', '.join(features)}, {len(images)} of them of images; name "
            "the one to annotate, `--image-column` on the command line."
        )
    return name


def _find_id_column(features: Any, name: str | None) -> str | None:
    if name is not None and name not in features:
        raise ValueError(f"There is no column {name}; the columns are {', '.join(features)}.")
    return name or next((one for one in _ID_COLUMNS if one in features), None)


def _hash(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
