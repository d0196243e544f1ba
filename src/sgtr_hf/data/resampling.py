"""Shows images with rare predicates more often, and frequent predicates in them less often.

N images, P predicates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ResamplingSettings:
    """How strongly a long tail is lifted.

    Args:
        threshold: Share of all relations below which a predicate counts as rare: images with a
            predicate of the share f come max(1, sqrt(threshold / f)) times. 0 repeats nothing.
        drop_rate: How strongly relations with frequent predicates are left out of repeated images;
            0 leaves all in, so that whole images are resampled alone.

    Source:
        Repeat factors: Gupta et al., LVIS (2019), section 4.2. Both levels: Li et al., Bipartite
        Graph Network with Adaptive Message Passing (2021), whose settings are 0.2 and 1.5 for
        Visual Genome, 0.13 and 1.5 for Open Images. There, factors are rounded once for all
        epochs, and left-out relations are matched without a loss for their predicate; here, the
        rounding is drawn anew for each epoch, and they are as if not annotated.
    """

    threshold: float
    drop_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"`threshold` must be between 0 and 1, got {self.threshold}.")
        if not 0 <= self.drop_rate < float("inf"):
            raise ValueError(f"`drop_rate` must be at least 0, got {self.drop_rate}.")


class Resampling:
    """The rows of each epoch, the same for the same seed and epoch.

    Args:
        predicates: The predicates of each image's relations.
        num_predicates: P.
        settings: How strongly.
        seed: Of the choice of rows and of relations.

    Attributes:
        predicate_factors: (P,) how often images with a predicate come, at least 1.
        image_factors: (N,) the largest factor of an image's predicates, 1 without any.
        num_rows: Rows of an epoch: the sum of the images' factors, rounded.
    """

    def __init__(
        self,
        predicates: Sequence[NDArray[np.int64]],
        num_predicates: int,
        settings: ResamplingSettings,
        seed: int = 0,
    ) -> None:
        self.settings, self.seed = settings, seed
        lengths = np.array([len(row) for row in predicates], dtype=np.int64)
        flat = np.concatenate([*predicates, np.zeros(0, dtype=np.int64)]).astype(np.int64)
        counts = np.bincount(flat, minlength=num_predicates)
        self.predicate_factors = repeat_factors(counts, settings.threshold)
        self.image_factors = np.ones(len(lengths))
        images = np.repeat(np.arange(len(lengths)), lengths)
        np.maximum.at(self.image_factors, images, self.predicate_factors[flat])
        self.num_rows = round(float(self.image_factors.sum()))

    def rows(self, epoch: int) -> NDArray[np.int64]:
        """Return the images of an epoch, (num_rows,), sorted.

        Each image comes its factor's number of times on average over epochs, and in every epoch
        that number rounded down or up: one random offset decides for all, after a shuffle.
        """
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.image_factors))
        ends = np.cumsum(self.image_factors[order])
        # The last end is the whole number of rows, whatever the rounding of the sum.
        ends = np.append(0.0, ends * (self.num_rows / ends[-1]) if len(ends) else ends)
        ends[-1] = self.num_rows
        # Of few digits, so that sums are exact.
        offset = generator.integers(2**20) / 2**20
        counts: NDArray[np.int64] = np.diff(np.floor(ends + offset)).astype(np.int64)
        rows: NDArray[np.int64] = np.sort(np.repeat(order, counts))
        return rows

    def keep(
        self, image: int, predicates: NDArray[np.int64], generator: np.random.Generator
    ) -> NDArray[np.bool_]:
        """Choose the relations of an image that stay this time.

        Args:
            image: Its number.
            predicates: (R,) predicates of its relations.
            generator: Of this row of this epoch.

        Returns:
            (R,) whether each stays.
        """
        probabilities = drop_probabilities(
            self.predicate_factors[predicates],
            float(self.image_factors[image]),
            self.settings.drop_rate,
        )
        stays: NDArray[np.bool_] = generator.uniform(size=len(predicates)) >= probabilities
        return stays


def repeat_factors(counts: NDArray[np.int64], threshold: float) -> NDArray[np.float64]:
    """Return max(1, sqrt(threshold / share)) of each predicate, 1 where there is no relation."""
    shares = counts / max(counts.sum(), 1)
    factors = np.ones(len(counts))
    rare = (shares > 0) & (shares < threshold)
    factors[rare] = np.sqrt(threshold / shares[rare])
    return factors


def drop_probabilities(
    predicate_factors: NDArray[np.float64], image_factor: float, drop_rate: float
) -> NDArray[np.float64]:
    """Return (1 - predicate factor / image factor) * drop rate, between 0 and 1."""
    probabilities: NDArray[np.float64] = (1 - predicate_factors / image_factor) * drop_rate
    return probabilities.clip(0, 1)


def predicates_of(split: datasets.Dataset) -> list[NDArray[np.int64]]:
    """Read the predicates of each image's relations, without opening an image."""
    relations = split.select_columns("relations").with_format("arrow")
    predicates: list[NDArray[np.int64]] = []
    for table in relations.iter(batch_size=1000):
        column = table.column("relations").combine_chunks()
        values = column.flatten().field("predicate").to_numpy(zero_copy_only=False)
        ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
        predicates += np.split(values.astype(np.int64), ends[:-1])
    return predicates
