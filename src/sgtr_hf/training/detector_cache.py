"""Outputs of a frozen detector, computed once and read again at every epoch.

Only the relation part is then run in training, which is several times faster.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..data.reading_processes import prepare_worker
from ..data.training_dataset import (
    Collator,
    SceneGraphDataset,
    seed_of_noise,
)
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration


CachedImage = dict[str, Any]
# The same for all images of one size, hence stored once.
_SHARED = ("memory_position", "memory_cells", "image_sizes")
# Coordinates need more than the eleven bits of a half-precision number.
_PRECISE = ("entity_boxes",)
_BATCH_SIZE = 16


class CachedDetectorDataset(Dataset[CachedImage]):
    """Images as the detector sees them, with their labels.

    The first epochs are stored, with their augmentation; later epochs see them again.

    Args:
        folder: Where the cache is, or will be.
        dataset: The images; their augmentation depends on seed, epoch and index alone.
        num_epochs: Epochs to store.
    """

    def __init__(self, folder: Path, dataset: SceneGraphDataset, num_epochs: int) -> None:
        self.folder, self.dataset, self.num_epochs = folder, dataset, num_epochs
        self.epoch = 0
        self._shares: list[dict[str, np.ndarray]] = []
        self._labels: list[list[dict[str, Tensor]]] = []
        self._shared: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> CachedImage:
        rank, position = index % len(self._shares), index // len(self._shares)
        labels = self._labels[rank]
        row = (self.epoch % self.num_epochs) * (len(labels) // self.num_epochs) + position
        features = {
            name: torch.from_numpy(array[row].astype(np.float32))
            for name, array in self._shares[rank].items()
        }
        # The noise of an image is another one in each epoch, though its features are not.
        seed = torch.tensor(seed_of_noise((self.dataset.seed, self.epoch, index)))
        return {
            "features": features | self._shared,
            "labels": labels[row] | {"noise_seed": seed},
        }

    def prepare(
        self,
        model: SgtrForSceneGraphGeneration,
        collator: Collator,
        accelerator: Accelerator,
        num_workers: int,
    ) -> None:
        """Open the cache, or make it first, each process its share.

        Args:
            model: Whose detector is run, on the device of the accelerator.
            collator: Makes batches of the data set.
            accelerator: Knows the other processes.
            num_workers: Processes that read images.

        Raises:
            ValueError: If the images have different sizes.
        """
        fingerprint = self._fingerprint(model, collator)
        marker = self.folder / "cache.json"
        found = json.loads(marker.read_text()) if marker.is_file() else {}
        accelerator.wait_for_everyone()
        if found.get("fingerprint") != fingerprint:
            self.folder.mkdir(parents=True, exist_ok=True)
            marker.unlink(missing_ok=True)
            self._compute(model, collator, accelerator, num_workers)
            accelerator.wait_for_everyone()
            found = {"fingerprint": fingerprint, "shares": accelerator.num_processes}
            if accelerator.is_main_process:
                marker.write_text(json.dumps(found))
        self._open(found["shares"])

    @torch.no_grad()
    def _compute(
        self,
        model: SgtrForSceneGraphGeneration,
        collator: Collator,
        accelerator: Accelerator,
        num_workers: int,
    ) -> None:
        """Run the detector over this process's share of the images, once an epoch."""
        model.eval()
        rank = accelerator.process_index
        share = Subset(self.dataset, range(rank, len(self), accelerator.num_processes))
        arrays: dict[str, np.ndarray] = {}
        labels: list[dict[str, Tensor]] = []
        for epoch in range(self.num_epochs):
            self.dataset.epoch = epoch
            loader: DataLoader[Any] = DataLoader(
                share,
                batch_size=_BATCH_SIZE,
                num_workers=num_workers,
                collate_fn=collator,
                worker_init_fn=prepare_worker,
                generator=torch.Generator().manual_seed(0),
            )
            for batch in tqdm(
                loader, desc="detector", disable=not accelerator.is_local_main_process
            ):
                if "pixel_mask" in batch:
                    raise ValueError(
                        "`training.cached_epochs` needs images of one size; give "
                        "`image_processor.size` a height and a width."
                    )
                features = model.detector_features(batch["pixel_values"].to(accelerator.device))
                if not arrays:
                    arrays = self._create(features, len(share), rank)
                end = len(labels) + len(batch["labels"])
                for name, array in arrays.items():
                    array[len(labels) : end] = features[name].cpu().numpy()
                # Copies: tensors of a loader's worker hold a file descriptor each.
                labels += [
                    {
                        name: value.clone() if isinstance(value, Tensor) else value
                        for name, value in label.items()
                    }
                    for label in batch["labels"]
                ]
        torch.save(labels, self.folder / f"labels-{rank}.pt")

    def _create(self, features: dict[str, Tensor], share: int, rank: int) -> dict[str, np.ndarray]:
        """Make the files of a share."""
        if rank == 0:
            shared = {name: features[name][0].cpu() for name in _SHARED}
            torch.save(shared, self.folder / "shared.pt")
        return {
            name: open_memmap(
                self.folder / f"{name}-{rank}.npy",
                mode="w+",
                dtype=np.float32 if name in _PRECISE else np.float16,
                shape=(self.num_epochs * share, *tensor.shape[1:]),
            )
            for name, tensor in features.items()
            if name not in _SHARED
        }

    def _open(self, num_shares: int) -> None:
        self._shared = torch.load(self.folder / "shared.pt", weights_only=True)
        for rank in range(num_shares):
            self._labels.append(torch.load(self.folder / f"labels-{rank}.pt", weights_only=True))
            files = sorted(self.folder.glob(f"*-{rank}.npy"))
            self._shares.append(
                {file.name.rpartition("-")[0]: np.load(file, mmap_mode="r") for file in files}
            )

    def _fingerprint(self, model: SgtrForSceneGraphGeneration, collator: Collator) -> str:
        """Change with anything that the features depend on."""
        digest = hashlib.sha256()
        for name, tensor in model.model.detector.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        dataset = self.dataset
        settings = (
            self.num_epochs,
            dataset.seed,
            dataset.augmentation,
            None if dataset.resampling is None else dataset.resampling.settings,
            dataset.split._fingerprint,
            collator.image_processor.to_dict(),
        )
        digest.update(repr(settings).encode())
        return digest.hexdigest()


def collate_cached(items: Sequence[CachedImage]) -> dict[str, Any]:
    """Make a batch: `detector_features` of `SgtrForSceneGraphGeneration`, and labels."""
    names = items[0]["features"]
    return {
        "detector_features": {
            name: torch.stack([item["features"][name] for item in items]) for name in names
        },
        "labels": [item["labels"] for item in items],
    }
