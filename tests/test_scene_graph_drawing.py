import itertools
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from sgtr_hf import SceneGraph
from sgtr_hf.visualization import scene_graph_drawing
from sgtr_hf.visualization.scene_graph_drawing import draw_scene_graph


NAMES = ("man", "woman", "table", "laptop", "traffic-light", "sidewalk", "hat")
PREDICATES = ("on", "near", "holding", "in front of", "attached to")
LONG_NAMES = (
    "portable computer with a broken keyboard",
    "supercalifragilisticexpialidociousword12",
)


def random_graph(entities, relations, seed=0, names=NAMES, predicates=PREDICATES, size=(480, 640)):
    generator = np.random.default_rng(seed)
    corners = generator.uniform(0, 0.75, (entities, 2))
    boxes = np.hstack([corners, corners + generator.uniform(0.06, 0.25, (entities, 2))])
    pairs = list(itertools.permutations(range(entities), 2))
    chosen = generator.permutation(len(pairs))[:relations]
    return SceneGraph(
        boxes * [size[1], size[0], size[1], size[0]],
        generator.integers(0, len(names), entities),
        np.ones(entities),
        [[*pairs[pair], generator.integers(len(predicates))] for pair in chosen],
        np.linspace(1, 0.1, relations),
        size,
        dict(enumerate(names)),
        dict(enumerate(predicates)),
    )


@pytest.fixture
def draw(monkeypatch):
    """Draws a graph on gray and returns the axes of the node-link drawing."""
    figures = []

    class KeptFigure(Figure):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            figures.append(self)

    monkeypatch.setattr(scene_graph_drawing, "Figure", KeptFigure)

    def draw_graph(graph, **settings):
        height, width = graph.image_size
        draw_scene_graph(Image.new("RGB", (width, height), "gray"), graph, **settings)
        return figures[-1].axes[1]

    return draw_graph


def rectangle(artist, dpi=110):
    extent = artist.get_window_extent()
    return np.array([[extent.x0, extent.y0], [extent.x1, extent.y1]]) * 72 / dpi


def parts(axes):
    """Rectangles of nodes and of labels, and the lines of arrows with their tips, in points."""
    framed = [text for text in axes.texts if text.get_bbox_patch() is not None]
    nodes = [rectangle(text.get_bbox_patch()) for text in framed if text.get_zorder() == 5]
    labels = [rectangle(text.get_bbox_patch()) for text in framed if text.get_zorder() == 4]
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    scale = 72 / axes.figure.dpi
    lines = []
    for arrow in arrows:
        path = axes.transData.transform_path(arrow._path_original).interpolated(1)
        (line,) = path.to_polygons(closed_only=False)
        steps = np.linspace(0, len(line) - 1, 1000)
        lines.append(
            np.stack([np.interp(steps, range(len(line)), side) for side in line.T], axis=1) * scale
        )
    return nodes, labels, lines


def touch(first, second):
    return bool((np.minimum(first[1], second[1]) > np.maximum(first[0], second[0])).all())


def hidden(points, rectangles):
    return np.any(
        [((points > low) & (points < high)).all(axis=1) for low, high in rectangles], axis=0
    )


def check(axes):
    nodes, labels, lines = parts(axes)
    panel = rectangle(axes)
    for first, second in itertools.combinations(nodes, 2):
        assert not touch(first, second)
    for node, label in itertools.product(nodes, labels):
        assert not touch(node, label)
    for inner in (*nodes, *labels):
        assert (inner[0] >= panel[0] - 0.5).all()
        assert (inner[1] <= panel[1] + 0.5).all()
    for line in lines:
        lengths = np.hypot(*np.diff(line, axis=0).T)
        shown = ~hidden(line, [*nodes, *labels])
        assert lengths[shown[1:]].sum() > 14
        # The head is about five points long.
        head = lengths[::-1].cumsum()[::-1] < 5
        assert shown[1:][head].mean() > 0.9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("entities", "relations", "shown"), [(5, 6, 20), (15, 20, 20), (40, 60, 20), (40, 60, 60)]
)
def test_nodes_labels_and_arrow_heads_are_free(draw, entities, relations, shown, seed):
    axes = draw(random_graph(entities, relations, seed), max_relations=shown)
    check(axes)
    assert len(parts(axes)[2]) == min(relations, shown)


@pytest.mark.parametrize("size", [(32, 32), (100, 2000), (2000, 400), (3000, 4000)])
def test_pictures_of_any_size(draw, size):
    check(draw(random_graph(12, 14, size=size)))


def test_long_names_are_wrapped_and_shortened(draw):
    axes = draw(random_graph(12, 14, names=LONG_NAMES))
    check(axes)
    assert max(len(line) for text in axes.texts for line in text.get_text().split("\n")) <= 22
    shortened = draw(random_graph(2, 1, names=["word " * 30]))
    assert any(text.get_text().endswith("...") for text in shortened.texts)


def test_entities_without_relations_fit(draw):
    check(draw(random_graph(60, 0)))


def test_dollar_signs_are_letters(draw):
    axes = draw(random_graph(4, 4, names=[r"$\frac$", "$x_1$"], predicates=["$y^2$"]))
    check(axes)
    assert not any(text.get_parse_math() for text in axes.texts if text.get_text())


def test_letters_without_a_font_do_not_warn(draw, caplog):
    # An unassigned code point, of which no font can have a glyph.
    graph = random_graph(3, 2, names=["cup \U000e0fff"], predicates=["on \U000e0fff"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(graph)
    plain = random_graph(3, 2)
    caplog.clear()
    draw(plain)
    assert not caplog.records


def test_other_fonts_are_used_for_letters_that_the_usual_ones_lack(caplog):
    # CJK letters, where such a font is installed; otherwise the log names a remedy.
    families = scene_graph_drawing._families(["cup", "\u676f"])
    assert families[0] == "sans-serif"
    assert len(families) > 1 or "install one" in caplog.text
    assert scene_graph_drawing._families(["cup"]) == ["sans-serif"]


def test_no_relations_wanted_draws_all_entities(draw):
    graph = random_graph(8, 9)
    axes = draw(graph, max_relations=0)
    nodes, labels, lines = parts(axes)
    assert (len(nodes), len(labels), len(lines)) == (8, 0, 0)
    assert not any(text.get_text().startswith("no ") for text in axes.texts)
    with pytest.raises(ValueError, match="`max_relations` must be 0 or more, got -1"):
        draw(graph, max_relations=-1)


def test_a_relation_of_an_entity_with_itself_is_a_loop(draw):
    graph = SceneGraph(
        [[0, 0, 5, 5], [4, 4, 9, 9]],
        [0, 0],
        [1, 1],
        [[0, 0, 0], [0, 1, 0], [1, 0, 0]],
        [0.9, 0.8, 0.7],
        (10, 20),
    )
    axes = draw(graph)
    check(axes)
    assert len(parts(axes)[2]) == 3


def test_notes(draw):
    assert [text.get_text() for text in draw(SceneGraph.empty((9, 9))).texts] == ["no entities"]
    assert "no relations" in [text.get_text() for text in draw(random_graph(1, 0)).texts]
