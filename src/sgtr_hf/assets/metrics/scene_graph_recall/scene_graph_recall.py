"""`evaluate.load(sgtr_hf.metrics.path("scene_graph_recall"))`: recall of scene graphs."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from sgtr_hf.metrics.recall import BATCH_IMAGES, Measured, SceneGraphRecall
from sgtr_hf.metrics.record_input import graphs_of_records, record_features


_DESCRIPTION = """
Share of the annotated relations of images that are among the first K predicted ones, by the rules
of a named protocol; also without graph constraint, by predicate, and of unseen triplets.
"""

_INPUTS = """
Args:
    predictions: For each image a record (`sgtr_hf.metrics.record_input.record_of_graph` makes it
        of a graph): `width` and `height` in pixels; `objects`, each with `bbox` (x1, y1, x2, y2 in
        pixels), `label` (from 0) and `score`; and `relations`, each with `subject` and `object`
        (numbers of objects), `predicate` (from 0), `score` and, in all records or in none,
        `distribution` (the score of every predicate).
    references: The annotated records of the same images in the same order; scores do not matter.
    top_k: Numbers of predictions looked at.
    protocol: strict, scene_graph_benchmark, egtr or as_emitted.
    mode: sgdet, sgcls or predcls.
    num_predicates: Needed by the protocols but strict.
    seen_triplets: Rows of subject class, object class and predicate that training had.
    precision: Add precision, F1 and calibration of triplets.
Returns:
    What `sgtr_hf.metrics.recall.SceneGraphRecall.compute` returns: "R@20", "mR@20", "ng-R@20" and
    so on, as decimals, with the counts behind them.
"""


class SceneGraphRecallModule(evaluate.Metric):
    """Gathers records in files, which processes share, and reads them a few at a time."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": record_features(scores=True),
                    "references": record_features(scores=False),
                }
            ),
        )

    def _enforce_nested_string_type(self, schema: Any, obj: Any) -> None:
        """Records have no texts to check, and need not have every optional entry."""

    def _finalize(self) -> None:
        super()._finalize()
        gathered: Any = self.data
        if gathered is not None:
            # The library would make lists of all records at once.
            self.data: Any = _StreamedData(gathered)

    def _compute(  # noqa: PLR0913 - the library passes every setting by name
        self,
        *,
        predictions: Iterable[Mapping[str, Any]],
        references: Iterable[Mapping[str, Any]],
        top_k: Sequence[int] = (20, 50, 100),
        protocol: str = "strict",
        mode: Any = "sgdet",
        num_predicates: int | None = None,
        seen_triplets: Sequence[Sequence[int]] | None = None,
        precision: bool = False,
    ) -> dict[str, Any]:
        metric = SceneGraphRecall(
            tuple(top_k),
            protocol,
            num_predicates,
            seen_triplets=None if seen_triplets is None else np.array(seen_triplets),
            measured=Measured(mode, precision=precision),
        )
        pairs = zip(graphs_of_records(predictions), graphs_of_records(references), strict=True)
        while batch := list(itertools.islice(pairs, BATCH_IMAGES)):
            metric.update(*zip(*batch, strict=True))
        return metric.compute()


class _StreamedData:
    """The gathered records, whose columns are read when they are iterated."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._dataset = dataset

    def set_format(self, **_: Any) -> None:
        """Records stay plain."""

    def __getitem__(self, name: str) -> "_StreamedColumn":
        return _StreamedColumn(self._dataset.select_columns([name]), name)


class _StreamedColumn:
    def __init__(self, dataset: datasets.Dataset, name: str) -> None:
        self._dataset, self._name = dataset, name

    def __getitem__(self, _: slice) -> "_StreamedColumn":
        return self

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._dataset.iter(BATCH_IMAGES):
            yield from batch[self._name]
