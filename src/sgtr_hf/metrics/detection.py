"""Average precision of detections by the COCO rules, counted by faster-coco-eval.

I images, E detections and T annotated entities of an image, C entity classes.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..scene_graph import SceneGraph


logger = logging.getLogger(__name__)

# What post-processing returns: "boxes" (E, 4) xyxy, "labels" (E,), "scores" (E,).
Detections: TypeAlias = SceneGraph | Mapping[str, Tensor]
AnyArray: TypeAlias = NDArray[Any]

MAX_DETECTIONS = (1, 10, 100)
AREAS = ("all", "small", "medium", "large")


class DetectionAccuracy:
    """Average precision and recall of detections over overlaps of 0.5 to 0.95.

    Args:
        id2label: Names for the report, where a class without name is its number.
    """

    def __init__(self, id2label: Mapping[int, str] | None = None) -> None:
        self.id2label = dict(id2label or {})
        self._num_images = 0
        self._detections: list[AnyArray] = []
        self._references: list[AnyArray] = []

    def update(self, predictions: Sequence[Detections], references: Sequence[Detections]) -> None:
        """Add images.

        Args:
            predictions: For each image a graph, or a dict of "boxes" (E, 4) as x1, y1, x2, y2 in
                pixels, "labels" (E,) from 0 and "scores" (E,), as the post-processing returns it.
                At most the best 100 of a class count.
            references: The annotated entities of the same images in the same pixels; "scores" are
                not needed.

        Raises:
            ValueError: If the lengths differ.
        """
        if len(predictions) != len(references):
            raise ValueError(
                "`predictions` and `references` must have one entry for each image, got "
                f"{len(predictions)} and {len(references)}."
            )
        for predicted, annotated in zip(predictions, references, strict=True):
            self._detections.append(_table(predicted, self._num_images, with_scores=True))
            self._references.append(_table(annotated, self._num_images, with_scores=False))
            self._num_images += 1

    def state_dict(self) -> dict[str, AnyArray]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        return {
            "num_images": np.array(self._num_images),
            "detections": np.concatenate([np.zeros((0, NUM_COLUMNS)), *self._detections]),
            "references": np.concatenate([np.zeros((0, NUM_COLUMNS)), *self._references]),
        }

    def merge_state(self, state: Mapping[str, AnyArray]) -> None:
        """Add what the `state_dict` of another process has gathered.

        An image that two processes have seen counts twice: do not pad the last batch.
        """
        shift = np.zeros(NUM_COLUMNS)
        shift[IMAGE] = self._num_images
        self._detections.append(state["detections"] + shift)
        self._references.append(state["references"] + shift)
        self._num_images += int(state["num_images"])

    def merge(self, other: "DetectionAccuracy") -> None:
        """Add what another metric has gathered."""
        self.merge_state(other.state_dict())

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all images so far.

        Returns:
            "AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100",
            "AR_small", "AR_medium", "AR_large": means over classes, 0 to 1; "per_class": {class:
            AP} of the annotated classes; and the counts "num_images", "num_annotated",
            "num_detected". A metric without any annotated entity (of that size) is NaN.

        Raises:
            ImportError: If faster-coco-eval is not installed.
        """
        state = self.state_dict()
        classes = np.unique(state["references"][:, LABEL]).astype(np.int64)
        precision, recall = _evaluate(state, classes)
        return {
            **_summary(precision, recall),
            "per_class": {
                self.id2label.get(label, str(label)): _mean_of_valid(
                    precision[:, :, number, AREAS.index("all"), -1]
                )
                for number, label in enumerate(classes.tolist())
            },
            "num_images": self._num_images,
            "num_annotated": len(state["references"]),
            "num_detected": len(state["detections"]),
        }


# Columns of the tables: image number, label, score, x1, y1, x2, y2.
NUM_COLUMNS = 7
IMAGE, LABEL, SCORE = 0, 1, 2
FIRST_COORDINATE = 3


def _table(entities: Detections, image: int, *, with_scores: bool) -> AnyArray:
    """Write the entities of one image as rows of seven numbers."""
    boxes: AnyArray
    scores: AnyArray
    if isinstance(entities, SceneGraph):
        boxes, labels, scores = entities.boxes_xyxy, entities.labels, entities.scores
    else:
        boxes, labels = _to_numpy(entities["boxes"]), _to_numpy(entities["labels"])
        scores = np.ones(len(labels))
        if with_scores:
            scores = _to_numpy(entities["scores"])
    table = np.empty((len(labels), NUM_COLUMNS))
    table[:, IMAGE] = image
    table[:, LABEL] = labels
    table[:, SCORE] = scores
    table[:, FIRST_COORDINATE:] = boxes.reshape(-1, 4)
    return table


def _to_numpy(values: Tensor) -> AnyArray:
    return values.detach().cpu().double().numpy()


def _evaluate(
    state: Mapping[str, AnyArray], classes: NDArray[np.int64]
) -> tuple[AnyArray, AnyArray]:
    """Return precision (overlaps, recalls, C, areas, limits) and recall without the second axis.

    Entries without annotated entities are -1.
    """
    # First of all, so that a missing package is found whatever the data.
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError(
            "Detection accuracy needs faster-coco-eval; install it by "
            '`pip install "sgtr-hf[metrics]"`.'
        ) from error
    if not len(classes):
        num_areas, num_limits = len(AREAS), len(MAX_DETECTIONS)
        return -np.ones((10, 101, 0, num_areas, num_limits)), -np.ones(
            (10, 0, num_areas, num_limits)
        )
    # Detections of classes without annotation do not enter any mean.
    is_counted = np.isin(state["detections"][:, LABEL], classes)
    images = [{"id": number} for number in range(int(state["num_images"]))]
    categories = [{"id": label + 1, "name": str(label)} for label in classes.tolist()]
    datasets = [
        COCO(
            {"images": images, "categories": categories, "annotations": _annotations(table)},
            print_function=logger.debug,
        )
        for table in (state["references"], state["detections"][is_counted])
    ]
    evaluation = COCOeval_faster(*datasets, iouType="bbox", print_function=logger.debug)
    evaluation.params.maxDets = list(MAX_DETECTIONS)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _annotations(table: AnyArray) -> list[dict[str, Any]]:
    """Write rows as COCO annotations; ids and categories count from 1 there."""
    sizes = table[:, FIRST_COORDINATE + 2 :] - table[:, FIRST_COORDINATE : FIRST_COORDINATE + 2]
    boxes_xywh = np.concatenate((table[:, FIRST_COORDINATE : FIRST_COORDINATE + 2], sizes), axis=1)
    return [
        {
            "id": number + 1,
            "image_id": int(row[IMAGE]),
            "category_id": int(row[LABEL]) + 1,
            "score": float(row[SCORE]),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, (row, box) in enumerate(zip(table, boxes_xywh.tolist(), strict=True))
    ]


def _summary(precision: AnyArray, recall: AnyArray) -> dict[str, float]:
    every = AREAS.index("all")
    summary = {
        "AP": _mean_of_valid(precision[..., every, -1]),
        # Overlaps go from 0.5 to 0.95 in steps of 0.05.
        "AP50": _mean_of_valid(precision[0, ..., every, -1]),
        "AP75": _mean_of_valid(precision[5, ..., every, -1]),
    }
    for number, limit in enumerate(MAX_DETECTIONS):
        summary[f"AR_{limit}"] = _mean_of_valid(recall[..., every, number])
    for number, area in enumerate(AREAS):
        if number != every:
            summary[f"AP_{area}"] = _mean_of_valid(precision[..., number, -1])
            summary[f"AR_{area}"] = _mean_of_valid(recall[..., number, -1])
    return summary


def _mean_of_valid(values: AnyArray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else float("nan")
