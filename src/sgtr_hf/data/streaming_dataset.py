"""Annotated images that are read shard by shard, each process and each worker its own."""

import itertools
import logging
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from ..scene_graph import SceneGraph
from .schema import vocabularies
from .training_augmentation import Augmentation
from .training_dataset import (
    ANNOTATION_COLUMNS,
    TrainingImage,
    UnreadablePictureError,
    annotation_of,
    check_annotations,
    make_training_image,
    reference_graph,
)
from .worker_shares import images_of_this_worker


logger = logging.getLogger(__name__)


class SceneGraphStream(IterableDataset[TrainingImage]):
    """A split of annotated images, read from its beginning to its end.

    The augmentation of an image depends on seed, epoch and the image's id alone, whoever reads it.

    Args:
        stream: Rows of `scene_graph_features`.
        augmentation: None for evaluation.
        seed: Of augmentation and order.
        shuffle_buffer: Images among which the next one is chosen at random, beside a random order
            of shards; 0 keeps the order.
        annotations: The same rows without the pictures, if that is quicker to read.

    Attributes:
        epoch: Decides augmentation and order; set it before each pass.
        on_error: "drop" passes an image over whose picture cannot be read, and says so in the log;
            "raise" stops.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle_buffer: int = 0,
        annotations: datasets.IterableDataset | None = None,
    ) -> None:
        self.id2label, self.id2predicate = vocabularies(stream.features)
        self.augmentation = augmentation and augmentation.for_predicates(self.id2predicate)
        self.seed = seed
        self.epoch = 0
        self.on_error: Literal["raise", "drop"] = "raise"
        self._annotations = stream if annotations is None else annotations
        self._shuffle_buffer = shuffle_buffer
        self._stream = stream.decode(False)
        self._num_images: int | None = None
        # Batches of this process in an epoch and images of each; every image once if None.
        self._batches: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[TrainingImage]:
        if self._batches is None:
            return self._pass()
        return self._endless(images_of_this_worker(*self._batches))

    def __len__(self) -> int:
        """The images of this process in an epoch.

        Raises:
            TypeError: Before `for_training`; a stream has no length of its own.
        """
        if self._batches is None:
            raise TypeError("A stream of images has no length before `for_training`.")
        num_batches, batch_size = self._batches
        return num_batches * batch_size

    @property
    def num_images(self) -> int:
        """Images of all processes, for which the annotations are read unless they were."""
        if self._num_images is None:
            self.check()
        return self._num_images or 0

    def check(self) -> None:
        """Read all annotations, count them, and reject what cannot be meant.

        Errors are those of `SceneGraphDataset.check`.
        """
        sizes = (len(self.id2label), len(self.id2predicate))
        self._num_images = check_annotations(self._annotation_rows(), *sizes)

    def references(self) -> Iterator[SceneGraph]:
        """Yield all annotations as graphs, without opening an image."""
        names = (self.id2label, self.id2predicate)
        for record in self._annotation_rows():
            size = (record["height"], record["width"])
            yield reference_graph(annotation_of(record), size, names)

    def of_node(self, rank: int, num_nodes: int) -> "SceneGraphStream":
        """Return the part of one of several processes: whole shards where they divide evenly."""
        return self._with_stream(
            split_dataset_by_node(self._stream, rank=rank, world_size=num_nodes)
        )

    def for_training(self, rank: int, num_nodes: int, batch_size: int) -> "SceneGraphStream":
        """Return the part of one of several processes, with as many batches as the others have.

        Each worker yields whole batches, the same number or one more than the last. Where shards
        are of unequal length, a worker begins again to fill its last batches, or ends before its
        last images; the order of the next epoch is another one.

        Args:
            rank: Number of this process.
            num_nodes: Number of processes.
            batch_size: Images of a batch in each process.
        """
        part = self.of_node(rank, num_nodes)
        part._batches = (self.num_images // (num_nodes * batch_size), batch_size)
        return part

    def num_useful_workers(self, num_workers: int) -> int:
        """Return how many of so many workers would have a shard of their own."""
        useful = min(num_workers, self._stream.num_shards)
        if useful < num_workers:
            logger.warning(
                "Of %d workers, %d would have nothing to read: a process has %d shards.",
                num_workers,
                num_workers - useful,
                self._stream.num_shards,
            )
        return useful

    def _with_stream(self, stream: datasets.IterableDataset) -> "SceneGraphStream":
        part = SceneGraphStream.__new__(SceneGraphStream)
        part.__dict__.update(self.__dict__)
        part._stream = stream
        return part

    def _annotation_rows(self) -> Iterator[dict[str, Any]]:
        yield from self._annotations.select_columns(list(ANNOTATION_COLUMNS)).decode(False)

    def _pass(self) -> Iterator[TrainingImage]:
        """Yield this worker's images once; `datasets` gives each worker its shards."""
        stream = self._stream
        if self._shuffle_buffer:
            # Here in the worker: a stream made before shares its epoch with all workers, and their
            # `set_epoch` adds to what is there, twice where two of them do it at the same time.
            stream = stream.shuffle(seed=self.seed, buffer_size=self._shuffle_buffer)
            stream.set_epoch(self.epoch)
        names = (self.id2label, self.id2predicate)
        for record in stream:
            # Python's own hash of a text differs between processes.
            seed = (self.seed, self.epoch, zlib.crc32(record["image_id"].encode()))
            annotation = annotation_of(record)
            try:
                image = make_training_image(record, annotation, names, self.augmentation, seed)
            except UnreadablePictureError as error:
                if self.on_error == "raise":
                    raise
                logger.warning("%s It is passed over.", error)
                continue
            yield image

    def _endless(self, count: int) -> Iterator[TrainingImage]:
        """Yield so many images, from the beginning again where there are too few."""
        while count > 0:
            num_read = 0
            for image in itertools.islice(self._pass(), count):
                yield image
                num_read += 1
            count -= num_read
            if num_read == 0:
                raise ValueError(
                    "A worker has no shard to read; use fewer workers, or more shards."
                )
