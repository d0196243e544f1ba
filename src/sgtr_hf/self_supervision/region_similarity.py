"""J and F, the figures of video object segmentation: overlap of regions, and fit of boundaries.

Source:
    Perazzi et al. 2016, "A Benchmark Dataset and Evaluation Methodology for Video Object
    Segmentation", with the conventions of the DAVIS 2017 evaluation for empty masks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from .annotated_videos import VOID


Mask = NDArray[np.bool_]

# Of the image's diagonal: how far a boundary may be off.
BOUNDARY_TOLERANCE = 0.008


class SegmentationAccuracy(NamedTuple):
    """Means over the objects of all videos, each of which is a mean over its frames."""

    region_similarity: float
    """J."""
    boundary_accuracy: float
    """F."""
    num_objects: int

    @property
    def mean(self) -> float:
        """J and F in one number."""
        return (self.region_similarity + self.boundary_accuracy) / 2


def region_similarity(predicted: Mask, annotated: Mask) -> float:
    """J: intersection over union of two masks (H, W); 1 if both are empty."""
    union = np.count_nonzero(predicted | annotated)
    return 1.0 if union == 0 else np.count_nonzero(predicted & annotated) / union


def boundary_accuracy(
    predicted: Mask, annotated: Mask, tolerance: float = BOUNDARY_TOLERANCE
) -> float:
    """F: harmonic mean of precision and recall of the boundaries of two masks (H, W).

    Args:
        predicted: What was found.
        annotated: What is there.
        tolerance: Distance at which boundary pixels still meet, as a share of the diagonal,
            rounded up to pixels; one from 1 on is in pixels.

    Returns:
        1 if neither has a boundary, 0 if one alone has.
    """
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*predicted.shape))
    found, wanted = boundary(predicted), boundary(annotated)
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = _share_near(found, wanted, radius)
    recall = _share_near(wanted, found, radius)
    both = precision + recall
    return 0.0 if both == 0 else 2 * precision * recall / both


def boundary(mask: Mask) -> Mask:
    """Mark the pixels that differ from the right, the lower or the lower right neighbour.

    The boundary is one pixel wide. At the lower and right border only the neighbour along the
    border counts; a mask does not end where the image does.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    inner = padded[:-1, :-1]
    differs = (inner != padded[:-1, 1:]) | (inner != padded[1:, :-1]) | (inner != padded[1:, 1:])
    return np.asarray(differs)


def video_accuracy(
    predicted: NDArray[np.integer], annotated: NDArray[np.integer], objects: Sequence[int]
) -> NDArray[np.float64]:
    """Compute J and F of each object of a video.

    Args:
        predicted: (frames, H, W) number of the object of each pixel, 0 for none.
        annotated: Likewise; pixels of the number 255 are unknown and left out.
        objects: Their numbers.

    Returns:
        (objects, 2) means over the frames but the first, which is given, and the last, as DAVIS
        does; the last counts where it is the only other one.

    Raises:
        ValueError: If shapes differ, or there is nothing but the given frame.
    """
    if predicted.shape != annotated.shape:
        raise ValueError(
            f"Predicted and annotated frames must have one shape, got {predicted.shape} and "
            f"{annotated.shape}."
        )
    num_frames = len(predicted)
    if num_frames < 2:  # noqa: PLR2004 - the given one, and one to find
        raise ValueError(f"A video needs at least 2 annotated frames, got {num_frames}.")
    last = max(num_frames - 1, 2)
    figures = np.zeros((len(objects), last - 1, 2))
    for row, number in enumerate(objects):
        for frame in range(1, last):
            is_known = annotated[frame] != VOID
            masks = (is_known & (predicted[frame] == number), annotated[frame] == number)
            figures[row, frame - 1] = region_similarity(*masks), boundary_accuracy(*masks)
    return np.asarray(figures.mean(1))


def summarize_videos(figures: Sequence[NDArray[np.float64]]) -> SegmentationAccuracy:
    """Average over the objects of all videos.

    Args:
        figures: (objects, 2) of each video, as of `video_accuracy`.

    Raises:
        ValueError: If there is no object.
    """
    joined = np.concatenate([*figures, np.zeros((0, 2))])
    if not len(joined):
        raise ValueError("No video has an object in its first frame.")
    region, edge = joined.mean(0)
    return SegmentationAccuracy(float(region), float(edge), len(joined))


def _share_near(pixels: Mask, others: Mask, radius: float) -> float:
    """Share of the pixels with one of the others within a radius."""
    distances = distance_transform_edt(~others)
    return float(np.mean(distances[pixels] <= radius))
