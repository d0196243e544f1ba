"""What is kept of every image: ranks and counts in compact arrays, never graphs or boxes.

I images, R annotated triplets and K predicted ones of all images.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .entity_overlap import BoolArray, IntArray


AnyArray: TypeAlias = NDArray[Any]

# Of every annotated triplet, of every image, of every prediction kept, and of all together.
TRIPLET_FIELDS = {
    "ranks": np.int32,
    "free_ranks": np.int32,
    "pair_ranks": np.int32,
    "predicates": np.int32,
    "is_unseen": np.bool_,
    "training_counts": np.int32,
}
IMAGE_FIELDS = {"relation_counts": np.int32, "prediction_counts": np.int32}
PREDICTION_FIELDS = {"scores": np.float32, "num_first_hits": np.int16}
TOTAL_FIELDS = {"num_repeated_annotations": np.int64, "num_repeated_predictions": np.int64}
_FIELDS: Mapping[str, type] = TRIPLET_FIELDS | IMAGE_FIELDS | PREDICTION_FIELDS | TOTAL_FIELDS


class MatchRecords:
    """Gathers arrays part by part."""

    def __init__(self) -> None:
        self._parts: dict[str, list[AnyArray]] = {name: [] for name in _FIELDS}

    def add(self, **arrays: AnyArray) -> None:
        """Add what one batch gave, by the names of the fields.

        Numbers of triplets that were not asked for are 0.
        """
        for name, kind in _FIELDS.items():
            length = len(arrays["ranks"]) if name in TRIPLET_FIELDS else 0
            values: AnyArray = arrays.get(name, np.zeros(length))
            self._parts[name].append(values.astype(kind))

    def state_dict(self) -> dict[str, AnyArray]:
        """Return everything gathered so far."""
        state = {}
        for name, kind in _FIELDS.items():
            parts = self._parts[name]
            state[name] = np.concatenate(parts) if parts else np.zeros(0, dtype=kind)
            # One array from now on, so that asking often does not cost more each time.
            self._parts[name] = [state[name]]
        return state

    def merge_state(self, state: Mapping[str, AnyArray]) -> None:
        """Add what the `state_dict` of another process has gathered.

        Raises:
            ValueError: If it is not the state of such records.
        """
        missing = _FIELDS.keys() - state.keys()
        if missing:
            raise ValueError(
                f"The state lacks {', '.join(sorted(missing))}; is it another metric's?"
            )
        self.add(**state)


@dataclass(frozen=True)
class UsedTriplets:
    """Annotated triplets of the images averaged over; `images` counts up from 0 without gaps."""

    images: IntArray
    num_images: int
    fields: Mapping[str, AnyArray]

    def where(self, is_kept: BoolArray) -> "UsedTriplets":
        """Keep some triplets, and the images that have any of them."""
        images = np.unique(self.images[is_kept], return_inverse=True)[1]
        fields = {name: values[is_kept] for name, values in self.fields.items()}
        return UsedTriplets(images, int(images.max(initial=-1)) + 1, fields)

    def is_found(self, ranks: str, k: int) -> BoolArray:
        """(R,) whether each triplet is among the first k, by one of the kinds of ranks."""
        values = self.fields[ranks]
        return (values >= 0) & (values < k)


def used_triplets(state: Mapping[str, AnyArray], *, skip_without_predictions: bool) -> UsedTriplets:
    """Choose the images with annotated triplets and, on request, with predictions."""
    counts = state["relation_counts"]
    is_used = counts > 0
    if skip_without_predictions:
        is_used &= state["prediction_counts"] > 0
    # New numbers for the images used, repeated for each of their triplets.
    numbers = np.cumsum(is_used) - 1
    is_triplet_used = np.repeat(is_used, counts)
    return UsedTriplets(
        images=np.repeat(numbers, counts)[is_triplet_used],
        num_images=int(is_used.sum()),
        fields={name: state[name][is_triplet_used] for name in TRIPLET_FIELDS},
    )
