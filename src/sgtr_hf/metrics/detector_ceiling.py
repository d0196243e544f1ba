"""The recall that a perfect relation head would reach on given detections."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .evaluation_protocols import STRICT, RecallProtocol
from .match_records import MatchRecords, used_triplets
from .recall import count_images, pair_graphs
from .recall_report import CONSTRAINED, RecallAverages, Vocabulary, mean
from .triplet_matching import MISSED, reachable_triplets


class DetectorCeiling:
    """Recall of triplets both of whose entities are among the detections.

    Args:
        id2predicate: Names for the report.
        protocol: Its threshold and kind of overlap count.
    """

    def __init__(
        self,
        id2predicate: Mapping[int, str] | None = None,
        protocol: RecallProtocol = STRICT,
    ) -> None:
        self.vocabulary = Vocabulary(names=id2predicate)
        self.protocol = protocol
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._records = MatchRecords()

    def update(self, entities: Sequence[SceneGraph], references: Sequence[SceneGraph]) -> None:
        """Add images; of `entities` only boxes (or masks) and labels are looked at.

        Raises:
            ValueError: If the lengths or the image sizes differ.
        """
        for detected, reference in pair_graphs(entities, references):
            is_reachable = reachable_triplets(detected, reference, self.protocol)
            self._records.add(
                ranks=np.where(is_reachable, 0, MISSED),
                predicates=reference.relations[:, 2],
                relation_counts=np.array([len(is_reachable)]),
                prediction_counts=np.array([detected.num_entities]),
            )

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        return self._records.state_dict()

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what the `state_dict` of another process has gathered."""
        self._records.merge_state(state)

    def compute(self) -> dict[str, Any]:
        """Return "R", "mR", "per_predicate" and the image counts, as `SceneGraphRecall` does."""
        state = self.state_dict()
        used = used_triplets(state, skip_without_predictions=False)
        averages = RecallAverages(used)
        by_predicate = averages.by_predicate(CONSTRAINED, 1)
        return {
            "R": averages.recall(CONSTRAINED, 1),
            "mR": mean(by_predicate.values()),
            "per_predicate": {
                self.vocabulary.name(predicate): value for predicate, value in by_predicate.items()
            },
            **count_images(state, used.num_images),
        }
