import dataclasses
import json

import networkx
import numpy as np
import pytest
from PIL import Image

from sgtr_hf import SceneGraph
from sgtr_hf.graph_export import to_dot, to_graphml, to_networkx
from sgtr_hf.visualization.scene_graph_drawing import draw_scene_graph
from sgtr_hf.visualization.training_curves import draw_training_curves, read_log


@pytest.fixture
def graph():
    return SceneGraph(
        boxes_xyxy=[[0, 0, 5, 5], [1, 1, 19, 9.5], [2, 2, 4, 4]],
        labels=[0, 1, 0],
        scores=[0.9, 0.8, 0.7],
        relations=[[0, 1, 1], [1, 0, 0], [0, 1, 0]],
        relation_scores=[0.7, 0.3, 0.2],
        image_size=(10, 20),
        id2label={0: "cup", 1: 'the "table"'},
        id2predicate={0: "under", 1: "on"},
        predicate_distributions=[[0.1, 0.7], [0.3, 0.2], [0.2, 0.1]],
        masks=np.random.default_rng(0).uniform(size=(3, 10, 20)) > 0.5,
    )


def test_json_comes_back(graph, tmp_path):
    assert SceneGraph.from_json(graph.to_json()) == graph
    graph.to_json(tmp_path / "graph.json")
    assert SceneGraph.from_json(tmp_path / "graph.json") == graph
    assert json.loads(graph.to_json())["relations"][0]["predicate"] == "on"


def test_graphs_without_extras_come_back():
    graph = SceneGraph([[0, 0, 1, 1]], [3], [0.5], [], [], (4, 4))
    assert SceneGraph.from_dict(graph.to_dict()) == graph
    assert SceneGraph.from_dict(SceneGraph.empty((3, 4)).to_dict()).num_entities == 0


def test_words(graph):
    first = graph.triplets()[0]
    assert (first.subject, first.predicate, first.object) == ("cup", "on", 'the "table"')
    assert "3 entities, 3 relations" in repr(graph)


def test_top_keeps_the_best_relations_and_their_entities(graph):
    best = graph.top(1)
    assert best.num_relations == 1
    assert best.num_entities == 2
    assert best.masks.shape == (2, 10, 20)
    assert best.triplets() == graph.triplets()[:1]


def test_results_cannot_be_changed_by_accident(graph):
    with pytest.raises(ValueError, match="read-only"):
        graph.scores[0] = 0
    assert graph != graph.top(1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("relations", [[0, 3, 0]] * 3),
        ("relations", [[0, 1, 5]] * 3),
        ("relations", [[0, 1]] * 3),
        ("labels", [0, 1]),
        ("labels", [0, 1, 9]),
        ("scores", [0.1, np.nan, 0.2]),
        ("boxes_xyxy", [[5, 5, 1, 1]] * 3),
        ("image_size", (0, 5)),
        ("masks", np.zeros((2, 10, 20))),
        ("predicate_distributions", [[0.1, 0.2]]),
    ],
)
def test_wrong_fields_name_themselves(graph, field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(graph, **{field: value})


@pytest.mark.parametrize("text", ["no json", "[]", '{"image": {}}', '{"entities": 3}'])
def test_what_is_no_graph(text):
    with pytest.raises(ValueError, match=r"scene graph|JSON"):
        SceneGraph.from_json(text)


def test_networkx_and_graphml_hold_everything(graph, tmp_path):
    network = to_networkx(graph)
    assert network.number_of_nodes() == 3
    assert network.number_of_edges() == 3
    assert network.nodes[1]["x2"] == 19
    to_graphml(graph, tmp_path / "graph.graphml")
    read = networkx.read_graphml(tmp_path / "graph.graphml", node_type=int, force_multigraph=True)
    assert {data["predicate"] for _, _, data in read.edges(data=True)} == {"on", "under"}


def test_dot_quotes_names(graph):
    text = to_dot(graph)
    assert '1 [label="the \\"table\\""];' in text
    assert '0 -> 1 [label="on"];' in text


def test_drawing_shows_picture_and_graph(graph, tmp_path):
    picture = Image.new("RGB", (20, 10), "gray")
    drawing = draw_scene_graph(picture, graph, path=tmp_path / "drawing.png")
    assert drawing.width > drawing.height > 100
    assert (tmp_path / "drawing.png").stat().st_size > 1000
    without = draw_scene_graph(picture, SceneGraph.empty((10, 20)))
    assert np.abs(np.asarray(drawing).astype(int) - np.asarray(without)).sum() > 0
    again = draw_scene_graph(picture, graph)
    assert np.array_equal(np.asarray(drawing), np.asarray(again))


def test_drawing_wants_the_right_picture(graph):
    with pytest.raises(ValueError, match="belongs to a picture"):
        draw_scene_graph(Image.new("RGB", (10, 20)), graph)


def test_curves_survive_a_cut_line(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        {"split": "train", "step": 1, "loss": 2.0, "learning_rate": 0.1},
        {"split": "train", "step": 2, "loss": 1.0, "learning_rate": 0.05},
        {"split": "validation", "step": 2, "AP": 0.3},
    ]
    log.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"split": "tra')
    assert len(read_log(log)) == 3
    draw_training_curves(log, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
    log.write_text("")
    with pytest.raises(ValueError, match="no complete line"):
        draw_training_curves(log, tmp_path / "curves.png")
