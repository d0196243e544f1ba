"""Loaders of batches that resume exactly."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.reading_processes import prepare_worker
from .recipe import TrainingSettings


def make_loader(
    dataset: Any,
    settings: TrainingSettings,
    collate: Callable[[Any], dict[str, Any]],
    *,
    num_workers: int,
    shuffle: bool,
) -> DataLoader[Any]:
    """Load a data set that has every image at hand.

    Args:
        dataset: A map-style data set.
        settings: Name batch size and seed.
        collate: Makes a batch.
        num_workers: Processes that read.
        shuffle: For training: in a random order, without an incomplete last batch.
    """
    return DataLoader(
        dataset,
        batch_size=settings.batch_size,
        shuffle=shuffle,
        drop_last=shuffle,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        # Its own, or each start of a loader would draw from the generator of the noise, and
        # a resumed run, which starts one more, would go on with other noise.
        generator=torch.Generator().manual_seed(settings.seed),
    )


def make_stream_loader(
    stream: Any,
    settings: TrainingSettings,
    collate: Callable[[Any], dict[str, Any]],
    *,
    num_workers: int,
    accelerator: Accelerator,
) -> Any:
    """Load this process's part of a stream; accelerate, which would split it again, moves it only.

    Args:
        stream: What `for_training` returned.
        settings: Name batch size and seed.
        collate: Makes a batch.
        num_workers: Processes that read.
        accelerator: Knows the device.
    """
    loader: DataLoader[Any] = DataLoader(
        stream,
        batch_size=settings.batch_size,
        drop_last=True,
        num_workers=stream.num_useful_workers(num_workers),
        collate_fn=collate,
        worker_init_fn=prepare_worker,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )
