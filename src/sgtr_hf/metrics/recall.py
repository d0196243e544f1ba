"""Recall of scene graphs, gathered image by image.

I images, R annotated triplets of all images, P predicates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .entity_overlap import BoolArray, IntArray
from .evaluation_protocols import (
    MODES,
    Mode,
    RecallProtocol,
    check_choice,
    resolve_protocol,
)
from .graph_batch import join_graphs, triplet_probabilities, with_given_entities
from .match_records import MatchRecords, used_triplets
from .recall_report import ReportKinds, Vocabulary, report_recalls
from .training_triplets import TrainingTriplets
from .triplet_matching import (
    TripletMatches,
    best_cells,
    check_image_sizes,
    entity_agreement,
    match_triplets,
)
from .triplet_precision import report_precision


# Images matched at once: enough to share the cost of a call, few enough to take little memory.
BATCH_IMAGES = 64


@dataclass(frozen=True)
class Measured:
    """What a `SceneGraphRecall` measures beside the recall under its protocol.

    Args:
        mode: "sgdet" finds entities and relations; "sgcls" is given the annotated boxes, in their
            order; "predcls" their classes too.
        no_constraint: ng-R and its kin, from `predicate_distributions` or, where graphs have none,
            from their relations as they are.
        precision: Precision, F1 and calibration of triplets; keeps every score.
        threshold: Least score of triplets whose precision, recall and F1 are reported.
    """

    mode: Mode = "sgdet"
    no_constraint: bool = True
    precision: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, MODES)


class SceneGraphRecall:
    """R@K and everything else that follows from the rank at which each triplet is first found.

    Keeps a few numbers for each annotated triplet, never graphs or boxes. Sums do not depend on
    the order of images, so that processes together give what one gives, to the last bit.

    Args:
        top_k: Numbers of predictions looked at.
        protocol: "strict", "scene_graph_benchmark", "egtr", "as_emitted" or a `RecallProtocol`.
        num_predicates: P; needed if the protocol averages over all predicates.
        id2predicate: Names for the report, where a predicate without name is its number.
        seen_triplets: Triplets of the training annotations (`count_training_triplets`), or their
            (S, 3) classes of subject and object, and predicate; gives the zero-shot recall.
        predicate_groups: Predicates of each group whose mean recall is reported; head, body and
            tail by the frequency of the annotations if None.
        measured: Task, and what else to measure.

    Raises:
        ValueError: If `top_k` is empty or not positive, `protocol` is unknown, or `num_predicates`
            is missing.

    Example:
        ```python
        metric = SceneGraphRecall(top_k=(20, 50))
        metric.update(predictions, references)
        metric.compute()["R@50"]
        ```
    """

    def __init__(
        self,
        top_k: Sequence[int] = (20, 50, 100),
        protocol: str | RecallProtocol = "strict",
        num_predicates: int | None = None,
        id2predicate: Mapping[int, str] | None = None,
        seen_triplets: TrainingTriplets | IntArray | None = None,
        predicate_groups: Mapping[str, Sequence[int]] | None = None,
        measured: Measured | None = None,
    ) -> None:
        if not top_k or min(top_k) < 1:
            raise ValueError(f"`top_k` must hold positive numbers, got {tuple(top_k)}.")
        self.top_k = tuple(top_k)
        self.protocol = resolve_protocol(protocol)
        if self.protocol.average_all_predicates and num_predicates is None:
            raise ValueError(
                "`num_predicates` is needed by a protocol that averages over all predicates; "
                'pass it or take `protocol="strict"`.'
            )
        self.vocabulary = Vocabulary(num_predicates, id2predicate, predicate_groups)
        if isinstance(seen_triplets, np.ndarray):
            seen_triplets = TrainingTriplets(seen_triplets)
        self.seen_triplets = seen_triplets
        self.measured = measured or Measured()
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._records = MatchRecords()
        self._waiting: list[tuple[SceneGraph, SceneGraph, BoolArray | None]] = []
        self._knows_distributions: bool | None = None

    def update(self, predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]) -> None:
        """Add images.

        Args:
            predictions: One graph an image, triplets best first.
            references: The annotated graphs of the same images in the same order.

        Raises:
            ValueError: If the lengths or the image sizes differ, a predicate is not below
                `num_predicates`, masks that are to be compared are missing, or some graphs have
                `predicate_distributions` and others not.
        """
        for prediction, reference in pair_graphs(predictions, references):
            check_image_sizes(prediction, reference)
            _check_predicates(reference, self.vocabulary.num_predicates)
            prediction = with_given_entities(prediction, reference, self.measured.mode)
            self._check_distributions(prediction)
            agreement = None
            if self.protocol.overlap == "masks":
                agreement = entity_agreement(prediction, reference, self.protocol)
            self._waiting.append((prediction, reference, agreement))
            if len(self._waiting) >= BATCH_IMAGES:
                self._match()

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return everything gathered so far as arrays, to be sent to another process."""
        self._match()
        return self._records.state_dict()

    def merge_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Add what the `state_dict` of another process, with the same settings, has gathered.

        An image that two processes have seen counts twice: do not pad the last batch.

        Raises:
            ValueError: If it is the state of another metric.
        """
        self._records.merge_state(state)

    def merge(self, other: "SceneGraphRecall") -> None:
        """Add what another metric has gathered.

        Raises:
            ValueError: If the protocols, or what is measured, differ.
        """
        for name in ("protocol", "measured"):
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                raise ValueError(f"`other.{name}` must be {own} to be merged, got {others}.")
        self.merge_state(other.state_dict())

    def compute(self) -> dict[str, Any]:
        """Return the metrics of all images so far, as decimals from 0 to 1.

        Returns:
            Each with "@K", and with "ng-" before it without graph constraint:

            - "R": mean over images of the share of their triplets found.
            - "mR": for each predicate the mean over images with it of the share found, averaged
              over predicates: over "all" or those "occurring" in the annotations, as the protocol
              says; "mR_all", "mR_occurring", and "mR_head", "mR_body", "mR_tail" of groups.
            - "F": harmonic mean of R and mR.
            - "wR": the recalls of predicates weighted by how often they are annotated.
            - "micro_R": share of all triplets, whatever their image.
            - "pair_R": as R, whatever predicate the pair was given (not without constraint).
            - "zR": R of the triplets that training never had, over images that have any.
            - "rarity_R": share of all triplets, each weighted by 1 / (1 + its count in training)
              (Knyazev et al., BMVC 2020).

            Without "@K": "per_predicate": {"R@K": {predicate: recall}} of the annotated ones, with
            "num_annotated"; "groups": {"head": predicates}; "precision" on request (see
            `report_precision`); the settings "protocol", "mode" and "unit"; and the counts
            "num_images" (averaged over), "num_images_without_relations" (left out),
            "num_images_without_predictions" (left out or 0, as the protocol says),
            "num_relations", "num_predictions", "num_repeated_annotations",
            "num_repeated_predictions", "num_predicates" (averaged over) and
            "num_predicates_annotated". A mean over nothing is NaN.
        """
        state = self.state_dict()
        used = used_triplets(
            state, skip_without_predictions=self.protocol.skip_images_without_predictions
        )
        training = self.seen_triplets
        kinds = ReportKinds(
            average_all_predicates=self.protocol.average_all_predicates,
            is_free_known=self.measured.no_constraint,
            is_training_known=training is not None,
            are_training_counts_known=training is not None and training.has_counts,
        )
        report = report_recalls(used, self.top_k, self.vocabulary, kinds)
        if self.measured.precision:
            report["precision"] = report_precision(
                state["scores"],
                state["num_first_hits"],
                len(used.images),
                self.measured.threshold,
            )
        num_annotated = len(np.unique(used.fields["predicates"]))
        num_averaged = self.vocabulary.num_predicates
        if not self.protocol.average_all_predicates or num_averaged is None:
            num_averaged = num_annotated
        return {
            **report,
            "protocol": asdict(self.protocol),
            "mode": self.measured.mode,
            "unit": "decimal",
            **count_images(state, used.num_images),
            "num_relations": len(used.images),
            "num_predictions": int(state["prediction_counts"].sum()),
            "num_repeated_annotations": int(state["num_repeated_annotations"].sum()),
            "num_repeated_predictions": int(state["num_repeated_predictions"].sum()),
            "num_predicates": num_averaged,
            "num_predicates_annotated": num_annotated,
        }

    def _match(self) -> None:
        """Match the images that wait, and keep the ranks."""
        if not self._waiting:
            return
        predictions, references, agreements = zip(*self._waiting, strict=True)
        self._waiting = []
        matches = match_triplets(
            predictions,
            references,
            self.protocol,
            free_places=max(self.top_k) if self.measured.no_constraint else 0,
            agreements=agreements if self.protocol.overlap == "masks" else None,
        )
        self._records.add(**self._fields(matches))

    def _fields(self, matches: TripletMatches) -> dict[str, NDArray[Any]]:
        num_triplets, training = len(matches.triplets), self.seen_triplets
        # Nothing is known of predictions where nothing is annotated.
        is_kept = np.repeat(matches.relation_counts > 0, matches.kept_counts)
        is_kept &= self.measured.precision
        return {
            "ranks": matches.ranks,
            "free_ranks": matches.free_ranks,
            "pair_ranks": matches.pair_ranks,
            "predicates": matches.triplets[:, 2],
            "is_unseen": (
                np.zeros(num_triplets, dtype=np.bool_)
                if training is None
                else training.is_unseen(matches.triplets)
            ),
            "training_counts": (
                np.zeros(num_triplets) if training is None else training.count(matches.triplets)
            ),
            "relation_counts": matches.relation_counts,
            "prediction_counts": matches.prediction_counts,
            "scores": matches.scores[is_kept],
            "num_first_hits": matches.num_first_hits[is_kept],
            "num_repeated_annotations": np.array([matches.num_repeated_annotations]),
            "num_repeated_predictions": np.array([matches.num_repeated_predictions]),
        }

    def _check_distributions(self, prediction: SceneGraph) -> None:
        """Never mix two rules for what the recall without constraint ranks."""
        if not prediction.num_relations or not self.measured.no_constraint:
            return
        is_known = prediction.predicate_distributions is not None
        if self._knows_distributions not in (None, is_known):
            raise ValueError(
                "`predicate_distributions` must be in all predictions or in none, as they decide "
                "what the recall without graph constraint ranks; pass "
                "`measured=Measured(no_constraint=False)` to do without it."
            )
        self._knows_distributions = is_known


def without_constraint(graph: SceneGraph, top_k: int = 100) -> SceneGraph:
    """Let every relation say each predicate, and keep the best.

    The score of a row is subject score x object score x probability of the predicate.

    Args:
        graph: With `predicate_distributions`.
        top_k: Rows to keep.

    Raises:
        ValueError: If the graph has no distributions.
    """
    if graph.predicate_distributions is None:
        raise ValueError("`graph.predicate_distributions` are needed, this graph has none.")
    batch = join_graphs([graph])
    scores = triplet_probabilities(batch, graph.predicate_distributions)
    cells, _ = best_cells(scores, batch.relation_counts, top_k)
    rows, predicates = np.unravel_index(cells, scores.shape)
    return replace(
        graph,
        relations=np.column_stack((graph.relations[rows, :2], predicates)),
        relation_scores=scores.ravel()[cells].astype(np.float32),
        predicate_distributions=None,
    )


def pair_graphs(
    predictions: Sequence[SceneGraph], references: Sequence[SceneGraph]
) -> list[tuple[SceneGraph, SceneGraph]]:
    """Return prediction and reference of each image.

    Raises:
        ValueError: If the lengths differ.
    """
    if len(predictions) != len(references):
        raise ValueError(
            "`predictions` and `references` must hold one graph for each image, got "
            f"{len(predictions)} and {len(references)}."
        )
    return list(zip(predictions, references, strict=True))


def count_images(state: Mapping[str, NDArray[Any]], num_used: int) -> dict[str, int]:
    """Return how many images are averaged over, and how many have nothing to average."""
    has_relations = state["relation_counts"] > 0
    has_predictions = state["prediction_counts"] > 0
    return {
        "num_images": num_used,
        "num_images_without_relations": int((~has_relations).sum()),
        "num_images_without_predictions": int((has_relations & ~has_predictions).sum()),
    }


def _check_predicates(reference: SceneGraph, num_predicates: int | None) -> None:
    if num_predicates is None or not len(reference.relations):
        return
    largest = int(reference.relations[:, 2].max())
    if largest >= num_predicates:
        raise ValueError(
            f"`num_predicates` is {num_predicates}, but a reference has predicate {largest}; "
            "predicates count from 0."
        )
