"""Pictures without boxes for training, changed at random: at hand, decoded once, or streamed."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .picture_source import Picture, PictureStream
from .worker_shares import images_of_this_worker


logger = logging.getLogger(__name__)

# Decoded pictures that are held in memory at most; more are a mistake.
_CACHE_LIMIT = 16 * 2**30
# Epochs of a run are numbered below this.
_EPOCHS_AT_MOST = 1_000_000

Change = Callable[[Image.Image], Any]


class ChangedPicture(NamedTuple):
    """A picture after its random change."""

    pixels: Any
    """What the change returned."""
    label: int
    """Class from 0; -1 if it has none."""
    name: str


class ReadablePictures(Dataset[Picture]):
    """Pictures at hand, of which some may be broken.

    Args:
        pictures: A folder, rows, or `DecodedPictures`.
        on_error: "raise" if a picture cannot be read, or "drop" to take the next one.
    """

    def __init__(self, pictures: Dataset[Picture], on_error: str = "raise") -> None:
        self.pictures, self.on_error = pictures, on_error

    def __len__(self) -> int:
        return len(self.pictures)  # type: ignore[arg-type] # torch gives its data sets no length

    def __getitem__(self, index: int) -> Picture:
        for step in range(len(self)):
            try:
                return self.pictures[(index + step) % len(self)]
            except ValueError as error:
                if self.on_error == "raise":
                    raise
                logger.warning("Left out: %s", error)
        raise ValueError("No picture of the training split can be read.")


class TrainingPictures(Dataset[ChangedPicture]):
    """Pictures at hand, whose changes depend on seed, epoch and index alone.

    Args:
        pictures: As of `ReadablePictures`.
        change: Draws from torch's random numbers.
        seed: Of the changes.
        on_error: As of `ReadablePictures`.

    Attributes:
        epoch: Decides the changes; set it before each pass.
    """

    def __init__(
        self, pictures: Dataset[Picture], change: Change, seed: int = 0, on_error: str = "raise"
    ) -> None:
        self.pictures = ReadablePictures(pictures, on_error)
        self.change, self.seed = change, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> ChangedPicture:
        return _change(self.pictures[index], self.change, (self.seed, self.epoch, index))


class DecodedPictures(Dataset[Picture]):
    """Small pictures that are decoded once and kept in memory.

    All in one array, which worker processes share as long as none writes to it.

    Args:
        pictures: A folder or rows.
        on_error: As of `ReadablePictures`.

    Raises:
        ValueError: If sizes differ, or the pictures do not fit into memory.
    """

    def __init__(self, pictures: Dataset[Picture], on_error: str = "raise") -> None:
        readable = ReadablePictures(pictures, on_error)
        count = len(readable)
        self.pixels: NDArray[np.uint8] = np.zeros((0, 0, 0, 3), dtype=np.uint8)
        self.labels: list[int] = []
        for index in range(count):
            picture = readable[index]
            pixels = np.asarray(picture.image.convert("RGB"))
            if index == 0:
                self.pixels = _reserve((count, *pixels.shape))
            if pixels.shape != self.pixels.shape[1:]:
                height, width, _ = self.pixels.shape[1:]
                raise ValueError(
                    f"`data.cache_images` needs pictures of one size; {picture.name} has "
                    f"{pixels.shape[1]} x {pixels.shape[0]} pixels, the first one {width} x "
                    f"{height}."
                )
            self.pixels[index] = pixels
            self.labels.append(picture.label)
        self.label_names = getattr(pictures, "label_names", None)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Picture:
        return Picture(Image.fromarray(self.pixels[index]), self.labels[index], f"row {index}")


class TrainingPictureStream(IterableDataset[ChangedPicture]):
    """Pictures that are read shard by shard, each process and each worker its own.

    An epoch is a given number of pictures; a worker whose shards are read begins them again.

    Args:
        stream: The rows.
        change: Draws from torch's random numbers.
        images_per_epoch: Of all processes together.
        seed: Of changes and order.
        shuffle_buffer: Pictures among which the next one is chosen at random.

    Attributes:
        epoch: Decides changes and order; set it before each pass.
    """

    def __init__(
        self,
        stream: PictureStream,
        change: Change,
        images_per_epoch: int,
        seed: int = 0,
        shuffle_buffer: int = 1000,
    ) -> None:
        self.stream, self.change, self.seed = stream, change, seed
        self.num_images, self.shuffle_buffer = images_per_epoch, shuffle_buffer
        self.epoch = 0
        self._share = (0, 1)
        self._batches = (images_per_epoch, 1)

    def for_training(self, rank: int, num_nodes: int, batch_size: int) -> "TrainingPictureStream":
        """Take the part of one of several processes, with as many batches as the others have."""
        self._share = (rank, num_nodes)
        self._batches = (self.num_images // (num_nodes * batch_size), batch_size)
        return self

    def __len__(self) -> int:
        num_batches, batch_size = self._batches
        return num_batches * batch_size

    def num_useful_workers(self, num_workers: int) -> int:
        """Return how many of so many workers would have a shard of their own."""
        return min(num_workers, max(self.stream.rows.num_shards // self._share[1], 1))

    def __iter__(self) -> Iterator[ChangedPicture]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        pictures = itertools.islice(self._endless(), images_of_this_worker(*self._batches))
        for place, picture in enumerate(pictures):
            seed = (self.seed, self.epoch, self._share[0], number, place)
            yield _change(picture, self.change, seed)

    def _endless(self) -> Iterator[Picture]:
        original = self.stream.rows
        rows = original.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        rows = split_dataset_by_node(rows, rank=self._share[0], world_size=self._share[1])
        for start in itertools.count():
            # Another order each time, and other than in the next epoch.
            rows.set_epoch(self.epoch + start * _EPOCHS_AT_MOST)
            num_read = 0
            for picture in self.stream.read(rows):
                yield picture
                num_read += 1
            if not num_read:
                raise ValueError(
                    "A worker has no picture to read; use fewer workers, or more shards."
                )


def _change(picture: Picture, change: Change, seed: Sequence[int]) -> ChangedPicture:
    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    # The model draws from the same generator in this process, and must not notice. Not by
    # `torch.manual_seed`, which seeds all devices too, and that takes longer than a change.
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(state)
    try:
        pixels = change(picture.image)
    finally:
        generator.set_state(before)
    return ChangedPicture(pixels, picture.label, picture.name)


def _reserve(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    size = int(np.prod(shape, dtype=np.int64))
    if size > _CACHE_LIMIT:
        raise ValueError(
            f"`data.cache_images` would need {size / 2**30:.0f} GB of memory, at most "
            f"{_CACHE_LIMIT // 2**30} are allowed; set it to false."
        )
    return np.empty(shape, dtype=np.uint8)
