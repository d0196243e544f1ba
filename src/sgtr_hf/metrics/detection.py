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

    Keeps a row of eight numbers for each detection and each annotated entity; counting takes the
    library's memory, which grows with images times classes.

    Args:
        id2label: Names for the report, where a class without name is its number.
    """

    def __init__(self, id2label: Mapping[int, str] | None = None) -> None:
        self.id2label = dict(id2label or {})
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
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
                not needed. Where "iscrowd" (T,) says 1, detections inside are neither right nor
                wrong.

        Raises:
            ValueError: If the lengths differ, or a number is not finite.
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
        state = _in_order_of_content(self.state_dict())
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


# Columns of the tables: image number, label, score, x1, y1, x2, y2, whether it is a crowd.
NUM_COLUMNS = 8
IMAGE, LABEL, SCORE, CROWD = 0, 1, 2, 7
CORNERS = slice(3, 7)


def _table(entities: Detections, image: int, *, with_scores: bool) -> AnyArray:
    """Write the entities of one image as rows of seven numbers."""
    if isinstance(entities, SceneGraph):
        table = np.zeros((entities.num_entities, NUM_COLUMNS))
        table[:, CORNERS], table[:, LABEL] = entities.boxes_xyxy, entities.labels
        table[:, SCORE] = entities.scores
    else:
        table = np.zeros((len(entities["labels"]), NUM_COLUMNS))
        table[:, CORNERS] = _to_numpy(entities["boxes"]).reshape(-1, 4)
        table[:, LABEL] = _to_numpy(entities["labels"])
        table[:, SCORE] = _to_numpy(entities["scores"]) if with_scores else 1
        if "iscrowd" in entities and not with_scores:
            table[:, CROWD] = _to_numpy(entities["iscrowd"])
    if not np.isfinite(table).all():
        raise ValueError(
            f"Image {image}: boxes, labels and scores must be finite, got NaN or infinity."
        )
    table[:, IMAGE] = image
    return table


def _in_order_of_content(state: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
    """Number the images anew, so that it does not matter which process saw which.

    Of detections of equal scores, those of the first image count first.
    """
    tables = [state["detections"], state["references"]]
    numbers = np.arange(int(state["num_images"]))
    ends = [np.searchsorted(table[:, IMAGE], numbers, "right") for table in tables]
    parts = [
        np.split(table[:, IMAGE + 1 :], end[:-1]) for table, end in zip(tables, ends, strict=True)
    ]
    contents = [b"|".join(part.tobytes() for part in image) for image in zip(*parts, strict=True)]
    new_number = np.zeros(len(numbers), dtype=np.int64)
    new_number[sorted(numbers, key=lambda number: contents[number])] = numbers
    ordered = {"num_images": state["num_images"]}
    for name, table in zip(("detections", "references"), tables, strict=True):
        table = table.copy()
        table[:, IMAGE] = new_number[table[:, IMAGE].astype(np.int64)] if len(table) else 0
        ordered[name] = table[np.argsort(table[:, IMAGE], kind="stable")]
    return ordered


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
    corners = table[:, CORNERS]
    boxes_xywh = np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1)
    return [
        {
            "id": number + 1,
            "image_id": int(row[IMAGE]),
            "category_id": int(row[LABEL]) + 1,
            "score": float(row[SCORE]),
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(row[CROWD]),
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
