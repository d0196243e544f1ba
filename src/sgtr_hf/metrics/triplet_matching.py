"""The one matching of triplets from which every scene graph metric follows.

For each annotated triplet it finds the rank of the first prediction that hits it, under the graph
constraint, without it, and for its pair alone. B images of a batch, E predicted entities, T
annotated entities, K predicted triplets, R annotated triplets, P predicates, N candidates: pairs of
an annotated and a predicted triplet of one image whose classes of subject and object agree.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..scene_graph import SceneGraph
from .entity_overlap import BoolArray, FloatArray, IntArray, box_overlap, mask_overlap
from .evaluation_protocols import STRICT, RecallProtocol
from .graph_batch import (
    LABEL_LIMIT,
    GraphBatch,
    find_equal,
    join_graphs,
    triplet_keys,
    triplet_probabilities,
)


MISSED = -1
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class TripletMatches:
    """What the matching of a batch found.

    Args:
        ranks: (R,) place, from 0, of the first prediction that hits; -1 where none does.
        free_ranks: (R,) the same without graph constraint, -1 also beyond the places looked at.
        pair_ranks: (R,) the same for any predicate of the right pair.
        triplets: (R, 3) annotated classes of subject and object, and predicate.
        relation_counts: (B,) annotated triplets.
        prediction_counts: (B,) predicted triplets, before any is left out.
        num_repeated_annotations: Annotated triplets that say the same of the same entities again.
        num_repeated_predictions: Predicted ones that do.
        kept_counts: (B,) predictions that the graph constraint keeps.
        scores: (K',) their scores.
        num_first_hits: (K',) of how many annotated triplets each is the first hit.
    """

    ranks: IntArray
    free_ranks: IntArray
    pair_ranks: IntArray
    triplets: IntArray
    relation_counts: IntArray
    prediction_counts: IntArray
    num_repeated_annotations: int
    num_repeated_predictions: int
    kept_counts: IntArray
    scores: NDArray[np.float32]
    num_first_hits: IntArray


class _Ranking(NamedTuple):
    """Predictions in the order and number that a protocol lets count."""

    rows: IntArray
    """Those kept, best first within their image."""
    places: IntArray
    """(K,) rank in the image; -1 where left out."""
    predicates: IntArray
    """(K,) what each is taken to say."""


def match_triplets(
    predictions: Sequence[SceneGraph],
    references: Sequence[SceneGraph],
    protocol: RecallProtocol = STRICT,
    *,
    free_places: int = 0,
    agreements: Sequence[BoolArray] | None = None,
) -> TripletMatches:
    """Match the predictions of a batch with the annotations, once for all metrics.

    A predicted triplet hits an annotated one if subject label, predicate and object label agree and
    both entities overlap enough. One prediction may hit several annotated triplets and the other
    way round. An annotated triplet is found among the first k predictions if its rank is in [0, k).

    Args:
        predictions: B graphs.
        references: The annotated graphs of the same images, in the same pixels.
        protocol: Overlap, graph constraint and order.
        free_places: Predictions without graph constraint to look at in each image; 0 for none.
        agreements: For each image (E, T) bool which entities overlap enough, as by masks; computed
            from the boxes if None.

    Raises:
        ValueError: If the distributions have no column for an annotated predicate.

    Source:
        Recall of Lu et al. (ECCV 2016) in the form of Neural Motifs (Zellers et al., CVPR 2018).
    """
    predicted, annotated = join_graphs(predictions), join_graphs(references)
    pair_of_row = _number_pairs(predicted)
    ranking = _rank_rows(predicted, pair_of_row, protocol)
    references_, rows = _candidates(predicted, annotated)
    is_hit = _overlap_enough(predicted, annotated, (references_, rows), protocol, agreements)
    hits = _Hits(references_[is_hit], rows[is_hit], len(annotated.relations))
    # Rows left out are no hits; a kept row of the same pair is.
    is_kept = ranking.places[hits.rows] >= 0
    says_so = ranking.predicates[hits.rows] == annotated.relations[hits.references, 2]
    ranks, first_rows = hits.first(ranking.places, is_kept & says_so)
    num_first_hits = np.bincount(first_rows, minlength=len(predicted.relations))
    return TripletMatches(
        ranks=ranks,
        free_ranks=_free_ranks(predicted, annotated, hits, pair_of_row, protocol, free_places),
        pair_ranks=hits.first(ranking.places, is_kept)[0],
        triplets=annotated.labelled_triplets(),
        relation_counts=annotated.relation_counts,
        prediction_counts=predicted.relation_counts,
        num_repeated_annotations=_count_repeats(annotated, _number_pairs(annotated)),
        num_repeated_predictions=_count_repeats(predicted, pair_of_row),
        kept_counts=np.bincount(
            predicted.relation_images[ranking.rows], minlength=len(predictions)
        ),
        scores=predicted.relation_scores[ranking.rows],
        num_first_hits=num_first_hits[ranking.rows],
    )


def rank_of_first_hit(
    prediction: SceneGraph, reference: SceneGraph, protocol: RecallProtocol = STRICT
) -> IntArray:
    """Return (R,) the rank at which each annotated triplet of one image is first found.

    Args:
        prediction: E entities and K triplets.
        reference: T entities and R triplets of the same image, boxes in the same pixels.
        protocol: See `match_triplets`.

    Returns:
        (R,) int64 ranks from 0; -1 where no prediction hits.

    Raises:
        ValueError: If the graphs are of images of other sizes, or lack masks to be compared.
    """
    check_image_sizes(prediction, reference)
    agreements = None
    if protocol.overlap == "masks":
        agreements = [entity_agreement(prediction, reference, protocol)]
    return match_triplets([prediction], [reference], protocol, agreements=agreements).ranks


def entity_agreement(
    prediction: SceneGraph, reference: SceneGraph, protocol: RecallProtocol = STRICT
) -> BoolArray:
    """Tell which predicted entity has the label and the place of which annotated one.

    Args:
        prediction: E entities.
        reference: T entities of the same image.
        protocol: Threshold and kind of overlap.

    Returns:
        (E, T) bool.

    Raises:
        ValueError: If the graphs are of images of other sizes, or lack masks to be compared.
    """
    check_image_sizes(prediction, reference)
    is_alike: BoolArray = prediction.labels[:, None] == reference.labels[None, :]
    if protocol.overlap == "masks":
        first, second = _masks_of(prediction, "prediction"), _masks_of(reference, "reference")
        overlap = mask_overlap(first, second)
    else:
        boxes = prediction.boxes_xyxy[:, None], reference.boxes_xyxy[None]
        overlap = box_overlap(*boxes, protocol.overlap)
    return is_alike & (overlap >= protocol.iou_threshold)


def reachable_triplets(
    entities: SceneGraph, reference: SceneGraph, protocol: RecallProtocol = STRICT
) -> BoolArray:
    """Tell which annotated triplets have both entities among the detections.

    No relation head on top of these detections can find any other triplet. Arguments and errors are
    those of `entity_agreement`.

    Returns:
        (R,) bool.
    """
    is_detected = np.asarray(entity_agreement(entities, reference, protocol).any(axis=0))
    return is_detected[reference.relations[:, 0]] & is_detected[reference.relations[:, 1]]


def check_image_sizes(prediction: SceneGraph, reference: SceneGraph) -> None:
    """Raise ValueError if boxes of one graph are in pixels of another size than the other's."""
    if prediction.image_size != reference.image_size:
        raise ValueError(
            f"`prediction.image_size` is {prediction.image_size} but `reference.image_size` is "
            f"{reference.image_size}; pass the original sizes as `target_sizes` to post-processing."
        )


def best_cells(scores: FloatArray, counts: IntArray, places: int) -> tuple[IntArray, IntArray]:
    """Rank the cells of a table within each image, equal ones in reading order.

    Args:
        scores: (K, P), the rows of an image behind each other; minus infinity is left out.
        counts: (B,) rows of each image.
        places: Most cells of an image to rank.

    Returns:
        Cells of the flattened table, and the rank of each, from 0.
    """
    width = scores.shape[1]
    longest = int(counts.max(initial=0)) * width
    if not longest:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    places = min(places, longest)
    is_cell = np.arange(longest)[None] < (counts * width)[:, None]
    table = np.full((len(counts), longest), np.inf)
    table[is_cell] = -scores.ravel()
    best = np.sort(np.argpartition(table, places - 1, axis=1)[:, :places], axis=1)
    values = np.take_along_axis(table, best, axis=1)
    # Where cells are equal to the last one taken, partitioning has taken any of them.
    is_tied = (table <= values.max(axis=1, keepdims=True)).sum(axis=1) > places
    best[is_tied] = np.argsort(table[is_tied], axis=1, kind="stable")[:, :places]
    values = np.take_along_axis(table, best, axis=1)
    order = np.argsort(values, axis=1, kind="stable")
    best = np.take_along_axis(best, order, axis=1)
    first_cells = (np.cumsum(counts) - counts) * width
    is_real = np.isfinite(np.take_along_axis(table, best, axis=1))
    ranks = np.broadcast_to(np.arange(places), best.shape)
    return (best + first_cells[:, None])[is_real], ranks[is_real]


class _Hits(NamedTuple):
    """Annotated triplets and predicted rows whose entities agree, sorted by annotated triplet."""

    references: IntArray
    rows: IntArray
    num_references: int

    def first(self, places: IntArray, is_valid: BoolArray) -> tuple[IntArray, IntArray]:
        """Return (R,) the least place of valid hits, or -1, and the rows at these places."""
        ranks = np.full(self.num_references, MISSED, dtype=np.int64)
        rows = self.rows[is_valid]
        if not len(rows):
            return ranks, rows
        references = self.references[is_valid]
        order = np.lexsort((places[rows], references))
        references, rows = references[order], rows[order]
        is_first = np.ones(len(rows), dtype=np.bool_)
        is_first[1:] = references[1:] != references[:-1]
        ranks[references[is_first]] = places[rows[is_first]]
        return ranks, rows[is_first]


def _number_pairs(batch: GraphBatch) -> IntArray:
    """(K,) one number for each ordered pair of entities."""
    pairs: IntArray = batch.relations[:, 0] * len(batch.labels) + batch.relations[:, 1]
    return pairs


def _rank_rows(batch: GraphBatch, pair_of_row: IntArray, protocol: RecallProtocol) -> _Ranking:
    predicates = batch.relations[:, 2]
    if protocol.graph_constraint == "row" and batch.distributions is not None:
        predicates = batch.distributions.argmax(axis=1)
    rows = _ordered_rows(batch, protocol)
    if protocol.graph_constraint == "pair":
        rows = _first_of_each(pair_of_row, rows)
    return _Ranking(rows, _places(batch, rows), predicates)


def _ordered_rows(batch: GraphBatch, protocol: RecallProtocol) -> IntArray:
    """(K,) rows image by image, in the order that counts."""
    scores, images = batch.relation_scores, batch.relation_images
    is_sorted = (scores[1:] <= scores[:-1]) | (images[1:] != images[:-1])
    if not protocol.rank_by_score or is_sorted.all():
        return np.arange(len(scores))
    return np.lexsort((-scores, images))


def _first_of_each(keys: IntArray, rows: IntArray) -> IntArray:
    """Keep the first row of each key, in the order of the rows."""
    first = np.unique(keys[rows], return_index=True)[1]
    return rows if len(first) == len(rows) else rows[np.sort(first)]


def _places(batch: GraphBatch, rows: IntArray) -> IntArray:
    """(K,) rank in the image of each row listed; -1 for others."""
    images = batch.relation_images[rows]
    counts = np.bincount(images, minlength=len(batch.relation_counts))
    first = np.cumsum(counts) - counts
    places = np.full(len(batch.relations), MISSED, dtype=np.int64)
    places[rows] = np.arange(len(rows)) - first[images]
    return places


def _candidates(predicted: GraphBatch, annotated: GraphBatch) -> tuple[IntArray, IntArray]:
    """Return (N,) annotated triplets and (N,) rows of the same image and the same two classes."""
    keys, wanted = (
        triplet_keys(np.column_stack((batch.relation_images, batch.labels[batch.relations[:, :2]])))
        for batch in (predicted, annotated)
    )
    return find_equal(keys, wanted)


def _overlap_enough(
    predicted: GraphBatch,
    annotated: GraphBatch,
    candidates: tuple[IntArray, IntArray],
    protocol: RecallProtocol,
    agreements: Sequence[BoolArray] | None,
) -> BoolArray:
    """(N,) whether both entities of each candidate overlap enough."""
    references, rows = candidates
    # (N, 2) subject and object as rows of the entity arrays.
    ends, wanted = predicted.relations[rows, :2], annotated.relations[references, :2]
    if agreements is not None:
        images = predicted.relation_images[rows]
        is_alike = _look_up(agreements, (predicted, annotated), images, (ends, wanted))
    else:
        overlap = box_overlap(predicted.boxes[ends], annotated.boxes[wanted], protocol.overlap)
        is_alike = overlap >= protocol.iou_threshold
    return np.asarray(is_alike.all(axis=1))


def _look_up(
    agreements: Sequence[BoolArray],
    batches: tuple[GraphBatch, GraphBatch],
    images: IntArray,
    entities: tuple[IntArray, IntArray],
) -> BoolArray:
    """(N, 2) entries of the images' (E, T) tables."""
    cells = np.concatenate([agreement.ravel() for agreement in agreements])
    counts = [batch.entity_counts for batch in batches]
    sizes = counts[0] * counts[1]
    first_cells = np.cumsum(sizes) - sizes
    local = [
        rows - (np.cumsum(count) - count)[images][:, None]
        for rows, count in zip(entities, counts, strict=True)
    ]
    found: BoolArray = cells[
        first_cells[images][:, None] + local[0] * counts[1][images][:, None] + local[1]
    ]
    return found


def _free_ranks(
    predicted: GraphBatch,
    annotated: GraphBatch,
    hits: _Hits,
    pair_of_row: IntArray,
    protocol: RecallProtocol,
    places: int,
) -> IntArray:
    """(R,) ranks among all predicates of all pairs; among the rows if no probabilities are known.

    Several rows of one pair say its predicates once, with the best score, if repeats are dropped.
    """
    if not places:
        return np.full(hits.num_references, MISSED, dtype=np.int64)
    wanted = annotated.relations[hits.references, 2]
    if predicted.distributions is None:
        rows = _ordered_rows(predicted, protocol)
        if protocol.drop_repeats:
            rows = _first_of_each(_number_triplets(predicted, pair_of_row), rows)
        listed = _places(predicted, rows)
        is_valid = (listed[hits.rows] >= 0) & (listed[hits.rows] < places)
        is_valid &= predicted.relations[hits.rows, 2] == wanted
        return hits.first(listed, is_valid)[0]
    scores = triplet_probabilities(predicted, predicted.distributions)
    _check_columns(annotated, scores.shape[1])
    if protocol.drop_repeats:
        scores = _without_repeats(scores, pair_of_row)
    cells, ranks = best_cells(scores, predicted.relation_counts, places)
    rank_of_cell = np.full(scores.size, MISSED, dtype=np.int64)
    rank_of_cell[cells] = ranks
    # A hit's pair may have its rank in another of its rows, which is a hit as well.
    return _least(rank_of_cell[hits.rows * scores.shape[1] + wanted], hits)


def _least(ranks_of_hits: IntArray, hits: _Hits) -> IntArray:
    """(R,) the least rank of the hits of each annotated triplet, or -1."""
    least = np.full(hits.num_references, _NEVER)
    np.minimum.at(least, hits.references, np.where(ranks_of_hits < 0, _NEVER, ranks_of_hits))
    return np.where(least == _NEVER, MISSED, least)


def _without_repeats(scores: FloatArray, pair_of_row: IntArray) -> FloatArray:
    """Leave each predicate of a pair to the row that gives it most, the first of equal ones.

    Returns:
        (K, P) scores, minus infinity where another row says the same.
    """
    pairs, counts = np.unique(pair_of_row, return_counts=True)
    if len(pairs) == len(pair_of_row):
        return scores
    is_repeated = np.isin(pair_of_row, pairs[counts > 1])
    rows = np.flatnonzero(is_repeated)
    rows = rows[np.argsort(pair_of_row[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(pair_of_row[rows], prepend=-1))
    lengths = np.diff(starts, append=len(rows))
    is_best = scores[rows] == np.repeat(np.maximum.reduceat(scores[rows], starts), lengths, axis=0)
    # How many equal ones a pair has had so far, this row included.
    places = np.cumsum(is_best, axis=0)
    before = places[starts] - is_best[starts]
    is_best &= places - np.repeat(before, lengths, axis=0) == 1
    scores = scores.copy()
    scores[rows] = np.where(is_best, scores[rows], -np.inf)
    return scores


def _number_triplets(batch: GraphBatch, pair_of_row: IntArray) -> IntArray:
    """(K,) one number for each subject, object and predicate."""
    numbers: IntArray = pair_of_row * LABEL_LIMIT + batch.relations[:, 2]
    return numbers


def _count_repeats(batch: GraphBatch, pair_of_row: IntArray) -> int:
    numbers = _number_triplets(batch, pair_of_row)
    return len(numbers) - len(np.unique(numbers))


def _check_columns(annotated: GraphBatch, num_columns: int) -> None:
    largest = int(annotated.relations[:, 2].max(initial=-1))
    if largest >= num_columns:
        raise ValueError(
            f"`predicate_distributions` have {num_columns} columns, but predicate {largest} is "
            "annotated; predicates count from 0."
        )


def _masks_of(graph: SceneGraph, role: str) -> BoolArray:
    if graph.masks is None:
        raise ValueError(f"The {role} has no `masks`, which are to be compared.")
    return graph.masks
