"""The one matching of triplets from which every scene graph metric follows.

E predicted entities, T annotated entities, K predicted triplets, R annotated triplets.
"""

from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..boxes import box_iou
from ..scene_graph import SceneGraph


IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]

MISSED = -1


def rank_of_first_hit(
    prediction: SceneGraph,
    reference: SceneGraph,
    iou_threshold: float = 0.5,
    *,
    add_one_pixel: bool = False,
    any_predicate: bool = False,
) -> IntArray:
    """Find how far down the predictions each annotated triplet is first found.

    A predicted triplet hits an annotated one if subject label, predicate and object label agree and
    both boxes overlap enough. One prediction may hit several annotated triplets and the other way
    round. The annotated triplet is found among the first k predictions if its rank is in [0, k).

    Args:
        prediction: E entities and K triplets, best first.
        reference: T entities and R triplets of the same image, boxes in the same pixels.
        iou_threshold: Least intersection over union of subjects and of objects, inclusive, (0, 1].
        add_one_pixel: Take boxes as ranges of whole pixels that include the last one, as the
            published evaluators do.
        any_predicate: Let a prediction of the right pair hit, whatever it says of it.

    Returns:
        (R,) int64 ranks from 0; -1 where no prediction hits.

    Raises:
        ValueError: If `iou_threshold` is not in (0, 1] or the graphs are of images of other sizes.

    Source:
        Recall of Lu et al. (ECCV 2016) in the form of the SGTR repository,
        `vg_sgg_eval_tools.py:926`, which has `add_one_pixel`.
    """
    alike = entity_agreement(prediction, reference, iou_threshold, add_one_pixel=add_one_pixel)
    ranks = np.full(len(reference.relations), MISSED, dtype=np.int64)
    if not len(prediction.relations) or not len(reference.relations):
        return ranks
    predicted, annotated = prediction.relations, reference.relations
    # One row for each predicted triplet, one column for each annotated one.
    hits = (predicted[:, None, 2] == annotated[None, :, 2]) | any_predicate
    hits &= alike[np.ix_(predicted[:, 0], annotated[:, 0])]
    hits &= alike[np.ix_(predicted[:, 1], annotated[:, 1])]
    return np.where(hits.any(axis=0), hits.argmax(axis=0), ranks)


def entity_agreement(
    prediction: SceneGraph,
    reference: SceneGraph,
    iou_threshold: float = 0.5,
    *,
    add_one_pixel: bool = False,
) -> BoolArray:
    """Tell which predicted entity has the label and the place of which annotated one.

    Args:
        prediction: E entities.
        reference: T entities.
        iou_threshold: Least intersection over union, inclusive, (0, 1].
        add_one_pixel: See `rank_of_first_hit`.

    Returns:
        (E, T) bool.

    Raises:
        ValueError: If `iou_threshold` is not in (0, 1] or the graphs are of images of other sizes.
    """
    check_iou_threshold(iou_threshold)
    if prediction.image_size != reference.image_size:
        raise ValueError(
            f"`prediction.image_size` is {prediction.image_size} but `reference.image_size` is "
            f"{reference.image_size}; pass the original sizes as `target_sizes` to post-processing."
        )
    # Double precision, so that an overlap of exactly the threshold counts.
    predicted = torch.from_numpy(prediction.boxes_xyxy.astype(np.float64)).reshape(-1, 1, 4)
    annotated = torch.from_numpy(reference.boxes_xyxy.astype(np.float64)).reshape(1, -1, 4)
    if add_one_pixel:
        # Same as one more pixel in every width and height, of boxes and of intersections.
        last_pixel = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
        predicted, annotated = predicted + last_pixel, annotated + last_pixel
    overlaps: BoolArray = (box_iou(predicted, annotated) >= iou_threshold).numpy()
    same_label: BoolArray = prediction.labels[:, None] == reference.labels[None, :]
    return overlaps & same_label


def reachable_triplets(
    entities: SceneGraph,
    reference: SceneGraph,
    iou_threshold: float = 0.5,
    *,
    add_one_pixel: bool = False,
) -> BoolArray:
    """Tell which annotated triplets have both entities among the detections.

    No relation head on top of these detections can find any other triplet.

    Args:
        entities: E detections; their triplets are not looked at.
        reference: T entities and R triplets of the same image.
        iou_threshold: Least intersection over union, inclusive, (0, 1].
        add_one_pixel: See `rank_of_first_hit`.

    Returns:
        (R,) bool.

    Raises:
        ValueError: If `iou_threshold` is not in (0, 1] or the graphs are of images of other sizes.
    """
    alike = entity_agreement(entities, reference, iou_threshold, add_one_pixel=add_one_pixel)
    is_detected = np.asarray(alike.any(axis=0))
    return is_detected[reference.relations[:, 0]] & is_detected[reference.relations[:, 1]]


def check_iou_threshold(iou_threshold: float) -> None:
    """Raise ValueError unless the threshold is in (0, 1]; at 0 boxes far apart would agree."""
    if not 0.0 < iou_threshold <= 1.0:
        raise ValueError(f"`iou_threshold` must be in (0, 1], got {iou_threshold}.")
