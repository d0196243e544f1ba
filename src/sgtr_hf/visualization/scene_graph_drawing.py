"""Draws a scene graph: boxes on the picture beside a node-link drawing."""

from collections import defaultdict
from pathlib import Path

import networkx
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from ..scene_graph import SceneGraph


Point = tuple[float, float]
Color = tuple[float, float, float]

_PANEL_INCHES = 7.0
_DPI = 110
# Relations beyond these, and entities beyond twice as many, would only cover each other.
MAX_RELATIONS = 20


def draw_scene_graph(
    image: Image.Image,
    graph: SceneGraph,
    *,
    max_relations: int = MAX_RELATIONS,
    path: str | Path | None = None,
) -> Image.Image:
    """Draw a graph beside its picture; an entity has one number and one colour in both.

    Args:
        image: The picture that the graph was made from.
        graph: Its boxes are in pixels of `image`.
        max_relations: The best relations that are drawn, with the entities in them.
        path: Also write the drawing to this file.

    Raises:
        ValueError: If the graph belongs to a picture of another size.
    """
    if (image.height, image.width) != graph.image_size:
        raise ValueError(
            f"`graph` belongs to a picture of {graph.image_size} (height, width), this one has "
            f"{(image.height, image.width)}."
        )
    shown = graph.top(max_relations) if graph.num_relations else graph
    colors = _colors(shown.num_entities)
    ratio = min(max(image.height / image.width, 0.6), 1.4)
    figure = Figure(figsize=(2 * _PANEL_INCHES, _PANEL_INCHES * ratio), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.02)
    picture_axes, graph_axes = figure.subplots(1, 2)
    _draw_picture(picture_axes, image, shown, colors)
    _draw_graph(graph_axes, shown, colors)
    canvas.draw()
    drawing = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    if path is not None:
        drawing.save(path)
    return drawing


def _colors(count: int) -> list[Color]:
    """Colours that colour-blind readers can tell apart, repeated only after twenty."""
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    # First the ten strong colours, then their light twins.
    ordered = [*palette[::2], *palette[1::2]]
    return [ordered[index % len(ordered)] for index in range(count)]


def _text_color(color: Color) -> str:
    red, green, blue = color
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"  # noqa: PLR2004


def _draw_picture(axes: Axes, image: Image.Image, graph: SceneGraph, colors: list[Color]) -> None:
    axes.imshow(np.asarray(image.convert("RGB")))
    axes.set_axis_off()
    size = 9 if graph.num_entities <= 15 else 7  # noqa: PLR2004
    taken: list[tuple[float, float, float, float]] = []
    scale = image.width / (_PANEL_INCHES * 72)
    for index, (box, color) in enumerate(zip(graph.boxes_xyxy.tolist(), colors, strict=True)):
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=2))
        text = f"{index} {graph.entity_name(index)}"
        width, height = 0.68 * size * len(text) * scale, 1.5 * size * scale
        x, y = _free_place(box, (width, height), taken, (image.width, image.height))
        taken.append((x, y, x + width, y + height))
        axes.text(
            x + width / 2,
            y + height / 2,
            text,
            fontsize=size,
            ha="center",
            va="center",
            color=_text_color(color),
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1.5, "alpha": 0.9},
        )


def _free_place(
    box: list[float],
    size: tuple[float, float],
    taken: list[tuple[float, float, float, float]],
    limits: tuple[int, int],
) -> Point:
    """The first corner of a box, inside or out, where a label covers no other label."""
    x1, y1, x2, y2 = box
    width, height = size
    candidates = [
        (x1, y1 - height),
        (x1, y1),
        (x2 - width, y1),
        (x1, y2 - height),
        (x2 - width, y2 - height),
        (x1, y2),
        (x2 - width, y2),
        ((x1 + x2 - width) / 2, (y1 + y2 - height) / 2),
    ]
    inside = [
        (
            min(max(x, 0), max(limits[0] - width, 0)),
            min(max(y, 0), max(limits[1] - height, 0)),
        )
        for x, y in candidates
    ]
    covered = [
        sum(_overlap((x, y, x + width, y + height), other) for other in taken) for x, y in inside
    ]
    return inside[int(np.argmin(covered))]


def _overlap(
    first: tuple[float, float, float, float], second: tuple[float, float, float, float]
) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _draw_graph(axes: Axes, graph: SceneGraph, colors: list[Color]) -> None:
    axes.set_axis_off()
    axes.set_xlim(-0.12, 1.12)
    axes.set_ylim(-0.1, 1.1)
    if graph.num_entities == 0:
        axes.text(0.5, 0.5, "no entities", ha="center", va="center", fontsize=12, color="gray")
        return
    if graph.num_relations == 0:
        axes.text(0.5, 1.06, "no relations", ha="center", va="center", fontsize=12, color="gray")
    places = _layout(graph)
    size = 10 if graph.num_entities <= 15 else 8  # noqa: PLR2004
    pairs: dict[tuple[int, int], list[str]] = defaultdict(list)
    for subject, object_, predicate in graph.relations.tolist():
        pairs[subject, object_].append(graph.predicate_name(predicate))
    labels: list[Point] = []
    for (subject, object_), predicates in pairs.items():
        bend = 0.18 if (object_, subject) in pairs else 0.06
        _draw_edge(axes, (places[subject], places[object_]), bend, colors[subject])
        place = _label_place(places[subject], places[object_], bend, [*labels, *places.values()])
        labels.append(place)
        _add_text(axes, place, ", ".join(predicates), size - 1.5)
    for index, place in places.items():
        text = axes.text(
            *place,
            f"{index} {graph.entity_name(index)}",
            fontsize=size,
            ha="center",
            va="center",
            color=_text_color(colors[index]),
            zorder=5,
        )
        text.set_bbox(
            {"boxstyle": "round,pad=0.35", "facecolor": colors[index], "edgecolor": "0.3"}
        )


def _add_text(axes: Axes, place: Point, words: str, size: float) -> Text:
    text = axes.text(*place, words, fontsize=size, ha="center", va="center", zorder=4)
    text.set_bbox({"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"})
    return text


def _layout(graph: SceneGraph) -> dict[int, Point]:
    """Places in the unit square: near where the boxes are, then pushed apart by a spring model."""
    height, width = graph.image_size
    centres = (graph.boxes_xyxy[:, :2] + graph.boxes_xyxy[:, 2:]) / 2 / [width, height]
    start = {
        index: np.array([x, 1 - y]) + 0.02 * np.array([np.cos(index), np.sin(index)])
        for index, (x, y) in enumerate(centres)
    }
    network: networkx.Graph[int] = networkx.Graph()
    network.add_nodes_from(start)
    network.add_edges_from(graph.relations[:, :2].tolist())
    if len(start) == 1:
        return {0: (0.5, 0.5)}
    network.remove_edges_from(list(networkx.selfloop_edges(network)))
    placed = networkx.spring_layout(
        network, pos=start, k=1.6 / np.sqrt(len(start)), iterations=120, seed=0
    )
    coordinates = np.array([placed[index] for index in range(len(start))])
    coordinates = _spread(coordinates)
    return {index: (float(x), float(y)) for index, (x, y) in enumerate(coordinates)}


def _spread(coordinates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Fill the unit square, and push nodes apart whose labels would touch."""
    for _ in range(60):
        low, high = coordinates.min(axis=0), coordinates.max(axis=0)
        coordinates = (coordinates - low) / np.maximum(high - low, 1e-6)
        offset = coordinates[:, None] - coordinates[None]
        # A label is about 0.16 wide and 0.07 high.
        distance = np.hypot(offset[..., 0] / 0.2, offset[..., 1] / 0.1)
        np.fill_diagonal(distance, np.inf)
        push = np.clip(1 - distance, 0, None)[..., None] * np.sign(offset) * [0.02, 0.015]
        coordinates = coordinates + push.sum(axis=1)
    return np.asarray(coordinates.clip(0, 1))


def _draw_edge(axes: Axes, ends: tuple[Point, Point], bend: float, color: Color) -> None:
    arrow = FancyArrowPatch(
        *ends,
        connectionstyle=f"arc3,rad={bend}",
        arrowstyle="-|>",
        mutation_scale=13,
        shrinkA=16,
        shrinkB=18,
        color=color,
        linewidth=1.6,
        zorder=2,
    )
    axes.add_patch(arrow)


def _label_place(start: Point, end: Point, bend: float, taken: list[Point]) -> Point:
    """The point of an edge that is farthest from all other labels."""
    first, second = np.array(start), np.array(end)
    along = second - first
    control = (first + second) / 2 + bend * np.array([along[1], -along[0]])
    best, best_distance = (0.5, 0.5), -1.0
    for share in (0.5, 0.42, 0.58, 0.34, 0.66):
        point = (1 - share) ** 2 * first + 2 * share * (1 - share) * control + share**2 * second
        offsets = np.abs(np.array(taken) - point) / [0.14, 0.05]
        distance = float(offsets.max(axis=1).min())
        if distance > best_distance + (0.15 if best_distance >= 0 else 0):
            best, best_distance = (float(point[0]), float(point[1])), distance
    return best
