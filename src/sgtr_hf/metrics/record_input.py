"""Graphs as plain records, the form in which `evaluate` gathers them over processes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np

from ..scene_graph import SceneGraph


_BOX_LENGTH = 4


def record_features(*, scores: bool) -> datasets.Features:
    """Describe the record of an image; labels and predicates are numbers from 0.

    Args:
        scores: As predictions have them; their relations may have a "distribution", the score of
            every predicate.
    """
    entity: dict[str, Any] = {
        "bbox": datasets.List(datasets.Value("float32"), length=_BOX_LENGTH),
        "label": datasets.Value("int64"),
    }
    relation: dict[str, Any] = {
        name: datasets.Value("int64") for name in ("subject", "object", "predicate")
    }
    if scores:
        entity["score"] = datasets.Value("float32")
        relation["score"] = datasets.Value("float32")
        relation["distribution"] = datasets.List(datasets.Value("float32"))
    return datasets.Features(
        {
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": datasets.List(entity),
            "relations": datasets.List(relation),
        }
    )


def record_of_graph(graph: SceneGraph) -> dict[str, Any]:
    """Return a graph as a record; what it does not say is left out."""
    distributions = graph.predicate_distributions
    rows = zip(graph.relations.tolist(), graph.relation_scores.tolist(), strict=True)
    relations = [
        {"subject": subject, "object": object_, "predicate": predicate, "score": score}
        for (subject, object_, predicate), score in rows
    ]
    if distributions is not None:
        for relation, values in zip(relations, distributions.tolist(), strict=True):
            relation["distribution"] = values
    boxes, labels = graph.boxes_xyxy.tolist(), graph.labels.tolist()
    return {
        "width": graph.image_size[1],
        "height": graph.image_size[0],
        "objects": [
            {"bbox": box, "label": label, "score": score}
            for box, label, score in zip(boxes, labels, graph.scores.tolist(), strict=True)
        ],
        "relations": relations,
    }


def graphs_of_records(records: Iterable[Mapping[str, Any]]) -> Iterator[SceneGraph]:
    """Yield the graph of each record; without scores they are 1.

    Raises:
        ValueError: With the number of the record and what is wrong, as a number that is not finite
            or a relation to an object that is not there.
    """
    for number, record in enumerate(records):
        try:
            yield _graph(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"Record {number}: {error} {number} good records were read before."
            ) from error


def _graph(record: Mapping[str, Any]) -> SceneGraph:
    entities, relations = record["objects"], record["relations"]
    rows = [(row["subject"], row["object"], row["predicate"]) for row in relations]
    distributions = [row.get("distribution") for row in relations]
    is_known = bool(relations) and distributions[0] is not None
    return SceneGraph(
        boxes_xyxy=np.array([entity["bbox"] for entity in entities], dtype=np.float32),
        labels=np.array([entity["label"] for entity in entities], dtype=np.int64),
        scores=np.array([entity.get("score", 1.0) for entity in entities], dtype=np.float32),
        relations=np.array(rows, dtype=np.int64).reshape(-1, 3),
        relation_scores=np.array([row.get("score", 1.0) for row in relations], dtype=np.float32),
        image_size=(record["height"], record["width"]),
        predicate_distributions=np.array(distributions, dtype=np.float32) if is_known else None,
    )
