"""Recalls from ranks. Sums are rounded once, so that the order of images changes no bit.

I images, R annotated triplets of all images, P predicates.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..predicate_groups import group_by_frequency
from .entity_overlap import BoolArray, FloatArray, IntArray
from .match_records import UsedTriplets


# Names in reports, and the ranks they follow from.
CONSTRAINED, FREE, PAIR = "ranks", "free_ranks", "pair_ranks"
PREFIXES = {CONSTRAINED: "", FREE: "ng-"}


@dataclass(frozen=True)
class Vocabulary:
    """What a report needs to know of predicates.

    Args:
        num_predicates: P, where known.
        names: Of predicates, where known; others are written as numbers.
        groups: Predicates of each group; by the frequency of the annotations if None.
    """

    num_predicates: int | None = None
    names: Mapping[int, str] | None = None
    groups: Mapping[str, Sequence[int]] | None = None

    def name(self, predicate: int) -> str:
        """Return the name of a predicate, or its number."""
        return (self.names or {}).get(predicate, str(predicate))

    def groups_of(self, counts: Mapping[int, int]) -> Mapping[str, Sequence[int]]:
        """Return the groups, made of the annotated counts if there are none."""
        if self.groups is not None:
            return self.groups
        size = max(self.num_predicates or 0, max(counts, default=-1) + 1)
        return group_by_frequency([counts.get(predicate, 0) for predicate in range(size)])


class ReportKinds(NamedTuple):
    """Which figures a report has.

    Args:
        average_all_predicates: As of `RecallProtocol`.
        is_free_known: Whether matching without graph constraint was asked for.
        is_training_known: Whether unseen triplets are known.
        are_training_counts_known: Whether it is known how rare the seen ones are.
    """

    average_all_predicates: bool
    is_free_known: bool
    is_training_known: bool
    are_training_counts_known: bool


class RecallAverages:
    """All averages over a set of images; the groups of triplets are found once.

    Args:
        triplets: Of the images averaged over.
    """

    def __init__(self, triplets: UsedTriplets) -> None:
        self.triplets = triplets
        predicates = triplets.fields["predicates"].astype(np.int64)
        self.annotated, self.counts = np.unique(predicates, return_counts=True)
        # One group for each image and predicate that occur together.
        keys, self._group_of_triplet = np.unique(
            predicates * max(triplets.num_images, 1) + triplets.images, return_inverse=True
        )
        predicate_of_group = keys // max(triplets.num_images, 1)
        self._first_groups = np.searchsorted(predicate_of_group, self.annotated)

    @property
    def count_of_predicate(self) -> dict[int, int]:
        """How often each predicate is annotated."""
        return dict(zip(self.annotated.tolist(), self.counts.tolist(), strict=True))

    def recall(self, ranks: str, k: int) -> float:
        """Mean over images of the share of their triplets found."""
        is_found = self.triplets.is_found(ranks, k)
        return mean(_shares(is_found, self.triplets.images, self.triplets.num_images))

    def by_predicate(self, ranks: str, k: int) -> dict[int, float]:
        """For each annotated predicate, mean over the images with it of the share found."""
        is_found = self.triplets.is_found(ranks, k)
        num_groups = int(self._group_of_triplet.max(initial=-1)) + 1
        shares = _shares(is_found, self._group_of_triplet, num_groups)
        parts = np.split(shares, self._first_groups[1:]) if len(shares) else []
        return {
            predicate: mean(part)
            for predicate, part in zip(self.annotated.tolist(), parts, strict=True)
        }

    def micro(self, ranks: str, k: int) -> float:
        """Share of all triplets found, whatever their image."""
        is_found = self.triplets.is_found(ranks, k)
        return int(is_found.sum()) / len(is_found) if len(is_found) else math.nan

    def weighted_by_rarity(self, ranks: str, k: int) -> float:
        """Share of all triplets found, each weighted by 1 / (1 + its count in training)."""
        weights = 1.0 / (1.0 + self.triplets.fields["training_counts"])
        total = math.fsum(weights)
        return math.fsum(weights[self.triplets.is_found(ranks, k)]) / total if total else math.nan


def report_recalls(
    triplets: UsedTriplets,
    top_k: Sequence[int],
    vocabulary: Vocabulary,
    kinds: ReportKinds,
) -> dict[str, Any]:
    """Return every recall by name, "per_predicate" and "groups".

    Names are explained in `SceneGraphRecall.compute`.
    """
    averages = RecallAverages(triplets)
    unseen = RecallAverages(triplets.where(triplets.fields["is_unseen"]))
    report: dict[str, Any] = {}
    per_predicate: dict[str, dict[str, float]] = {}
    for ranks in (CONSTRAINED, FREE) if kinds.is_free_known else (CONSTRAINED,):
        prefix = PREFIXES[ranks]
        for k in top_k:
            by_predicate = averages.by_predicate(ranks, k)
            figures = {
                "R": averages.recall(ranks, k),
                **_means_of_predicates(by_predicate, averages, vocabulary, kinds),
                "micro_R": averages.micro(ranks, k),
            }
            figures["F"] = harmonic_mean(figures["R"], figures["mR"])
            if kinds.is_training_known:
                figures["zR"] = unseen.recall(ranks, k)
            if kinds.are_training_counts_known:
                figures["rarity_R"] = averages.weighted_by_rarity(ranks, k)
            if ranks == CONSTRAINED:
                figures["pair_R"] = averages.recall(PAIR, k)
            report |= {f"{prefix}{name}@{k}": value for name, value in figures.items()}
            per_predicate[f"{prefix}R@{k}"] = {
                vocabulary.name(predicate): value for predicate, value in by_predicate.items()
            }
    counts = averages.count_of_predicate
    per_predicate["num_annotated"] = {
        vocabulary.name(predicate): count for predicate, count in counts.items()
    }
    groups = {
        name: [vocabulary.name(predicate) for predicate in members]
        for name, members in vocabulary.groups_of(counts).items()
    }
    return report | {"per_predicate": per_predicate, "groups": groups}


def _means_of_predicates(
    by_predicate: Mapping[int, float],
    averages: RecallAverages,
    vocabulary: Vocabulary,
    kinds: ReportKinds,
) -> dict[str, float]:
    """Return the mean recalls: of all, of the annotated, of groups, and weighted by frequency."""
    counts = averages.count_of_predicate
    figures = {"mR_occurring": mean(by_predicate.values())}
    if vocabulary.num_predicates is not None:
        total = math.fsum(by_predicate.values())
        figures["mR_all"] = total / vocabulary.num_predicates if by_predicate else math.nan
    figures["mR"] = figures["mR_all" if kinds.average_all_predicates else "mR_occurring"]
    for name, members in vocabulary.groups_of(counts).items():
        chosen = members if kinds.average_all_predicates else by_predicate.keys() & {*members}
        figures[f"mR_{name}"] = mean(by_predicate.get(predicate, 0.0) for predicate in chosen)
    weighted = (counts[predicate] * value for predicate, value in by_predicate.items())
    figures["wR"] = math.fsum(weighted) / sum(counts.values()) if counts else math.nan
    return figures


def mean(values: Iterable[float] | FloatArray) -> float:
    """Return the mean with one rounding of the sum; NaN of nothing."""
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def harmonic_mean(first: float, second: float) -> float:
    """Return the harmonic mean of two numbers that are not negative; 0 if both are 0."""
    total = first + second
    return 2 * first * second / total if total else 0.0


def _shares(is_found: BoolArray, groups: IntArray, num_groups: int) -> FloatArray:
    """Return the share of found members of groups 0, 1, ..., none of which is empty."""
    found = np.bincount(groups, weights=is_found, minlength=num_groups)
    shares: FloatArray = found / np.bincount(groups, minlength=num_groups)
    return shares
