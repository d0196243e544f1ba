"""Where the queries of a model look, as overlays on the picture."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BaseImageProcessor, PreTrainedModel

from ..boxes import box_cxcywh_to_xyxy
from ..modeling.attention_recording import record_attention
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection, entity_probabilities
from ..modeling.prediction_heads import predicate_probabilities
from .panel_grid import make_panels, render


_INCHES = 3.2
# Of the boxes that subject and object queries look at most, on the panel of their predicate.
_ROLE_COLORS = ("deepskyblue", "orange")


class AttentionPanel(NamedTuple):
    """One overlay."""

    title: str
    heat: NDArray[np.float32] | None = None
    """(rows, columns) attention on the image, adding up to 1."""
    boxes: NDArray[np.float32] | None = None
    """(E, 4) x1, y1, x2, y2 relative to the image."""
    weights: NDArray[np.float32] | None = None
    """(E,) attention on the boxes; None draws all alike."""
    colors: tuple[str, ...] | None = None
    """Of each box; None colours them by their weights."""
    point: tuple[float, float] | None = None
    """x and y relative to the image."""


@torch.inference_mode()
def detector_attention(
    model: SgtrDetrForObjectDetection | SgtrForSceneGraphGeneration,
    image_processor: BaseImageProcessor,
    image: Image.Image,
    queries: Sequence[int] | None = None,
    points: Sequence[tuple[float, float]] = (),
) -> list[AttentionPanel]:
    """Show the cross-attention of entity queries, and the self-attention of the encoder at points.

    Args:
        model: With eager attention.
        image_processor: That goes with it.
        image: The picture.
        queries: Entity queries; the four likeliest if None.
        points: x and y relative to the image, in [0, 1].

    Returns:
        A panel a query and one a point, of the last layer, heads averaged.

    Raises:
        ValueError: If a query or point does not exist, or the attention is not eager.
    """
    detector = model.model.detector if isinstance(model, SgtrForSceneGraphGeneration) else model
    inputs = image_processor(images=image, return_tensors="pt").to(model.device)
    with record_attention(detector.model) as recorded:
        nodes = detector.model(inputs["pixel_values"], inputs["pixel_mask"])
    logits = detector.read_levels(nodes).logits[-1, 0]
    scores, labels = entity_probabilities(logits, detector.config.classification).max(-1)
    chosen = _chosen(queries, scores)
    cross = _last(recorded, r"decoder\.layers\.")
    panels = []
    for query in chosen:
        name = _class_name(model, labels[query])
        panels.append(
            AttentionPanel(
                f"query {query}: {name} {scores[query]:.2f}",
                heat=_heat(cross[query], nodes.memory.grids),
                boxes=box_cxcywh_to_xyxy(nodes.pred_boxes[0, query : query + 1]).cpu().numpy(),
            )
        )
    if points:
        encoder = _last(recorded, r"encoder_layers\.", "self_attention")
        panels += [_point_panel(encoder, nodes.memory, point) for point in points]
    return panels


@torch.inference_mode()
def triplet_attention(
    model: SgtrForSceneGraphGeneration,
    image_processor: BaseImageProcessor,
    image: Image.Image,
    queries: Sequence[int] | None = None,
) -> list[AttentionPanel]:
    """Show what the three queries of a triplet look at, three panels a triplet.

    Subject and object queries look at entity nodes, which are drawn as boxes; the predicate query
    looks at the image, on which the entity that each of them looks at most is shown: the subject's
    in blue, the object's in orange.

    Args:
        model: With eager attention.
        image_processor: That goes with it.
        image: The picture.
        queries: Predicate queries; the two likeliest if None.

    Raises:
        ValueError: If a query does not exist, or the attention is not eager.
    """
    inputs = image_processor(images=image, return_tensors="pt").to(model.device)
    with record_attention(model) as recorded:
        nodes = model.model(inputs["pixel_values"], inputs["pixel_mask"])
    sizes = inputs["pixel_mask"].new_tensor([inputs["pixel_mask"].shape[-2:]])
    triplets = model.read_levels(nodes, nodes.triplets, sizes, all_levels=False)
    probabilities = predicate_probabilities(model.config, triplets.predicate_logits[-1, 0])
    scores, predicates = probabilities.max(-1)
    boxes = box_cxcywh_to_xyxy(nodes.entity_boxes[0]).cpu().numpy()
    # One stack of layers a role, or a layer of each role in each level.
    maps = {
        role: _last(recorded, rf"\.{role}_layers?\.").cpu()
        for role in ("subject", "predicate", "object")
    }
    predicate_names = {index: name for name, index in model.config.predicate2id.items()}
    panels = []
    for query in _chosen(queries, scores, default=2):
        predicate = predicate_names[int(predicates[query])]
        names = {
            role: _class_name(model, logits[-1, 0, query, : model.config.num_labels].argmax())
            for role, logits in (
                ("subject", triplets.subject_logits),
                ("object", triplets.object_logits),
            )
        }
        subject, object_ = (
            AttentionPanel(
                f"{role} of query {query}: {names[role]}",
                boxes=boxes,
                weights=maps[role][query].float().numpy(),
            )
            for role in ("subject", "object")
        )
        linked = [int(maps[role][query].argmax()) for role in ("subject", "object")]
        image_panel = AttentionPanel(
            f"predicate of query {query}: {predicate} {scores[query]:.2f}",
            heat=_heat(maps["predicate"][query], nodes.detector.memory.grids),
            boxes=boxes[linked],
            colors=_ROLE_COLORS,
        )
        panels += [subject, image_panel, object_]
    return panels


def draw_attention(
    image: Image.Image, panels: Sequence[AttentionPanel], columns: int = 3
) -> Image.Image:
    """Draw panels over the picture, `columns` in a row.

    Raises:
        ValueError: If there is no panel.
    """
    if not panels:
        raise ValueError("There is no attention to draw: no query and no point was chosen.")
    ratio = image.height / image.width
    figure, all_axes = make_panels(ratio, len(panels), columns, _INCHES, title_inches=0.3)
    for axes, panel in zip(all_axes, panels, strict=False):
        axes.imshow(image, extent=(0, 1, 1, 0), aspect=ratio)
        axes.set_title(panel.title, fontsize=8)
        _draw_panel(axes, panel, ratio)
    return render(figure)


def _draw_panel(axes: Any, panel: AttentionPanel, ratio: float) -> None:
    if panel.heat is not None:
        heat = panel.heat / panel.heat.max()
        axes.imshow(
            heat,
            extent=(0, 1, 1, 0),
            aspect=ratio,
            cmap="inferno",
            alpha=0.2 + 0.55 * heat,
            interpolation="nearest",
        )
    if panel.boxes is not None:
        strengths = np.ones(len(panel.boxes))
        if panel.weights is not None:
            strengths = panel.weights / panel.weights.max()
        colors = panel.colors or [colormaps["inferno"](0.3 + 0.6 * part) for part in strengths]
        widths = 0.5 + 2 * strengths
        if panel.colors is not None:
            # The first stays visible under the second if both are one box.
            widths[0] *= 2
        for (left, top, right, bottom), strength, color, width in zip(
            panel.boxes, strengths, colors, widths, strict=True
        ):
            axes.add_patch(
                Rectangle(
                    (left, top), right - left, bottom - top, fill=False, color=color,
                    alpha=float(strength), linewidth=width,
                )
            )  # fmt: skip
    if panel.point is not None:
        axes.plot(*panel.point, "o", color="cyan", markersize=5)


def _point_panel(attention: Tensor, memory: Any, point: tuple[float, float]) -> AttentionPanel:
    """Attention of the cell of the finest level that holds a point."""
    if not all(0 <= value <= 1 for value in point):
        raise ValueError(f"A point must be x and y in [0, 1], got {point}.")
    rows, columns = memory.grids[0]
    column = min(int(point[0] * columns), columns - 1)
    row = min(int(point[1] * rows), rows - 1)
    heat = _heat(attention[row * columns + column], memory.grids)
    return AttentionPanel(f"encoder at ({point[0]:.2f}, {point[1]:.2f})", heat=heat, point=point)


def _class_name(model: PreTrainedModel, label: Tensor) -> str:
    names: dict[int, str] = model.config.id2label
    return names[int(label)]


def _last(recorded: dict[str, Tensor], layers: str, attention: str = "cross_attention") -> Tensor:
    """Weights (queries, keys) of the last layer, heads averaged, of the first image."""
    names = [name for name in recorded if re.search(layers, name) and name.endswith(attention)]
    return recorded[max(names, key=_layer_number)][0].mean(0)


def _layer_number(name: str) -> int:
    return max(int(part) for part in name.split(".") if part.isdigit())


def _chosen(queries: Sequence[int] | None, scores: Tensor, default: int = 4) -> list[int]:
    if queries is None:
        return scores.topk(min(default, len(scores))).indices.tolist()
    for query in queries:
        if not 0 <= query < len(scores):
            raise ValueError(f"`queries` must be below {len(scores)}, got {query}.")
    return list(queries)


def _heat(weights: Tensor, grids: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
    """Add the attention on all feature levels up on the grid of the finest."""
    heat = torch.zeros(grids[0], device=weights.device)
    parts = weights.float().split([rows * columns for rows, columns in grids])
    for part, (rows, columns) in zip(parts, grids, strict=True):
        resized = torch.nn.functional.interpolate(part.view(1, 1, rows, columns), size=grids[0])
        # A coarse cell's attention is dealt out to the fine cells that it covers.
        heat += resized[0, 0] * part.sum() / resized.sum().clamp(min=1e-12)
    return heat.cpu().numpy()
