"""Copy detection: whitened descriptors, and the accuracy on sets built like Copydays.

Q copies, N originals and distractors, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .image_retrieval import average_precision
from .nearest_neighbours import find_neighbours


# Share of the largest variance below which a direction counts as having this much.
_LEAST_VARIANCE = 1e-5
# Results that DINO's evaluation looks at.
_NUM_RESULTS = 20


class Whitening(NamedTuple):
    """Makes the directions of a set of features equally wide and independent."""

    mean: Tensor
    """(D,)."""
    projection: Tensor
    """(D, D), largest variance first."""

    @classmethod
    def fit(cls, features: Tensor, *, is_centred: bool = False) -> "Whitening":
        """Learn it from features (N, D) of other pictures.

        Args:
            features: Of at least one picture; many more than D are wanted.
            is_centred: Take the mean off before the covariance. DINO's evaluation, whose figures
                are compared with, does not, though it takes it off when it whitens.

        Raises:
            ValueError: If there are none, or they are not finite.
        """
        if not len(features):
            raise ValueError("Whitening needs the features of at least one picture, got none.")
        if not torch.isfinite(features).all():
            raise ValueError("Whitening needs finite features.")
        # The smallest variances need more digits than float32 has.
        values = features.double()
        mean = values.mean(0)
        if is_centred:
            values = values - mean
        variances, directions = torch.linalg.eigh(values.T @ values / len(values))
        variances = variances.clamp(min=float(variances.max()) * _LEAST_VARIANCE)
        projection = (directions / variances.sqrt()).T.flip(0)
        return cls(mean.float(), projection.float())

    def apply(self, features: Tensor) -> Tensor:
        """Whiten features (N, D)."""
        return (features - self.mean) @ self.projection.T


class CopyAccuracy(NamedTuple):
    """Figures of one kind of copy."""

    num_copies: int
    mean_average_precision: float


def originals_of(
    copies: Sequence[str], originals: Sequence[str], prefix_length: int = 4
) -> list[list[int]]:
    """Find by their names what pictures are copies of.

    Args:
        copies: Names of files.
        originals: Names of files.
        prefix_length: Characters that the names of a copy and its original share.

    Returns:
        Rows of `originals` for each copy.

    Raises:
        ValueError: If a copy has none.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(originals):
        rows.setdefault(Path(name).name[:prefix_length], []).append(row)
    found = [rows.get(Path(name).name[:prefix_length], []) for name in copies]
    for name, right in zip(copies, found, strict=True):
        if not right:
            raise ValueError(
                f"{name} has no original: none begins with {Path(name).name[:prefix_length]!r}. "
                "Names of a copy and its original must share their first characters; say how many."
            )
    return found


def copy_accuracy(
    copies: Tensor,
    database: Tensor,
    right_rows: Sequence[Sequence[int]],
    whitening: Whitening | None = None,
    num_results: int = _NUM_RESULTS,
) -> CopyAccuracy:
    """Look for the original of each copy.

    Args:
        copies: (Q, D) descriptors, as of `copy_descriptor`.
        database: (N, D) of the originals, then of the distractors.
        right_rows: Rows of the database that each copy was made of.
        whitening: Learnt from other pictures.
        num_results: Results that count; a right one further down counts as not found.

    Raises:
        ValueError: If there are no copies.
    """
    if not len(copies):
        raise ValueError("There are no copies to look for.")
    if whitening is not None:
        copies, database = whitening.apply(copies), whitening.apply(database)
    indices = find_neighbours(copies, database, num_results).indices
    is_right = torch.zeros(len(copies), len(database), dtype=torch.int8)
    for query, rows in enumerate(right_rows):
        is_right[query, list(rows)] = 1
    counts = is_right.sum(1)
    precision, _ = average_precision(is_right.gather(1, indices), counts)
    return CopyAccuracy(len(copies), float(precision.mean()))
