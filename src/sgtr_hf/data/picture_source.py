"""Pictures with or without a class, from folders and from any data set of `datasets`.

Scene graphs have a schema of their own (`schema.py`); this is for what a vision transformer is
evaluated on: a picture, at most a class, and a name to call it by.
"""

import copy
import io
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..image_processing.picture_reading import IMAGE_SUFFIXES, read_image


logger = logging.getLogger(__name__)


class Picture(NamedTuple):
    """One picture."""

    image: Image.Image
    """RGB."""
    label: int
    """Class from 0; -1 if it has none."""
    name: str
    """Path, or number of the row."""


class PictureFiles(Dataset[Picture]):
    """Image files without classes, in the given order.

    Args:
        files: Paths or URLs.
    """

    label_names = None

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Picture:
        return Picture(read_image(self.files[index]), -1, str(self.files[index]))


class PictureFolder(Dataset[Picture]):
    """Image files; those in sub-folders have the sub-folder as their class.

    Args:
        folder: Where they are.

    Raises:
        ValueError: If there are none, or some lie in sub-folders and some do not.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.files = _image_files(folder)
        parts = [file.relative_to(folder).parts for file in self.files]
        if not parts:
            raise ValueError(
                f"The folder {folder} and its sub-folders hold no image "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})."
            )
        is_flat = {len(part) == 1 for part in parts}
        if len(is_flat) > 1:
            raise ValueError(
                f"{folder} has images beside sub-folders with images; put all into sub-folders, "
                "one a class, or all into the folder itself."
            )
        self.label_names = None if is_flat == {True} else sorted({part[0] for part in parts})
        numbers = {name: number for number, name in enumerate(self.label_names or ())}
        self.labels = [numbers.get(part[0], -1) for part in parts]
        self.has_classes = self.label_names is not None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Picture:
        return Picture(read_image(self.files[index]), self.labels[index], str(self.files[index]))


class PictureRows(Dataset[Picture]):
    """Rows of a data set at hand.

    Args:
        rows: With a column of images.
        image_column: Its name; the first one of images if None.
        label_column: Name of the column of classes; `label`, or the first of classes, if None.

    Raises:
        ValueError: If there is no such column.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        self._columns = _find_columns(rows.features, image_column, label_column)
        self.label_names = _label_names(rows.features, self._columns[1])
        wanted = [name for name in self._columns if name is not None]
        self.rows = rows.select_columns(wanted).cast_column(
            self._columns[0], datasets.Image(decode=False)
        )

    @property
    def labels(self) -> list[int]:
        """The class of each row, -1 for none."""
        if self._columns[1] is None:
            return [-1] * len(self.rows)
        return [-1 if label is None else label for label in self.rows[self._columns[1]]]

    @property
    def has_classes(self) -> bool:
        """Whether any row has a class."""
        return any(label >= 0 for label in self.labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Picture:
        return _row_picture(self.rows[index], self._columns, index)


class PictureStream(IterableDataset[Picture]):
    """Rows that are read one after the other, each worker its own shards.

    Args:
        rows: As of `PictureRows`.
        image_column: Likewise.
        label_column: Likewise.

    Attributes:
        on_error: "drop" passes over a picture that cannot be read, and says so in the log; set it
            before reading.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        if rows.features is None:
            rows = rows._resolve_features()
        self._columns = _find_columns(rows.features, image_column, label_column)
        self.label_names = _label_names(rows.features, self._columns[1])
        self.has_classes = self._columns[1] is not None
        self.on_error: Literal["raise", "drop"] = "raise"
        wanted = [name for name in self._columns if name is not None]
        self.rows = rows.select_columns(wanted).cast_column(
            self._columns[0], datasets.Image(decode=False)
        )

    def __iter__(self) -> Iterator[Picture]:
        worker = get_worker_info()
        first = "" if worker is None else f"{worker.id}-"
        for picture in self.read(self.rows):
            yield picture._replace(name=f"{first}{picture.name}") if first else picture

    def read(self, rows: datasets.IterableDataset) -> Iterator[Picture]:
        """Yield the pictures of rows of the same columns, such as `rows` in another order."""
        for number, row in enumerate(rows):
            try:
                picture = _row_picture(row, self._columns, number)
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                logger.warning("Left out: %s", error)
                continue
            yield picture

    def first(self, count: int) -> "PictureStream":
        """Return the stream of the first so many rows."""
        return self._of(self.rows.take(count))

    def share(self, rank: int, num_nodes: int) -> "PictureStream":
        """Return the part of one of several processes."""
        return self._of(split_dataset_by_node(self.rows, rank=rank, world_size=num_nodes))

    def _of(self, rows: datasets.IterableDataset) -> "PictureStream":
        part = copy.copy(self)
        part.rows = rows
        return part


PictureSource = PictureFolder | PictureRows | PictureStream


def open_pictures(
    source: str | Path,
    split: str | None = None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> PictureSource:
    """Open pictures of any kind.

    Args:
        source: A folder of image files (classes as sub-folders), a Parquet file, a folder of
            Parquet files, or a Hub id.
        split: Of a data set; of a folder of images the sub-folder of this name.
        image_column: Column of the images; found if None.
        label_column: Column of the classes; found if None.
        streaming: Read rows one after the other instead of having them at hand.

    Raises:
        ValueError: If there is nothing of the kind, or no such split or column.
    """
    path = Path(source)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        return PictureFolder(_split_folder(path, split))
    rows = _load_rows(path, str(source), split, streaming=streaming)
    kind = PictureStream if streaming else PictureRows
    return kind(rows, image_column, label_column)


def _split_folder(path: Path, split: str | None) -> Path:
    if split is None:
        return path
    if not (path / split).is_dir():
        raise ValueError(f"The folder {path} has no sub-folder {split}, which `split` names.")
    return path / split


def _load_rows(path: Path, source: str, split: str | None, *, streaming: bool) -> Any:
    if path.suffix.lower() == ".parquet":
        if not path.is_file():
            raise ValueError(f"There is no file {path}.")
        arguments: dict[str, Any] = {"path": "parquet", "data_files": str(path)}
        if split not in (None, "train"):
            raise ValueError(f"{path} is one file without splits, `split` must be None: {split}.")
        split = "train"
    elif path.is_file():
        raise ValueError(f"{path} must be a folder of images or a Parquet file.")
    else:
        arguments = {"path": source}
    try:
        if split is None:
            found = datasets.get_dataset_split_names(**arguments)
            if len(found) != 1:
                raise ValueError(f"{source} has the splits {', '.join(found)}; name one.")
            split = found[0]
        return datasets.load_dataset(**arguments, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{source} is no folder, file or data set that opens: {error}") from error


def _find_columns(
    features: datasets.Features, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    for name in (image_column, label_column):
        if name is not None and name not in features:
            raise ValueError(f"There is no column {name}; the columns are {', '.join(features)}.")
    if image_column is None:
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        if not images:
            raise ValueError(
                f"The data has no column of images, but {', '.join(features)}; name it with "
                "`image_column`."
            )
        image_column = images[0]
    if label_column is None:
        classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        label_column = "label" if "label" in features else next(iter(classes), None)
    return image_column, label_column


def _label_names(features: datasets.Features, label_column: str | None) -> list[str] | None:
    kind = None if label_column is None else features[label_column]
    if isinstance(kind, datasets.ClassLabel):
        return list(kind.names)
    if kind is not None and not str(getattr(kind, "dtype", "")).startswith(("int", "uint")):
        raise ValueError(
            f"The column {label_column} must hold classes as numbers from 0, got {kind}; use "
            "`class_encode_column` of `datasets`."
        )
    return None


def _row_picture(row: dict[str, Any], columns: tuple[str, str | None], number: int) -> Picture:
    image_column, label_column = columns
    encoded = row[image_column]
    if encoded is None:
        raise ValueError(f"row {number}: it has no picture.")
    name = encoded.get("path") or f"row {number}"
    try:
        source = encoded["path"] if encoded["bytes"] is None else _decode(encoded["bytes"])
        image = read_image(source)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    label = -1 if label_column is None else row[label_column]
    return Picture(image, -1 if label is None else int(label), name)


def _decode(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture cannot be decoded: {error}") from error


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
