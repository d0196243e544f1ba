"""Draws a scene graph: boxes on the picture beside a node-link drawing.

Lengths are in points (1/72 inch) unless said otherwise. N entities, R arrows, K labels.
"""

import logging
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import networkx
import numpy as np
from matplotlib import colormaps, font_manager, rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.text import Text
from numpy.typing import NDArray
from PIL import Image

from ..scene_graph import SceneGraph


Point = tuple[float, float]
Color = tuple[float, float, float]
Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]

_PANEL_INCHES = 7.0
# A panel with many nodes is larger, up to this many times.
_MAX_GROWTH, _GROWTH_STEP = 2.4, 1.15
_DPI = 110
# Relations beyond these, and entities beyond twice as many, would only cover each other.
MAX_RELATIONS = 20

# Letters of a line; what needs more than two lines ends in dots.
_LINE_LETTERS = 22
# What must stay free between two nodes, two labels, a label and a node, and between a label and
# the two nodes that it links, where the ends of the arrow show.
_NODE_GAP, _LABEL_GAP, _MIXED_GAP, _STUB = 6.0, 3.0, 5.0, 15.0
# Space around nodes, also to the border of the panel.
_MARGIN = 4.0
# Instead of a gap between what may overlap.
_NONE = -1e6
# Share of the longer of two ways apart that is gone with the shorter one.
_SIDEWAYS = 0.15
_HEAD, _LOOP_HEIGHT = 6.0, 25.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Arrow:
    """All relations from one entity to another; `size` is the label's."""

    subject: int
    object: int
    label: Text
    size: Floats
    bend: float
    # How far along the arrow its label is wanted.
    share: float


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
        max_relations: The best relations that are drawn, with the entities in them; 0 draws all
            entities and no relation.
        path: Also write the drawing to this file.

    Raises:
        ValueError: If the graph belongs to a picture of another size, or `max_relations` is
            negative.
    """
    if (image.height, image.width) != graph.image_size:
        raise ValueError(
            f"`graph` belongs to a picture of {graph.image_size} (height, width), this one has "
            f"{(image.height, image.width)}."
        )
    if max_relations < 0:
        raise ValueError(f"`max_relations` must be 0 or more, got {max_relations}.")
    with warnings.catch_warnings():
        # The log says it once; matplotlib would for every letter, and twice.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawing = _render(image, graph, max_relations)
    if path is not None:
        drawing.save(path)
    return drawing


def _render(image: Image.Image, graph: SceneGraph, max_relations: int) -> Image.Image:
    shown = _best(graph, max_relations)
    colors = _colors(shown.num_entities)
    names = [shown.entity_name(index) for index in range(shown.num_entities)]
    families = _families([*names, *map(shown.predicate_name, shown.relations[:, 2].tolist())])
    ratio = min(max(image.height / image.width, 0.6), 1.4)
    figure = Figure(figsize=(2 * _PANEL_INCHES, _PANEL_INCHES * ratio), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.99, bottom=0.01, wspace=0.02)
    picture_axes, graph_axes = figure.subplots(1, 2)
    # Of the whole graph: relations that are only not wanted are there.
    note = "" if graph.num_relations else "no relations" if graph.num_entities else "no entities"
    _draw_graph(graph_axes, shown, colors, families, note)
    # After the graph, which may have made the panels larger.
    _draw_picture(picture_axes, image, shown, colors, families)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _best(graph: SceneGraph, count: int) -> SceneGraph:
    if graph.num_relations == 0:
        return graph
    if count > 0:
        return graph.top(count)
    return replace(
        graph,
        relations=graph.relations[:0],
        relation_scores=graph.relation_scores[:0],
        predicate_distributions=None,
    )


def _colors(count: int) -> list[Color]:
    """Colours that colour-blind readers can tell apart, repeated only after twenty."""
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]
    # First the ten strong colours, then their light twins.
    ordered = [*palette[::2], *palette[1::2]]
    return [ordered[index % len(ordered)] for index in range(count)]


def _text_color(color: Color) -> str:
    red, green, blue = color
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"  # noqa: PLR2004


def _families(words: Iterable[str]) -> list[str]:
    """The usual fonts, then installed ones with the letters that those lack."""
    families: list[str] = list(rcParams["font.family"])
    files = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
    usual = font_manager.findfont(font_manager.FontProperties(family=families))
    missing = {letter for letter in "".join(words) if letter.isprintable()}
    for family, file in [("", usual), *sorted(files.items())]:
        # Matplotlib's last resort has a square for every letter.
        if not missing or family.startswith("Last Resort"):
            continue
        font = font_manager.get_font(file)
        found = {letter for letter in missing if font.get_char_index(ord(letter))}
        missing -= found
        if found and family:
            families.append(family)
    if missing:
        logger.warning(
            "No installed font has %s; install one that has, such as Noto Sans CJK.",
            " ".join(sorted(missing)),
        )
    return families


def _entity_text(graph: SceneGraph, index: int) -> str:
    return _wrap(f"{index} {graph.entity_name(index)}", 2)


def _wrap(words: str, lines: int) -> str:
    return "\n".join(textwrap.wrap(words, _LINE_LETTERS, max_lines=lines, placeholder="..."))


def _size(text: Text) -> Floats:
    """Width and height with the frame around it."""
    extent = text.get_window_extent()
    patch = text.get_bbox_patch()
    padding = patch.get_boxstyle().pad * text.get_fontsize() if patch is not None else 0.0  # type: ignore[attr-defined]
    return np.array([extent.width, extent.height]) * 72 / _DPI + 2 * padding


def _draw_picture(
    axes: Axes, image: Image.Image, graph: SceneGraph, colors: list[Color], families: list[str]
) -> None:
    axes.set_axis_off()
    panel = _panel(axes)
    shrunk = image.convert("RGB")
    # More pixels than the drawing has would only take time.
    shrunk.thumbnail(tuple((2 * panel * _DPI / 72).astype(int)))
    axes.imshow(np.asarray(shrunk), extent=(-0.5, image.width - 0.5, image.height - 0.5, -0.5))
    size = 9 if graph.num_entities <= 15 else 7  # noqa: PLR2004
    taken = np.zeros((0, 4))
    # Pixels of the picture in a point.
    scale = max(image.width / panel[0], image.height / panel[1])
    for index, (box, color) in enumerate(zip(graph.boxes_xyxy.tolist(), colors, strict=True)):
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=2))
        text = _add_text(axes, _entity_text(graph, index), size, families)
        text.set_color(_text_color(color))
        label = (_size(text) + 3) * scale
        text.set_bbox({"facecolor": color, "edgecolor": "none", "pad": 1.5, "alpha": 0.9})
        place = _free_place(box, label, taken, image.size)
        taken = np.vstack([taken, [*place, *(place + label)]])
        text.set_position(tuple(place + label / 2))


def _figure(axes: Axes) -> Figure:
    return cast("Figure", axes.get_figure(root=True))


def _panel(axes: Axes) -> Floats:
    """Width and height of the panel that axes fill."""
    place = axes.get_position(original=True)
    return np.array([place.width, place.height]) * _figure(axes).get_size_inches() * 72


def _add_text(axes: Axes, words: str, size: float, families: list[str]) -> Text:
    # A dollar sign in a name does not begin a formula.
    return axes.text(
        0, 0, words, fontsize=size, fontfamily=families, ha="center", va="center", parse_math=False
    )


def _free_place(box: list[float], size: Floats, taken: Floats, limits: tuple[int, int]) -> Floats:
    """The first corner of a box, inside or out, where a label covers no other label.

    `taken` are the x1, y1, x2, y2 of K other labels.
    """
    x1, y1, x2, y2 = box
    width, height = size
    left, right, top, bottom = x1, x2 - width, y1, y2 - height
    outer = [(left, y1 - height), (left, y2), (right, y2), (x2, top), (x1 - width, top)]
    inner = [(left, top), (right, top), (left, bottom), (right, bottom)]
    middle = ((left + right) / 2, (top + bottom) / 2)
    candidates = np.array([outer[0], *inner, *outer[1:], middle])
    free = limits - size
    # A label larger than the picture stands in its middle.
    candidates = np.where(free < 0, free / 2, candidates.clip(0, free.clip(0)))
    low = np.maximum(candidates[:, None], taken[:, :2])
    high = np.minimum(candidates[:, None] + size, taken[:, 2:])
    covered = (high - low).clip(0).prod(axis=-1).sum(axis=1)
    return np.asarray(candidates[covered.argmin()])


def _draw_graph(
    axes: Axes, graph: SceneGraph, colors: list[Color], families: list[str], note: str
) -> None:
    axes.set_axis_off()
    size = 10 if graph.num_entities <= 15 else 8  # noqa: PLR2004
    nodes = [_add_text(axes, _entity_text(graph, i), size, families) for i in range(len(colors))]
    for node, color in zip(nodes, colors, strict=True):
        node.set(color=_text_color(color), zorder=5)
        node.set_bbox({"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "0.3"})
    halves = np.array([_size(node) for node in nodes]).reshape(-1, 2) / 2
    arrows, loops = _arrows(axes, graph, size - 1.5, families)
    panel = _panel(axes)
    if nodes:
        rooms = halves + _MARGIN
        for loop in loops:
            height = halves[loop.subject, 1] + _LOOP_HEIGHT + _MARGIN + loop.size[1]
            room = [loop.size[0] / 2, height]
            rooms[loop.subject] = np.maximum(rooms[loop.subject], room)
        places, growth = _layout(graph, rooms, arrows, panel - [0, 24 if note else 0])
        _figure(axes).set_size_inches(*(_figure(axes).get_size_inches() * growth))
        panel = panel * growth
        for node, place in zip(nodes, places, strict=True):
            node.set_position(place)
        for loop in loops:
            top = places[loop.subject] + [0, halves[loop.subject, 1]]
            _draw_loop(axes, loop, top, colors[loop.subject])
        _draw_arrows(axes, arrows, places, halves, colors)
    axes.set_xlim(0, panel[0])
    axes.set_ylim(0, panel[1])
    place = (0.5, 0.97 if nodes else 0.5)
    axes.text(
        *place, note, transform=axes.transAxes, ha="center", va="center", fontsize=12, color="gray"
    )


def _arrows(
    axes: Axes, graph: SceneGraph, size: float, families: list[str]
) -> tuple[list[_Arrow], list[_Arrow]]:
    """Arrows between entities, and those from an entity to itself; labels have no place yet."""
    pairs: dict[tuple[int, int], list[str]] = defaultdict(list)
    for subject, object_, predicate in graph.relations.tolist():
        pairs[subject, object_].append(graph.predicate_name(predicate))
    arrows: list[_Arrow] = []
    loops: list[_Arrow] = []
    for (subject, object_), predicates in pairs.items():
        label = _add_text(axes, _wrap(", ".join(predicates), 3), size, families)
        label.set_bbox({"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none"})
        label.set_zorder(4)
        # Labels of an arrow and its way back stand side by side if each is nearer its start.
        bend, share = (0.18, 0.38) if (object_, subject) in pairs else (0.06, 0.5)
        arrow = _Arrow(subject, object_, label, _size(label), bend, share)
        (loops if subject == object_ else arrows).append(arrow)
    return arrows, loops


def _layout(
    graph: SceneGraph, halves: Floats, arrows: list[_Arrow], panel: Floats
) -> tuple[Floats, float]:
    """(N, 2) places of nodes, and how many times larger the panel must be for them.

    Args:
        graph: N entities.
        halves: (N, 2) half of the width and height of nodes.
        arrows: Their labels need a place, too.
        panel: Width and height.
    """
    start = _springs(graph)
    # Crowds and gaps are evened out where the springs alone leave too little room.
    even = (start + start.argsort(axis=0).argsort(axis=0) / max(len(start) - 1, 1)) / 2
    growth = 1.0
    for unit in (start, even):
        places = unit * (panel - 2 * halves) + halves
        places, is_free = _push_apart(places, halves, arrows, panel)
        if is_free:
            break
    while not is_free and growth < _MAX_GROWTH:
        growth *= _GROWTH_STEP
        places, is_free = _push_apart(places * _GROWTH_STEP, halves, arrows, panel * growth)
    return places, growth


def _springs(graph: SceneGraph) -> Floats:
    """Places that fill the unit square: where the boxes are, then moved by a spring model."""
    if graph.num_entities == 1:
        return np.array([[0.5, 0.5]])
    height, width = graph.image_size
    centres = (graph.boxes_xyxy[:, :2] + graph.boxes_xyxy[:, 2:]) / 2 / [width, height]
    start = {
        index: np.array([x, 1 - y]) + 0.02 * np.array([np.cos(index), np.sin(index)])
        for index, (x, y) in enumerate(centres)
    }
    network: networkx.Graph[int] = networkx.Graph()
    network.add_nodes_from(start)
    network.add_edges_from(graph.relations[:, :2].tolist())
    # Without relations the springs would make a ring.
    steps = 120 if graph.num_relations else 0
    length = 1.6 / np.sqrt(len(start))
    placed = networkx.spring_layout(network, pos=start, k=length, iterations=steps, seed=0)
    places = np.array([placed[index] for index in range(len(start))])
    low, high = places.min(axis=0), places.max(axis=0)
    return np.asarray((places - low) / np.maximum(high - low, 1e-6))


def _push_apart(
    places: Floats, halves: Floats, arrows: list[_Arrow], panel: Floats
) -> tuple[Floats, bool]:
    """Move nodes until nodes and labels have the gaps they need; say whether that was reached.

    Points and sizes are complex numbers x + iy here, so that a turn is a product.
    """
    nodes, node_halves = _complex(places), _complex(halves)
    ends = np.array([(arrow.subject, arrow.object) for arrow in arrows], dtype=int).reshape(-1, 2)
    # Nodes and labels are solid: labels follow nodes, and what pushes a label moves its nodes.
    weights = _weights([(arrow.share, arrow.bend) for arrow in arrows])
    solid = np.append(node_halves, [complex(*arrow.size) / 2 + 1 + 1j for arrow in arrows])
    size = complex(*panel)
    needs = solid[:, None] + solid + _gaps(ends, len(nodes)) * (1 + 1j)
    # Points of arrows, which keep off nodes that they do not link.
    quarter_ends = np.tile(ends, (2, 1))
    quarters = _weights([(share, arrow.bend) for share in (0.25, 0.75) for arrow in arrows])
    is_linked = (quarter_ends[..., None] == np.arange(len(nodes))).any(axis=1)
    quarter_needs = node_halves + np.where(is_linked, _NONE, _MIXED_GAP) * (1 + 1j)
    # Two at one place must have an order to part.
    order = 1e-6 * (1 + 1j) * np.arange(len(solid))
    # A drawing must not take minutes.
    for _ in range(min(150, 1 + int(2e6 / len(solid) ** 2))):
        bodies = np.append(nodes, (nodes[ends] * weights).sum(axis=1)) + order
        pushes = _pushes(bodies, bodies, needs).sum(axis=1)
        pushes += _clip(bodies, solid, size) - bodies
        if np.abs(pushes).max() < 1.0:
            break
        aside = _pushes((nodes[quarter_ends] * quarters).sum(axis=1), nodes, quarter_needs) / 3
        force = pushes[: len(nodes)] - aside.sum(axis=0)
        np.add.at(force, ends, weights.conj() * pushes[len(nodes) :, None])
        np.add.at(force, quarter_ends, quarters.conj() * aside.sum(axis=1)[:, None])
        force *= 0.6 / np.maximum(np.abs(force) / 30, 1)
        nodes = _clip(nodes + force, node_halves, size)
    nodes = _clip(nodes, node_halves, size)
    return np.stack([nodes.real, nodes.imag], axis=-1), bool(np.abs(pushes).max() < 1)


def _gaps(ends: NDArray[np.int64], count: int) -> Floats:
    """What must be free between nodes and labels; `_NONE` if they may overlap."""
    gaps = np.full((count + len(ends),) * 2, _MIXED_GAP)
    gaps[:count, :count], gaps[count:, count:] = _NODE_GAP, _LABEL_GAP
    for label, pair in enumerate(ends, start=count):
        gaps[label, pair] = gaps[pair, label] = _STUB
    np.fill_diagonal(gaps, _NONE)
    return gaps


def _weights(points: list[tuple[float, float]]) -> Complexes:
    """(K, 2) weights of the ends of arrows for their points, of which share and bend are given."""
    share, bend = np.array(points, dtype=float).reshape(-1, 2).T
    middle = 2 * share * (1 - share)
    first = (1 - share) ** 2 + middle * (0.5 + 1j * bend)
    return np.stack([first, 1 - first], axis=-1)


def _complex(points: Floats) -> Complexes:
    return np.asarray(points[:, 0] + 1j * points[:, 1])


def _clip(numbers: Complexes, limit: Complexes, panel: complex) -> Complexes:
    """Clip both parts from `limit` to `panel - limit`."""
    high = panel - limit
    real = numbers.real.clip(limit.real, high.real)
    return np.asarray(real + 1j * numbers.imag.clip(limit.imag, high.imag))


def _pushes(first: Complexes, second: Complexes, needs: Complexes) -> Complexes:
    """(F, S) half of the shorter ways, upright or level, to the distances needed."""
    offset = first[:, None] - second
    level = needs.real - np.abs(offset.real)
    upright = needs.imag - np.abs(offset.imag)
    # A little of the longer way, too, or columns without room would stay columns.
    is_level = level < upright
    pushes = np.copysign(level, offset.real) * np.where(is_level, 1, _SIDEWAYS)
    pushes = pushes + 1j * np.copysign(upright, offset.imag) * np.where(is_level, _SIDEWAYS, 1)
    return np.where((level > 0) & (upright > 0), pushes / 2, 0)


def _draw_arrows(
    axes: Axes, arrows: list[_Arrow], places: Floats, halves: Floats, colors: list[Color]
) -> None:
    """Arrows from frame to frame of their nodes, and labels where they cover least."""
    curves = [_curve(arrow, places, halves) for arrow in arrows]
    for arrow, curve in zip(arrows, curves, strict=True):
        _add_arrow(axes, Curve(curve, [Curve.MOVETO, *[Curve.CURVE3] * 2]), colors[arrow.subject])
    heads = np.array([curve[2] for curve in curves]).reshape(-1, 2)
    label_halves = np.array([arrow.size for arrow in arrows]).reshape(-1, 2) / 2
    labels = np.array([curve.mean(axis=0) for curve in curves]).reshape(-1, 2)
    solid = np.vstack([halves + 1, label_halves + 1, np.full((len(heads), 2), _HEAD)])
    # The second time, all other labels are where they will be.
    for index in [*range(len(arrows))] * 2:
        shares = np.linspace(0.2, 0.8, 25)
        candidates = _points(curves[index], shares)
        bodies = np.vstack([places, labels, heads])
        free = solid + label_halves[index] - np.abs(candidates[:, None] - bodies[None])
        covered = free.clip(0).prod(axis=-1)
        covered[:, len(places) + index] = 0
        cost = covered.sum(axis=1) + 20 * np.abs(shares - arrows[index].share)
        labels[index] = candidates[cost.argmin()]
    for arrow, place in zip(arrows, labels, strict=True):
        arrow.label.set_position((place[0], place[1]))


def _curve(arrow: _Arrow, places: Floats, halves: Floats) -> Floats:
    """(3, 2) points of the quadratic curve between two nodes, without what is behind them."""
    start, end = places[arrow.subject], places[arrow.object]
    along = end - start
    middle = (start + end) / 2 + arrow.bend * np.array([along[1], -along[0]])
    curve = np.array([start, middle, end])
    shares = np.linspace(0, 1, 401)
    points = _points(curve, shares)
    # An arrow ends a point before the frame, so that its tip shows.
    space = halves[[arrow.subject, arrow.object]] + 1
    is_behind = (np.abs(points[:, None] - curve[[0, 2]]) < space).all(axis=-1).any(axis=-1)
    visible = shares[~is_behind]
    first, last = (visible[0], visible[-1]) if len(visible) > 1 else (0.0, 1.0)
    cut_start, cut_end = _points(curve, np.array([first, last]))
    both = first * last
    turn = np.array([1 - first - last + both, first + last - 2 * both, both]) @ curve
    return np.array([cut_start, turn, cut_end])


def _points(curve: Floats, shares: Floats) -> Floats:
    weights = np.stack([(1 - shares) ** 2, 2 * shares * (1 - shares), shares**2], axis=-1)
    return np.asarray(weights @ curve)


def _draw_loop(axes: Axes, loop: _Arrow, top: Floats, color: Color) -> None:
    """An arrow from an entity to itself, above the middle of its upper edge."""
    # The highest point of the curve is at three quarters of its control points' height.
    height = _LOOP_HEIGHT * 4 / 3
    corners = top + np.array([[-6, 0], [-26, height], [26, height], [6, 1]])
    _add_arrow(axes, Curve(corners, [Curve.MOVETO, *[Curve.CURVE4] * 3]), color)
    loop.label.set_position((top[0], top[1] + _LOOP_HEIGHT + 2 + loop.size[1] / 2))


def _add_arrow(axes: Axes, curve: Curve, color: Color) -> None:
    arrow = FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=13, shrinkA=0, shrinkB=0)
    arrow.set(color=color, linewidth=1.6)
    axes.add_patch(arrow)
