"""What each query of a detector looks for (figure 7 of Carion et al. 2020), drawn and counted."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel


# Boxes that cover less of the image are small; the paper does not give its number.
SMALL_AREA = 0.1
COLUMNS = 5
_COLORS = {"small": "tab:green", "horizontal": "tab:red", "vertical": "tab:blue"}
_INCHES = 1.6
# Of the legend and of the titles; points of a few images are larger than those of thousands.
_FONT_SIZE, _LEGEND_INCHES = 7, 0.35
_POINT_AREA, _SMALLEST_POINT, _LARGEST_POINT = 600.0, 1.0, 14.0


class QuerySlots(NamedTuple):
    """Boxes that every query predicted, whatever their class and score."""

    boxes: NDArray[np.float32]
    """(images, N, 4) cxcywh relative to the image."""
    is_occupied: NDArray[np.bool_]
    """(images, N), True where a class is likelier than no object."""


@torch.inference_mode()
def collect_query_slots(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    images: Iterable[Any],
) -> QuerySlots:
    """Run a detection or scene graph model over images, one at a time.

    Args:
        model: Whose queries are looked at.
        image_processor: That goes with it.
        images: Anything the image processor takes.

    Raises:
        ValueError: If there is no image.
    """
    boxes, occupied = [], []
    for image in images:
        inputs = image_processor(images=image, return_tensors="pt").to(model.device)
        output = model(**inputs)
        probabilities = output.entity_probabilities[0]
        # A softmax head has one more class, no object; without it, even odds decide.
        has_no_object = output.logits.shape[-1] > probabilities.shape[-1]
        rival = 1 - probabilities.sum(-1) if has_no_object else torch.tensor(0.5)
        boxes.append(output.pred_boxes[0].float().cpu().numpy())
        occupied.append((probabilities.amax(-1) > rival).cpu().numpy())
    if not boxes:
        raise ValueError("`images` must hold at least one image, got none.")
    return QuerySlots(np.stack(boxes), np.stack(occupied))


def slot_statistics(slots: QuerySlots, small_area: float = SMALL_AREA) -> list[dict[str, Any]]:
    """Count for each query how its boxes are spread.

    Args:
        slots: Of `collect_query_slots`.
        small_area: Share of the image below which a box is small.

    Returns:
        For each query its number, the shares of small, horizontal and vertical boxes, the mean
        centre (x, y), its standard deviation, and the share of images in which it found something.
    """
    kinds = _kinds(slots, small_area)
    centres = slots.boxes[..., :2]
    return [
        {
            "query": query,
            **{kind: float(np.mean(kinds[:, query] == kind)) for kind in _COLORS},
            "mean_centre": centres[:, query].mean(0).tolist(),
            "spread": centres[:, query].std(0).tolist(),
            "occupancy": float(slots.is_occupied[:, query].mean()),
        }
        for query in range(slots.boxes.shape[1])
    ]


def draw_query_slots(
    slots: QuerySlots, num_slots: int = 20, small_area: float = SMALL_AREA
) -> Image.Image:
    """Draw the boxes of the first queries as points at their centres in the unit square.

    Green are small boxes, red large ones that lie, blue large ones that stand.

    Args:
        slots: Of `collect_query_slots`.
        num_slots: Queries to draw.
        small_area: Share of the image below which a box is small.

    Raises:
        ValueError: If `num_slots` is not positive.
    """
    if num_slots < 1:
        raise ValueError(f"`num_slots` must be at least 1, got {num_slots}.")
    num_images, num_queries, _ = slots.boxes.shape
    num_slots = min(num_slots, num_queries)
    columns = min(COLUMNS, num_slots)
    rows = -(-num_slots // columns)
    height = _INCHES * rows + _LEGEND_INCHES
    figure = Figure(figsize=(_INCHES * columns, height), dpi=120)
    canvas = FigureCanvasAgg(figure)
    bottom, top = _LEGEND_INCHES / height, 1 - 0.15 / height
    figure.subplots_adjust(0.01, bottom, 0.99, top, wspace=0.06, hspace=0.2)
    kinds = _kinds(slots, small_area)
    area = float(np.clip(_POINT_AREA / num_images, _SMALLEST_POINT, _LARGEST_POINT))
    for query, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect="equal")
        if query >= num_slots:
            axes.set_axis_off()
            continue
        axes.set_title(f"query {query}", fontsize=_FONT_SIZE, pad=2)
        for kind, color in _COLORS.items():
            shown = slots.boxes[kinds[:, query] == kind, query]
            axes.scatter(shown[:, 0], shown[:, 1], s=area, color=color, linewidths=0)
    _add_legend(figure, small_area)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def write_slot_statistics(path: Path, slots: QuerySlots, small_area: float = SMALL_AREA) -> None:
    """Write `slot_statistics` as JSON."""
    content = {
        "images": len(slots.boxes),
        "small_area": small_area,
        "queries": slot_statistics(slots, small_area),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def _add_legend(figure: Figure, small_area: float) -> None:
    meanings = (f"under {small_area:.3g} of the image", "larger, wide", "larger, high")
    points = [
        Line2D([], [], marker="o", linestyle="", color=color, markersize=4)
        for color in _COLORS.values()
    ]
    figure.legend(
        points, meanings, loc="lower center", ncols=len(points), fontsize=_FONT_SIZE,
        frameon=False, borderpad=0.2, handletextpad=0.2,
    )  # fmt: skip


def _kinds(slots: QuerySlots, small_area: float) -> NDArray[np.str_]:
    if not 0 <= small_area <= 1:
        raise ValueError(f"`small_area` must be between 0 and 1, got {small_area}.")
    width, height = slots.boxes[..., 2], slots.boxes[..., 3]
    large = np.where(width > height, "horizontal", "vertical")
    return np.where(width * height < small_area, "small", large)
