"""Exports of a scene graph: networkx, DOT, GraphML."""

from pathlib import Path

import networkx

from .scene_graph import SceneGraph


def to_networkx(graph: SceneGraph) -> "networkx.MultiDiGraph[int]":
    """Return a directed multigraph.

    Nodes are the indices of entities with attributes `name`, `label`, `score` and x1, y1, x2, y2;
    edges go from subject to object with `predicate`, `predicate_id` and `score`. All are plain
    texts and numbers, so that every format of networkx can hold them.
    """
    network: networkx.MultiDiGraph[int] = networkx.MultiDiGraph(
        height=graph.image_size[0], width=graph.image_size[1]
    )
    for index, box in enumerate(graph.boxes_xyxy.tolist()):
        network.add_node(
            index,
            name=graph.entity_name(index),
            label=int(graph.labels[index]),
            score=float(graph.scores[index]),
            **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
        )
    for (subject, object_, predicate), score in zip(
        graph.relations.tolist(), graph.relation_scores, strict=True
    ):
        network.add_edge(
            subject,
            object_,
            predicate=graph.predicate_name(predicate),
            predicate_id=predicate,
            score=float(score),
        )
    return network


def to_dot(graph: SceneGraph) -> str:
    """Return the graph in the DOT language of Graphviz."""
    lines = ["digraph scene_graph {", "  node [shape=box, style=rounded];"]
    lines += [
        f"  {index} [label={_quote(graph.entity_name(index))}];"
        for index in range(graph.num_entities)
    ]
    lines += [
        f"  {subject} -> {object_} [label={_quote(graph.predicate_name(predicate))}];"
        for subject, object_, predicate in graph.relations.tolist()
    ]
    return "\n".join([*lines, "}"]) + "\n"


def to_graphml(graph: SceneGraph, path: str | Path | None = None) -> str:
    """Return the graph as GraphML, and write it to a file if one is named."""
    text = "\n".join(networkx.generate_graphml(to_networkx(graph)))
    if path is not None:
        Path(path).write_text(text + "\n", encoding="utf-8")
    return text


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
