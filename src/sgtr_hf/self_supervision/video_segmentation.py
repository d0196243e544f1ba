"""Video object segmentation by label propagation: the labels of patches follow similar features.

h x w patches, D features, C labels (0 is background), S frames of the memory.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..modeling.modeling_dino_vit import DinoVitModel
from .image_preparation import Normalization


# DINO's evaluation divides red by .228, not by .229 as everything else; its figures are of that.
REFERENCE_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))
# The longer side is cut to a multiple of this.
_SIDE_STEP = 64
# Similarities that are held at once.
_BLOCK_ENTRIES = 2**24


class PropagationSettings(NamedTuple):
    """How labels follow features; the defaults are DINO's."""

    short_side: int = 480
    """Of the frames that the model sees, in pixels."""
    num_frames: int = 7
    """Last frames of the memory, beside the first."""
    radius: int = 12
    """Patches that something moves at most, along each axis; 0 for any number."""
    num_neighbours: int = 5
    """Patches of the memory that a patch takes its label from."""
    temperature: float = 0.1
    """A neighbour counts exp(similarity / temperature)."""


class _MemoryFrame(NamedTuple):
    features: Tensor
    """(h, w, D) of length 1."""
    labels: Tensor
    """(h, w, C)."""


def segment_video(
    model: DinoVitModel,
    frames: Iterable[Image.Image],
    first_mask: NDArray[np.integer],
    normalization: Normalization = REFERENCE_NORMALIZATION,
    settings: PropagationSettings | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Follow the objects of the first frame through a video.

    Args:
        model: In evaluation mode.
        frames: RGB pictures of one size; they are read one at a time.
        first_mask: (H, W) number of the object of each pixel of the first frame, 0 for none.
        normalization: Of the channels.
        settings: DINO's if None.

    Yields:
        The numbers (H, W) of each frame, beginning with the given ones.

    Raises:
        ValueError: If the mask has another size than the frames, or names an object above 255.

    Source:
        Jabri et al. 2020, section 4, and DINO's `eval_video_segmentation.py`.
    """
    settings = settings or PropagationSettings()
    numbers = np.unique(np.append(first_mask, 0))
    if numbers.max() > np.iinfo(np.uint8).max or numbers.min() < 0:
        raise ValueError("`first_mask` must number objects from 1 to 255, 0 for none.")
    memory: deque[_MemoryFrame] = deque(maxlen=settings.num_frames)
    first: _MemoryFrame | None = None
    for frame in frames:
        if first_mask.shape != (frame.height, frame.width):
            raise ValueError(
                f"`first_mask` must have the size of each frame, {frame.height} x {frame.width}, "
                f"got {first_mask.shape}."
            )
        features = _frame_features(model, frame, normalization, settings.short_side)
        if first is None:
            first = _MemoryFrame(features, _patch_labels(first_mask, numbers, features))
            yield first_mask.astype(np.uint8)
            continue
        labels = propagate(features, [first, *memory], settings)
        memory.append(_MemoryFrame(features, labels))
        scale = model.config.patch_size
        yield numbers[_enlarge_labels(labels, scale, first_mask.shape)].astype(np.uint8)


def video_normalization(image_processor: BaseImageProcessor) -> Normalization:
    """The model's own; that of DINO's evaluation for models that want ImageNet's."""
    own = Normalization.of(image_processor)
    imagenet = Normalization(tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD))
    return REFERENCE_NORMALIZATION if own == imagenet else own


@torch.inference_mode()
def propagate(
    features: Tensor, memory: list[_MemoryFrame], settings: PropagationSettings
) -> Tensor:
    """Give the patches (h, w, D) of a frame the labels (h, w, C) of similar patches.

    Rows are done a few at a time, and only with the rows they can have come from.
    """
    height, width, _ = features.shape
    radius = settings.radius or max(height, width)
    bank = torch.stack([frame.features for frame in memory])
    labels = torch.stack([frame.labels for frame in memory])
    columns = torch.arange(width, device=features.device)
    near_columns = (columns[:, None] - columns).abs() <= radius
    entries_of_row = len(memory) * width**2 * min(2 * radius + 1, height)
    rows_at_once = max(_BLOCK_ENTRIES // entries_of_row, 1)
    parts = []
    for first in range(0, height, rows_at_once):
        last = min(first + rows_at_once, height)
        top, bottom = max(first - radius, 0), min(last + radius, height)
        rows = torch.arange(first, last, device=features.device)
        sources = torch.arange(top, bottom, device=features.device)
        near_rows = (rows[:, None] - sources).abs() <= radius
        # (rows, w, source rows, source columns)
        is_near = near_rows[:, None, :, None] & near_columns[None, :, None, :]
        parts.append(
            _weigh(
                features[first:last].flatten(0, 1),
                bank[:, top:bottom].flatten(1, 2),
                labels[:, top:bottom].flatten(0, 2),
                is_near.flatten(2).flatten(0, 1),
                settings,
            )
        )
    return torch.cat(parts).unflatten(0, (height, width))


def _weigh(
    queries: Tensor, bank: Tensor, labels: Tensor, is_near: Tensor, settings: PropagationSettings
) -> Tensor:
    """Average labels over the most similar patches.

    Args:
        queries: (n, D).
        bank: (S, m, D).
        labels: (S * m, C).
        is_near: (n, m) boolean.
        settings: Number of neighbours and temperature.
    """
    # (S, n, m) -> (n, S * m)
    scores = (queries @ bank.transpose(1, 2) / settings.temperature).masked_fill(
        ~is_near, -torch.inf
    )
    scores = scores.transpose(0, 1).flatten(1)
    best, sources = scores.topk(min(settings.num_neighbours, scores.shape[1]), dim=1)
    # A patch is always near itself, so one score is finite.
    return (best.softmax(1)[..., None] * labels[sources]).sum(1)


@torch.inference_mode()
def _frame_features(
    model: DinoVitModel, frame: Image.Image, normalization: Normalization, short_side: int
) -> Tensor:
    """Patch tokens (h, w, D) of length 1."""
    width, height = _seen_size(frame, short_side)
    pixels = normalization.apply(frame)[None].to(model.device)
    pixels = functional.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)
    tokens = model(pixels).last_hidden_state[0, 1 + model.config.num_registers :]
    grid = (height // model.config.patch_size, width // model.config.patch_size)
    return functional.normalize(tokens, dim=-1).unflatten(0, grid)


def _seen_size(frame: Image.Image, short_side: int) -> tuple[int, int]:
    """Width and height that the model sees."""
    longer = max(frame.size) * short_side // min(frame.size)
    longer = max(longer // _SIDE_STEP * _SIDE_STEP, min(short_side, longer))
    return (short_side, longer) if frame.height > frame.width else (longer, short_side)


def _patch_labels(
    mask: NDArray[np.integer], numbers: NDArray[np.integer], features: Tensor
) -> Tensor:
    """One label (h, w, C) a patch, of the pixel in its middle."""
    height, width, _ = features.shape
    labels = np.searchsorted(numbers, mask).astype(np.uint8)
    small = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    indices = torch.from_numpy(np.array(small)).long().to(features.device)
    return functional.one_hot(indices, len(numbers)).to(features.dtype)


def _enlarge_labels(
    labels: Tensor, patch_size: int, size: tuple[int, ...]
) -> NDArray[np.unsignedinteger]:
    """Decide the label (H, W) of each pixel from those (h, w, C) of the patches."""
    maps = functional.interpolate(
        labels.permute(2, 0, 1)[None], scale_factor=patch_size, mode="bilinear", align_corners=False
    )[0]
    # Each label's map is stretched to [0, 1], or a fading object would be lost to the background.
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stretched = (maps - lowest) / (highest - lowest)
    maps = torch.where(highest > lowest, stretched, (maps > 0).to(maps.dtype))
    decided = Image.fromarray(maps.argmax(0).to(torch.uint8).cpu().numpy())
    return np.array(decided.resize((size[1], size[0]), Image.Resampling.NEAREST))
