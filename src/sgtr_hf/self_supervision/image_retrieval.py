"""Image retrieval, and its accuracy as in the revisited Oxford and Paris benchmarks.

Q queries, N images of the database, K results.

Source:
    Radenovic et al. 2018, "Revisiting Oxford and Paris": the three difficulties, junk images and
    the average precision by trapezoids.
"""

import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor


# Difficulty: what counts as right, and what is passed over as if it were not there.
_DIFFICULTIES = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
_RIGHT, _PASSED_OVER = 1, -1


class RelevantImages(NamedTuple):
    """What a query should find, as rows of the database."""

    easy: Sequence[int]
    hard: Sequence[int]
    junk: Sequence[int]


class RetrievalBenchmark(NamedTuple):
    """Names of the images, and what each query should find."""

    database: list[str]
    """Names without suffix."""
    queries: list[str]
    relevant: list[RelevantImages]


class RetrievalAccuracy(NamedTuple):
    """Figures of one difficulty; None if no query has anything to find."""

    mean_average_precision: float | None
    mean_precision: dict[int, float] | None
    """Share of right images among the first k, for each k."""
    average_precision: list[float | None]
    """Of each query; None where there is nothing to find."""


def average_precision(
    ranked_labels: Tensor, num_relevant: Tensor, cutoffs: Sequence[int] = (1, 5, 10)
) -> tuple[Tensor, Tensor]:
    """Compute the average precision of ranked results, by trapezoids.

    Args:
        ranked_labels: (Q, K) of the results, best first: 1 right, 0 wrong, -1 passed over.
        num_relevant: (Q,) right images in the whole database, at least 1.
        cutoffs: Numbers of results to compute the precision of. As in the benchmark, one beyond
            the last right result is moved to it.

    Returns:
        (Q,) average precision and (Q, cutoffs) precision, float64.
    """
    is_right = ranked_labels == _RIGHT
    # Ranks, from 0, as if what is passed over were not there.
    ranks = (ranked_labels != _PASSED_OVER).cumsum(1).sub(1).double()
    found = is_right.cumsum(1).double()
    before = torch.where(ranks > 0, (found - 1) / ranks, 1.0)
    after = found / (ranks + 1)
    heights = torch.where(is_right, (before + after) / 2, 0.0)
    precision = heights.sum(1) / num_relevant
    last = torch.where(is_right, ranks + 1, 0.0).amax(1)
    counts = torch.minimum(last[:, None], torch.tensor(list(cutoffs)).double())
    is_within = is_right[:, None] & (ranks[:, None] < counts[..., None])
    return precision, is_within.sum(2) / counts.clamp(min=1)


def retrieval_accuracy(
    similarities: Tensor,
    relevant: Sequence[RelevantImages],
    cutoffs: Sequence[int] = (1, 5, 10),
) -> dict[str, RetrievalAccuracy]:
    """Evaluate a ranking of the whole database.

    Args:
        similarities: (Q, N) of queries and images.
        relevant: What each query should find.
        cutoffs: As of `average_precision`.

    Returns:
        Figures for "easy", "medium" and "hard". Queries without anything to find do not count.

    Raises:
        ValueError: If the numbers of queries differ, or an image does not exist.
    """
    num_queries, num_images = similarities.shape
    if num_queries != len(relevant):
        raise ValueError(f"There are {num_queries} queries, but answers for {len(relevant)}.")
    order = similarities.argsort(dim=1, descending=True, stable=True)
    results = {}
    for difficulty, (right, passed_over) in _DIFFICULTIES.items():
        labels = torch.zeros(num_queries, num_images, dtype=torch.int8)
        for query, answer in enumerate(relevant):
            for names, value in ((passed_over, _PASSED_OVER), (right, _RIGHT)):
                rows = [row for name in names for row in getattr(answer, name)]
                if rows and not 0 <= min(rows) <= max(rows) < num_images:
                    raise ValueError(
                        f"Query {query} names images up to {max(rows)}, the database has "
                        f"{num_images}."
                    )
                labels[query, rows] = value
        results[difficulty] = _summarize(labels.gather(1, order), cutoffs)
    return results


def _summarize(ranked_labels: Tensor, cutoffs: Sequence[int]) -> RetrievalAccuracy:
    counts = (ranked_labels == _RIGHT).sum(1)
    asked = counts > 0
    if not asked.any():
        return RetrievalAccuracy(None, None, [None] * len(counts))
    precision, at_cutoffs = average_precision(ranked_labels[asked], counts[asked], cutoffs)
    values = iter(precision.tolist())
    return RetrievalAccuracy(
        float(precision.mean()),
        dict(zip(cutoffs, at_cutoffs.mean(0).tolist(), strict=True)),
        [next(values) if is_asked else None for is_asked in asked.tolist()],
    )


def read_benchmark(path: str | Path) -> RetrievalBenchmark:
    """Read the answers of a benchmark.

    Args:
        path: JSON, or the published pickle (`gnd_roxford5k.pkl`), of `imlist`, `qimlist` and
            `gnd`: for each query `easy`, `hard` and `junk` rows of `imlist`. Pickles are read
            without running code of theirs.

    Raises:
        ValueError: If the file cannot be read, or lacks an entry.
    """
    path = Path(path)
    try:
        if path.suffix == ".pkl":
            entries = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        else:
            entries = json.loads(path.read_text())
        answers = [
            RelevantImages(*(_rows(answer.get(name, ())) for name in ("easy", "hard", "junk")))
            for answer in entries["gnd"]
        ]
        return RetrievalBenchmark(list(entries["imlist"]), list(entries["qimlist"]), answers)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a benchmark: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} must hold `imlist`, `qimlist` and `gnd` with `easy`, `hard` and `junk` rows "
            f"for each query; {error!r}."
        ) from error


def _rows(values: Any) -> list[int]:
    return [int(value) for value in np.asarray(values, dtype=np.int64).ravel()]


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, numbers and arrays; a pickle may otherwise run anything."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # What arrays and numbers of numpy say of themselves, in versions 1 and 2.
        **{
            (f"numpy.{core}.multiarray", name): np.zeros(shape, np.int64)[()].__reduce__()[0]
            for core in ("core", "_core")
            for name, shape in (("_reconstruct", (1,)), ("scalar", ()))
        },
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Return an allowed class, or refuse."""
        try:
            return self._ALLOWED[module_name, global_name]
        except KeyError as error:
            raise pickle.UnpicklingError(
                f"it wants to load {module_name}.{global_name}, which answers of a benchmark do "
                "not need"
            ) from error
