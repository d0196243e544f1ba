"""Where `sgtr-hf predict` puts its graphs: a JSON file, or Parquet that `evaluate` reads."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .scene_graph import SceneGraph


class GraphOutput(AbstractContextManager["GraphOutput"]):
    """Takes graphs one after the other; by the ending of its name it becomes JSON or Parquet.

    JSON holds the graph of the one picture that was asked for, or a dictionary from path to graph;
    what was found before an error is written, too. Parquet is written as graphs come, and calls an
    image by the name of its file.

    Args:
        path: The file; None keeps nothing.
        pictures: All pictures to come.
        id2label: Names of classes, from 0.
        id2predicate: Names of predicates, from 0.

    Raises:
        ImportError: If Parquet is wanted and `datasets` is not installed.
        ValueError: If two pictures would have one name in Parquet.
    """

    def __init__(
        self,
        path: Path | None,
        pictures: Sequence[str],
        id2label: Mapping[int, str],
        id2predicate: Mapping[int, str],
    ) -> None:
        self.path = path
        self._is_single = len(pictures) == 1
        self._graphs: dict[str, dict[str, Any]] = {}
        self._writer: Any = None
        if path is not None and path.suffix.lower() == ".parquet":
            _check_names(pictures)
            self._writer = _open_writer(path, id2label, id2predicate)

    def add(self, picture: str, graph: SceneGraph) -> None:
        """Add the graph of a picture."""
        if self._writer is not None:
            self._writer.write(Path(picture).stem, graph, picture)
        elif self.path is not None:
            self._graphs[picture] = graph.to_dict()

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)
        elif self.path is not None and self._graphs:
            graphs = self._graphs
            content = next(iter(graphs.values())) if self._is_single else graphs
            self.path.write_text(json.dumps(content, indent=2) + "\n")


def _check_names(pictures: Sequence[str]) -> None:
    counts = Counter(Path(picture).stem for picture in pictures)
    name, count = counts.most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"{count} pictures are called {name}, which is their id in Parquet; predict them into "
            "separate files."
        )


def _open_writer(path: Path, id2label: Mapping[int, str], id2predicate: Mapping[int, str]) -> Any:
    try:
        from .data.prediction_file import PredictionWriter
    except ImportError as error:
        raise ImportError(
            f'Parquet needs {error.name}, which is not installed: `pip install "sgtr-hf[train]"`.'
        ) from error

    return PredictionWriter(path, id2label, id2predicate, distributions=True)
