"""Fits what makes the class probabilities in the score of a triplet mean what they say.

N entities of an image, C classes, K the likeliest of an entity, D entities of all images.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from ..boxes import box_cxcywh_to_xyxy, scale_boxes
from ..metrics.entity_overlap import box_overlap
from ..metrics.evaluation_protocols import STRICT
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..modeling.prediction_heads import SURE
from ..scene_graph import SceneGraph


FloatArray = NDArray[np.float64]
# Others are never a node of a graph, and so many that they would decide the fit.
NUM_CLASSES = 5
FIELDS = ("class_score_scale", "class_score_rivalry", "class_score_offset")


class ClassCalibration(NamedTuple):
    """What was fitted, and what it changed."""

    class_score_scale: float
    class_score_rivalry: float
    class_score_offset: float
    before: float
    """Mean negative log-likelihood of an entity's class, in nats, as it was."""
    after: float


class DetectedClasses:
    """The likeliest classes of detected entities, and whether they are right.

    A class is right where an annotated entity of it overlaps by at least one half; that several
    detections may be right about the same one is for the removal of duplicates to deal with.
    """

    def __init__(self) -> None:
        self._logits: list[FloatArray] = []
        self._sums: list[FloatArray] = []
        self._rights: list[NDArray[np.bool_]] = []

    def update(self, outputs: Any, references: list[SceneGraph]) -> None:
        """Add a batch: the outputs of a scene graph model, and the annotated graphs.

        Args:
            outputs: With `entity_probabilities` (B, N, C), not calibrated, and `pred_boxes`.
            references: B graphs.
        """
        probabilities = outputs["entity_probabilities"].double()
        sizes = torch.tensor([reference.image_size for reference in references])
        boxes = scale_boxes(box_cxcywh_to_xyxy(outputs["pred_boxes"].double()).cpu(), sizes)
        top = probabilities.topk(min(NUM_CLASSES, probabilities.shape[-1]), dim=-1)
        # Of all classes, not of the likeliest alone.
        sums = probabilities.sum(-1, keepdim=True).clamp(min=SURE).log().expand_as(top.values)
        self._logits.append(_to_rows(top.values.clamp(SURE, 1 - SURE).logit()))
        self._sums.append(_to_rows(sums))
        for labels, corners, reference in zip(
            top.indices.cpu().numpy(), boxes.numpy(), references, strict=True
        ):
            overlap = box_overlap(corners[:, None], reference.boxes_xyxy[None], "exact")
            is_there = overlap >= STRICT.iou_threshold
            is_class = labels[:, :, None] == reference.labels
            self._rights.append((is_class & is_there[:, None]).any(-1))

    def fit(self) -> ClassCalibration:
        """Fit the three settings by maximum likelihood.

        Raises:
            ValueError: If no class, or every class, is right.

        Source:
            Platt scaling of the logit, with the sum of all classes as a second variable (ours).
        """
        if not self._rights:
            raise ValueError("Calibration needs images, got none.")
        is_right = np.concatenate([rows.ravel() for rows in self._rights])
        if is_right.all() or not is_right.any():
            raise ValueError(
                f"Calibration needs right and wrong classes, got {int(is_right.sum())} right of "
                f"{len(is_right)}; use more images, or a trained model."
            )
        logits = np.concatenate([rows.ravel() for rows in self._logits])
        variables = np.stack(
            (logits, np.concatenate([rows.ravel() for rows in self._sums]), np.ones_like(logits))
        )
        start = np.array([1.0, 0.0, 0.0])
        found = minimize(
            _negative_log_likelihood, start, args=(variables, is_right), jac=True, method="BFGS"
        )
        before, _ = _negative_log_likelihood(start, variables, is_right)
        scale, rivalry, offset = (float(value) for value in found.x)
        return ClassCalibration(scale, rivalry, offset, before, float(found.fun))


@torch.inference_mode()
def fit_class_scores(
    model: SgtrForSceneGraphGeneration, loader: Iterable[Mapping[str, Any]]
) -> ClassCalibration:
    """Run a model over images, fit, and set its configuration.

    Args:
        model: In evaluation mode.
        loader: Batches of a `Collator`, with references.

    Raises:
        ValueError: If the model detects nothing, or nothing wrong.
    """
    classes = DetectedClasses()
    for batch in tqdm(loader, unit="batch"):
        outputs = model(batch["pixel_values"], batch.get("pixel_mask"))
        classes.update(outputs, batch["references"])
    fitted = classes.fit()
    for name in FIELDS:
        setattr(model.config, name, round(getattr(fitted, name), 4))
    return fitted


def _negative_log_likelihood(
    settings: FloatArray, variables: FloatArray, is_right: NDArray[np.bool_]
) -> tuple[float, FloatArray]:
    """Return the mean over entries, and its gradient by the three settings."""
    logits = settings @ variables
    mean = np.logaddexp(0, np.where(is_right, -logits, logits)).mean()
    error = 1 / (1 + np.exp(-logits)) - is_right
    return float(mean), variables @ error / len(is_right)


def _to_rows(values: Tensor) -> FloatArray:
    rows: FloatArray = values.flatten(0, 1).cpu().numpy()
    return rows
