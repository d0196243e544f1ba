"""Evaluation of a model on annotated images, streamed batch by batch."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..data.training_dataset import SceneGraphDataset
from ..metrics.detection import DetectionAccuracy
from ..metrics.detector_ceiling import DetectorCeiling
from ..metrics.evaluation_protocols import STRICT
from ..metrics.frequency_baseline import FrequencyBaseline
from ..metrics.recall import Measured, SceneGraphRecall
from ..scene_graph import SceneGraph


# The tasks of the field: what of the entities the model must find itself.
Mode = Literal["sgdet", "sgcls", "predcls"]
# Strict in everything but the graph constraint: pairs may say several predicates.
UNCONSTRAINED = replace(STRICT, name="unconstrained", graph_constraint="none")
# What is measured, and how a table names it.
RECALLS = {
    "model": "model",
    "model_constrained": "model, one predicate a pair",
    "baseline": "frequency baseline, one predicate a pair",
    "baseline_unconstrained": "frequency baseline",
    "baseline_true_entities": "frequency baseline, true entities",
}
# Of an image, as COCO counts them.
NUM_DETECTIONS = 100
_UNCONSTRAINED_RECALLS = ("model", "baseline_unconstrained")


class _Metric(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def merge_state(self, state: Any) -> None: ...

    def compute(self) -> dict[str, Any]: ...


class Evaluator:
    """Detection accuracy and, for a scene graph model, recalls beside baseline and ceiling.

    Args:
        image_processor: A `SgtrImageProcessor`; its post-processing makes the results.
        id2label: Names of classes.
        id2predicate: Names of predicates.
        baseline: Fitted on training annotations; None for a detector.
        top_k: Relations a picture that count.
        labels_per_entity: Of the graphs that the model makes. Baseline and ceiling take the best
            class of an entity alone.
    """

    def __init__(
        self,
        image_processor: Any,
        id2label: dict[int, str],
        id2predicate: dict[int, str],
        baseline: FrequencyBaseline | None = None,
        top_k: int = 100,
        labels_per_entity: int = 1,
    ) -> None:
        self.image_processor = image_processor
        self.labels_per_entity = labels_per_entity
        self.names = {"id2label": id2label, "id2predicate": id2predicate}
        self.baseline = baseline
        self.top_k = top_k
        self.detection = DetectionAccuracy(id2label)
        self.recalls = {
            name: SceneGraphRecall(
                protocol=UNCONSTRAINED if name in _UNCONSTRAINED_RECALLS else STRICT,
                id2predicate=id2predicate,
                measured=Measured(no_constraint=False),
            )
            for name in RECALLS
        }
        self.ceiling = DetectorCeiling(id2predicate=id2predicate)

    def update(self, outputs: Any, references: list[SceneGraph]) -> None:
        """Add a batch: the model's outputs and the annotated graphs, in the same order."""
        sizes = torch.tensor([reference.image_size for reference in references])
        detect = self.image_processor.post_process_object_detection
        # Classes of a sigmoid head, which has no column for no-object, do not exclude each other.
        is_sigmoid = outputs["logits"].shape[-1] == len(self.names["id2label"])
        top_k = NUM_DETECTIONS if is_sigmoid else None
        self.detection.update(
            detect(outputs, threshold=0.0, target_sizes=sizes, top_k=top_k), references
        )
        if self.baseline is None:
            return
        detections = detect(outputs, threshold=0.0, target_sizes=sizes)
        arguments = {
            "top_k": self.top_k,
            "target_sizes": sizes,
            "labels_per_entity": self.labels_per_entity,
            **self.names,
        }
        process = self.image_processor.post_process_scene_graph
        graphs = process(outputs, **arguments)
        constrained = process(outputs, graph_constraint=True, **arguments)
        entities = [
            _entities(detection, reference)
            for detection, reference in zip(detections, references, strict=True)
        ]
        self.recalls["model"].update(graphs, references)
        self.recalls["model_constrained"].update(constrained, references)
        self.ceiling.update(entities, references)
        for name, sources, constraint in (
            ("baseline", entities, True),
            ("baseline_unconstrained", entities, False),
            ("baseline_true_entities", references, True),
        ):
            guesses = [
                self.baseline.predict(source, self.top_k, graph_constraint=constraint)
                for source in sources
            ]
            self.recalls[name].update(guesses, references)

    def gather(self) -> None:
        """Add what the other processes have seen; a no-op with one process."""
        for metric in self._metrics().values():
            states = gather_object([metric.state_dict()])
            own = PartialState().process_index
            for state in (*states[:own], *states[own + 1 :]):
                metric.merge_state(state)

    def compute(self) -> dict[str, Any]:
        """Return the figures by name: flat numbers, and `details` by class and predicate."""
        detection = self.detection.compute()
        figures: dict[str, Any] = {name: detection[name] for name in ("AP", "AP50", "AP75")}
        details: dict[str, Any] = {"detection": detection}
        if self.baseline is not None:
            for name, recall in self.recalls.items():
                details[name] = recall.compute()
                figures |= {
                    f"{_prefix(name)}{key}": value
                    for key, value in details[name].items()
                    if key.startswith(("R@", "mR@", "F@"))
                }
            details["ceiling"] = self.ceiling.compute()
            figures |= {f"ceiling_{key}": details["ceiling"][key] for key in ("R", "mR")}
        figures = {name: _plain(value) for name, value in figures.items()}
        return figures | {"details": details}

    def _metrics(self) -> dict[str, _Metric]:
        metrics: dict[str, _Metric] = {"detection": self.detection}
        if self.baseline is not None:
            metrics |= {**self.recalls, "ceiling": self.ceiling}
        return metrics


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Any]],
    evaluator: Evaluator,
    mode: Mode = "sgdet",
) -> None:
    """Run a model over batches of the collator and feed the evaluator.

    Args:
        model: A detector or a scene graph model.
        batches: Of the collator.
        evaluator: Takes the outputs.
        mode: "sgdet" detects entities; "sgcls" gives the model the annotated boxes, "predcls" also
            their classes, both to a scene graph model with anchor queries alone.
    """
    model.eval()
    device = next(model.parameters()).device
    for batch in batches:
        mask = batch.get("pixel_mask")
        given: dict[str, list[torch.Tensor]] = {}
        if mode != "sgdet":
            given["entity_boxes"] = [label["boxes"] for label in batch["labels"]]
        if mode == "predcls":
            given["entity_labels"] = [label["class_labels"] for label in batch["labels"]]
        outputs = model(
            batch["pixel_values"].to(device), None if mask is None else mask.to(device), **given
        )
        evaluator.update(outputs, batch["references"])


def format_figures(figures: Mapping[str, Any]) -> str:
    """Lay the figures of `Evaluator.compute` out as a table of text."""
    lines = [
        "detection  " + "  ".join(f"{key} {_text(figures[key])}" for key in ("AP", "AP50", "AP75"))
    ]
    columns = [name for name in figures if name.startswith(("R@", "mR@"))]
    if not columns:
        return lines[0]
    width = max(map(len, RECALLS.values()))
    lines += ["", " " * width + "".join(f"{column:>8s}" for column in columns)]
    for name, title in RECALLS.items():
        values = [figures[f"{_prefix(name)}{column}"] for column in columns]
        lines.append(f"{title:{width}s}" + "".join(f"{_text(value):>8s}" for value in values))
    lines.append(
        f"reachable with these detections: R {_text(figures['ceiling_R'])}, "
        f"mR {_text(figures['ceiling_mR'])}"
    )
    return "\n".join(lines)


def check_vocabularies(config: Any, dataset: SceneGraphDataset) -> None:
    """Reject data whose classes or predicates are not the model's, in the same order.

    Raises:
        ValueError: If they differ.
    """
    for name in ("id2label", "id2predicate"):
        known = getattr(config, name, None)
        # A detector knows no predicates.
        if known is not None and dict(known) != getattr(dataset, name):
            raise ValueError(
                f"The model's `{name}` is {dict(known)}, the data's {getattr(dataset, name)}; "
                "evaluate on data with the model's vocabulary."
            )


def _prefix(name: str) -> str:
    return "" if name == "model" else f"{name}_"


def _entities(detection: dict[str, Any], reference: SceneGraph) -> SceneGraph:
    """Detections as a graph without relations."""
    return SceneGraph(
        boxes_xyxy=detection["boxes"].cpu().numpy(),
        labels=detection["labels"].cpu().numpy(),
        scores=detection["scores"].cpu().numpy(),
        relations=np.zeros((0, 3), dtype=np.int64),
        relation_scores=np.zeros(0, dtype=np.float32),
        image_size=reference.image_size,
    )


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plain(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else round(number, 6)
