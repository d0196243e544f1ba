"""Features of pictures: which tokens they are made of, and how they are computed in batches.

N pictures, D features, B pictures of a batch.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ..data.picture_source import Picture, PictureSource
from ..data.reading_processes import prepare_worker
from ..modeling.modeling_dino_vit import DinoVitModel
from .image_preparation import Preparation, scaled


# Below this, a clamped patch feature has no logarithm worth the name.
_LEAST_ACTIVATION = 1e-6
# Scales of the multi-scale features of retrieval on Paris.
RETRIEVAL_SCALES = (1.0, 2**-0.5, 0.5)

FeatureFunction = Callable[[Tensor], Tensor]


class FeatureBatch(NamedTuple):
    """Features of a few pictures."""

    vectors: Tensor
    """(B, D) float32 on the CPU."""
    labels: Tensor
    """(B,) int64 classes, -1 for none."""
    names: list[str]


class Features(NamedTuple):
    """Features of a whole set."""

    vectors: Tensor
    """(N, D) float32 on the CPU."""
    labels: Tensor
    """(N,) int64 classes, -1 for none."""
    names: list[str]
    """Of the pictures."""
    label_names: list[str] | None = None
    """Of the classes, where they are known."""


def class_token(model: DinoVitModel, pixel_values: Tensor) -> Tensor:
    """The normalised class token (B, d_model), which neighbours and retrieval compare."""
    return model(pixel_values).pooler_output


def copy_descriptor(model: DinoVitModel, pixel_values: Tensor, power: float = 4.0) -> Tensor:
    """Class token and generalised mean of the patch tokens, (B, 2 * d_model).

    Args:
        model: In evaluation mode.
        pixel_values: (B, 3, H, W).
        power: 1 is the mean; the larger, the nearer to each feature's maximum over the patches.

    Source:
        GeM pooling (Radenovic et al. 2018) with the power 4 of DINO's copy detection.
    """
    tokens = model(pixel_values).last_hidden_state
    patches = tokens[:, 1 + model.config.num_registers :]
    patches = patches.clamp(min=_LEAST_ACTIVATION)
    # Of shares of the maximum, which no power makes too large for float32.
    most = patches.amax(1)
    pooled = most * (patches / most[:, None]).pow(power).mean(1).pow(1 / power)
    return torch.cat((tokens[:, 0], pooled), dim=1)


def multi_scale(
    compute: FeatureFunction, pixel_values: Tensor, scales: Sequence[float] = RETRIEVAL_SCALES
) -> Tensor:
    """Average features over sizes of the picture, and bring the average to length 1."""
    mean = torch.stack([compute(scaled(pixel_values, scale)) for scale in scales]).mean(0)
    return torch.nn.functional.normalize(mean, dim=1)


def raw_pixels(pixel_values: Tensor) -> Tensor:
    """The prepared pixels themselves (B, 3 * H * W): a baseline without any model."""
    return pixel_values.flatten(1)


def extract_features(
    pictures: PictureSource | Dataset[Picture],
    prepare: Preparation,
    compute: FeatureFunction,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[FeatureBatch]:
    """Compute features batch by batch, in the order of the pictures.

    Workers that read a stream take turns, each with its own shards.

    Args:
        pictures: At hand or streamed.
        prepare: Makes tensors of them; pictures of one size are computed together.
        compute: Of pixel values (B, 3, H, W); `functools.partial(class_token, model)`.
        batch_size: Pictures at a time.
        num_workers: Processes that read and prepare pictures; 0 reads in this one.
        device: Of the model.
    """
    # A stream with fewer shards than workers would warn of each worker without work.
    shards = getattr(getattr(pictures, "rows", None), "num_shards", num_workers)
    workers = min(num_workers, shards) if isinstance(pictures, IterableDataset) else num_workers
    loader: DataLoader[Any] = DataLoader(
        pictures,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=partial(_collate, prepare),
        worker_init_fn=prepare_worker,
    )
    for tensors, labels, names in loader:
        yield FeatureBatch(_compute_by_size(tensors, compute, device), labels, names)


def collect_features(
    batches: Iterator[FeatureBatch], label_names: list[str] | None = None, total: int | None = None
) -> Features:
    """Put batches together, under a progress bar.

    Args:
        batches: Of `extract_features`.
        label_names: Of the classes.
        total: Pictures, where it is known.

    Raises:
        ValueError: If there is no picture.
    """
    vectors, labels, names = [], [], []
    with tqdm(total=total, unit="image", desc="features") as bar:
        for batch in batches:
            vectors.append(batch.vectors)
            labels.append(batch.labels)
            names += batch.names
            bar.update(len(batch.names))
    if not names:
        raise ValueError("There is no picture to compute features of.")
    return Features(torch.cat(vectors), torch.cat(labels), names, label_names)


def save_features(features: Features, path: str | Path) -> None:
    """Write features as safetensors, names included."""
    text = torch.frombuffer(bytearray("\n".join(features.names).encode()), dtype=torch.uint8)
    save_file(
        {"vectors": features.vectors.contiguous(), "labels": features.labels, "names": text},
        path,
        metadata={"label_names": json.dumps(features.label_names)},
    )


def load_features(path: str | Path) -> Features:
    """Read what `save_features` wrote.

    Raises:
        ValueError: If the file holds no such features.
    """
    try:
        with safe_open(path, "pt") as file:
            missing = {"vectors", "labels", "names"} - set(file.keys())
            if missing:
                raise ValueError(
                    f"{path} holds no features (no {', '.join(sorted(missing))}); "
                    "`sgtr-hf dino features` writes such files."
                )
            names = bytes(file.get_tensor("names").tolist()).decode().split("\n")
            label_names = json.loads((file.metadata() or {}).get("label_names", "null"))
            vectors, labels = file.get_tensor("vectors"), file.get_tensor("labels")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of features: {error}") from error
    return Features(vectors, labels, names, label_names)


def _collate(
    prepare: Preparation, pictures: list[Picture]
) -> tuple[list[Tensor], Tensor, list[str]]:
    images: list[Image.Image] = [picture.image for picture in pictures]
    labels = torch.tensor([picture.label for picture in pictures])
    return prepare(images), labels, [picture.name for picture in pictures]


@torch.inference_mode()
def _compute_by_size(
    tensors: list[Tensor], compute: FeatureFunction, device: torch.device | str
) -> Tensor:
    """Compute pictures of the same size together, and bring the results back into order."""
    places: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.shape, []).append(place)
    parts, order = [], []
    for same in places.values():
        batch = torch.stack([tensors[place] for place in same]).to(device)
        parts.append(compute(batch).float().cpu())
        order += same
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy_(0, torch.tensor(order), joined)
