import builtins
import json
import math
import pickle

import numpy as np
import pytest
import torch

from sgtr_hf.metrics.detection import DetectionAccuracy
from sgtr_hf.scene_graph import SceneGraph


NUMBERS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR_1", "AR_10", "AR_100", "AR_small", "AR_medium", "AR_large"),
)


def entities(boxes, labels, scores=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "scores": torch.ones(len(labels)) if scores is None else torch.tensor(scores),
    }


def graph_of(detections):
    return SceneGraph(
        boxes_xyxy=detections["boxes"].numpy(),
        labels=detections["labels"].numpy(),
        scores=detections["scores"].numpy(),
        relations=[],
        relation_scores=[],
        image_size=(200, 200),
    )


def compute(predictions, references, **arguments):
    metric = DetectionAccuracy(**arguments)
    metric.update(predictions, references)
    return metric.compute()


NOTHING = entities([], [])
SMALL, LARGE = [10, 10, 30, 30], [0, 0, 100, 100]


def random_images(num_images=12):
    generator = torch.Generator().manual_seed(2)
    predictions, references = [], []
    for image in range(num_images):
        count = image % 4
        corners = torch.rand(count, 2, generator=generator) * 100
        # Of all three sizes, so that no metric is NaN.
        sizes = torch.rand(count, 1, generator=generator).square() * 200 + 10
        boxes = torch.cat((corners, corners + sizes.expand(count, 2)), dim=1)
        labels = torch.randint(0, 3, (count,), generator=generator)
        moved = boxes + torch.randn(count, 4, generator=generator)
        scores = torch.rand(count, generator=generator)
        references.append({"boxes": boxes, "labels": labels})
        predictions.append({"boxes": moved, "labels": labels, "scores": scores})
    return predictions, references


def test_accuracy_of_perfect_detections_is_one():
    reference = entities([SMALL, LARGE], [0, 2])
    report = compute([reference, NOTHING], [reference, NOTHING], id2label={0: "cup"})
    assert {name: report[name] for name in NUMBERS if name != "AP_medium"} == pytest.approx(
        dict.fromkeys((name for name in NUMBERS if name not in ("AP_medium", "AR_medium")), 1.0)
        | {"AR_medium": math.nan},
        nan_ok=True,
    )
    assert math.isnan(report["AP_medium"])
    assert report["per_class"] == {"cup": 1.0, "2": 1.0}
    assert (report["num_images"], report["num_annotated"], report["num_detected"]) == (2, 2, 2)


def test_accuracy_of_hand_made_case():
    """Class 0: overlap 0.8 below a wrong detection. Class 1: one of two found, class 2 not."""
    references = [
        entities([LARGE], [0]),
        entities([LARGE, [100, 100, 200, 200]], [1, 1]),
        entities([LARGE], [2]),
    ]
    predictions = [
        entities([[0, 0, 100, 80]], [0], [0.6]),
        entities([LARGE, LARGE], [1, 0], [0.3, 0.9]),
        NOTHING,
    ]
    report = compute(predictions, references)
    # Precision 1/2 at every recall for the 7 overlaps 0.5 to 0.8 of 10, the others 0.
    first = 0.5 * 7 / 10
    # Precision 1 at the recalls 0, 0.01 to 0.5 of 101.
    second = 51 / 101
    assert report["per_class"] == pytest.approx({"0": first, "1": second, "2": 0.0})
    assert report["AP"] == pytest.approx((first + second) / 3)
    assert report["AP50"] == pytest.approx((0.5 + second) / 3)
    assert report["AP75"] == pytest.approx((0.5 + second) / 3)
    assert report["AR_100"] == pytest.approx((0.7 + 0.5) / 3)
    json.dumps(report)


def test_graphs_and_tensors_give_the_same():
    predictions, references = random_images()
    references = [reference | {"scores": NOTHING["scores"]} for reference in references]
    graphs = [graph_of(detections) for detections in predictions]
    annotated = [
        graph_of(reference | {"scores": torch.ones(len(reference["labels"]))})
        for reference in references
    ]
    report = compute(predictions, references)
    assert 0.2 < report["AP"] < 1
    assert compute(graphs, annotated) == report


def test_accuracy_in_parts_equals_accuracy_at_once():
    predictions, references = random_images()
    whole = compute(predictions, references)
    parts = [DetectionAccuracy() for _ in range(3)]
    for part, images in zip(parts, (slice(5), slice(5, 7), slice(7, None)), strict=True):
        part.update(predictions[images], references[images])
    parts[0].merge(parts[1])
    parts[0].merge_state(pickle.loads(pickle.dumps(parts[2].state_dict())))
    merged = parts[0].compute()
    assert merged == whole
    assert parts[0].compute() == whole


def test_detections_of_classes_without_annotation_do_not_count():
    reference = entities([LARGE], [0])
    prediction = entities([LARGE, SMALL], [0, 5], [0.5, 0.9])
    assert compute([prediction], [reference])["AP"] == pytest.approx(1.0)


def test_detection_on_empty_image_costs_precision():
    reference = entities([LARGE], [0])
    wrong = entities([LARGE], [0], [0.9])
    right = entities([LARGE], [0], [0.5])
    assert compute([right, wrong], [reference, NOTHING])["AP"] == pytest.approx(0.5)


def test_accuracy_without_detections_is_zero():
    report = compute([NOTHING], [entities([LARGE], [0])])
    assert [report[name] for name in ("AP", "AP50", "AR_100", "AP_large")] == [0.0] * 4
    assert report["per_class"] == {"0": 0.0}


@pytest.mark.parametrize("predictions", [[], [NOTHING], [entities([LARGE], [0])]])
def test_accuracy_without_annotation_is_nan(predictions):
    report = compute(predictions, [NOTHING] * len(predictions))
    assert all(math.isnan(report[name]) for name in NUMBERS)
    assert report["per_class"] == {}


def test_compute_prints_nothing(capfd):
    compute(*random_images())
    assert capfd.readouterr() == ("", "")


def test_missing_package_is_named(monkeypatch):
    original = builtins.__import__

    def import_without_coco(name, *arguments, **keywords):
        if name.startswith("faster_coco_eval"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", import_without_coco)
    metric = DetectionAccuracy()
    metric.update([NOTHING], [NOTHING])
    with pytest.raises(ImportError, match=r"pip install \"sgtr-hf\[metrics\]\""):
        metric.compute()


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one entry for each image"):
        DetectionAccuracy().update([NOTHING], [])


def test_state_holds_plain_arrays():
    metric = DetectionAccuracy()
    metric.update([entities([LARGE], [3], [0.25])], [NOTHING])
    state = metric.state_dict()
    assert np.array_equal(state["detections"], [[0, 3, 0.25, *LARGE, 0]])
    assert state["references"].shape == (0, 8)


def test_detections_in_a_crowd_are_neither_right_nor_wrong():
    crowd = entities([LARGE, [110, 110, 150, 150]], [0, 0]) | {"iscrowd": torch.tensor([1, 0])}
    prediction = entities([SMALL, [110, 110, 150, 150]], [0, 0], [0.9, 0.5])
    assert compute([prediction], [crowd])["AP"] == pytest.approx(1)
    assert compute([prediction], [crowd | {"iscrowd": torch.tensor([0, 0])}])["AP"] < 0.5


def test_scores_that_are_not_numbers_are_an_error():
    with pytest.raises(ValueError, match=r"Image 1.*finite"):
        DetectionAccuracy().update(
            [NOTHING, entities([LARGE], [0], [float("nan")])], [NOTHING, NOTHING]
        )


def test_which_process_saw_which_image_does_not_matter():
    predictions, references = random_images()
    # Ties over images: their order would count.
    predictions = [one | {"scores": torch.full_like(one["scores"], 0.5)} for one in predictions]
    whole = compute(predictions, references)
    odd, even = DetectionAccuracy(), DetectionAccuracy()
    odd.update(predictions[1::2], references[1::2])
    even.update(predictions[::2], references[::2])
    odd.merge(even)
    assert odd.compute() == whole
    odd.reset()
    odd.update(predictions, references)
    assert odd.compute() == whole


def test_accuracy_equals_the_librarys_own_tool():
    faster_coco_eval = pytest.importorskip("faster_coco_eval")
    predictions, references = random_images(20)
    images = [{"id": number} for number in range(20)]
    categories = [{"id": number, "name": str(number)} for number in range(1, 4)]
    annotations, results = [], []
    for image, (predicted, annotated) in enumerate(zip(predictions, references, strict=True)):
        for entries, rows in ((predicted, results), (annotated, annotations)):
            for row, (box, label) in enumerate(
                zip(entries["boxes"], entries["labels"], strict=True)
            ):
                x1, y1, x2, y2 = box.double().tolist()
                width, height = x2 - x1, y2 - y1
                rows.append(
                    {
                        "image_id": image, "category_id": int(label) + 1,
                        "bbox": [x1, y1, width, height], "area": width * height, "iscrowd": 0,
                        "id": len(rows) + 1,
                        **({"score": float(entries["scores"][row])} if rows is results else {}),
                    }
                )  # fmt: skip
    truth = faster_coco_eval.COCO(
        {"images": images, "categories": categories, "annotations": annotations}
    )
    tool = faster_coco_eval.COCOeval_faster(truth, truth.loadRes(results), iouType="bbox")
    tool.evaluate()
    tool.accumulate()
    tool.summarize()
    report = compute(predictions, references)
    assert [report[name] for name in NUMBERS] == pytest.approx(list(tool.stats[:12]), abs=1e-9)
