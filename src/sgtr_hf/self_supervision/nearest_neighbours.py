"""Classification by weighted nearest neighbours, the first evaluation of DINO.

Q queries, M features of the bank, D features, K neighbours, C classes.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


# Rows and columns of the similarities that are held at once: 64 MB in float32.
_QUERY_ROWS = 250
_BANK_ROWS = 65536
# Similarities of which the best are looked for among the largest of each group alone.
_GROUP = 16


class Neighbours(NamedTuple):
    """The nearest of the bank, best first."""

    similarities: Tensor
    """(Q, K) cosines."""
    indices: Tensor
    """(Q, K) int64 rows of the bank."""


class NeighbourAccuracy(NamedTuple):
    """How often the class is right."""

    neighbours: int
    """Asked for; a smaller bank is used whole."""
    top1: float
    top5: float
    """The right class is among the five best (or all, if there are fewer)."""


def find_neighbours(
    queries: Tensor, bank: Tensor | Iterable[Tensor], num_neighbours: int
) -> Neighbours:
    """Find the features of largest cosine similarity, exactly.

    Args:
        queries: (Q, D), of any length.
        bank: (M, D), or its parts one after the other, which need not fit into memory together.
        num_neighbours: K; all of a bank that has fewer.

    Raises:
        ValueError: If the bank is empty, widths differ or K is below 1.
    """
    if num_neighbours < 1:
        raise ValueError(f"`num_neighbours` must be at least 1, got {num_neighbours}.")
    queries = normalize(queries.float(), dim=1)
    parts = [bank] if isinstance(bank, Tensor) else bank
    best = Neighbours(queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0).long())
    first = 0
    for part in itertools.chain.from_iterable(part.split(_BANK_ROWS) for part in parts):
        if part.shape[1] != queries.shape[1]:
            raise ValueError(
                f"Queries have {queries.shape[1]} features, the bank {part.shape[1]}; both must "
                "come from one model."
            )
        found = _nearest_of_part(queries, normalize(part.float(), dim=1), num_neighbours)
        best = _merge(best, Neighbours(found.similarities, found.indices + first), num_neighbours)
        first += len(part)
    if not first:
        raise ValueError("The bank has no features to compare with.")
    return best


def vote(
    neighbours: Neighbours,
    bank_labels: Tensor,
    num_neighbours: int,
    num_classes: int,
    temperature: float = 0.07,
) -> Tensor:
    """Add up what the neighbours say.

    Args:
        neighbours: At least `num_neighbours` of them, or the whole bank.
        bank_labels: (M,) classes from 0.
        num_neighbours: How many may vote.
        num_classes: C.
        temperature: A vote counts exp(similarity / temperature).

    Returns:
        (Q, C) votes.
    """
    similarities = neighbours.similarities[:, :num_neighbours]
    classes = bank_labels[neighbours.indices[:, :num_neighbours]]
    # Divided by the largest, which changes no order and cannot overflow.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    return similarities.new_zeros(len(similarities), num_classes).scatter_add_(1, classes, weights)


def neighbour_accuracy(
    queries: tuple[Tensor, Tensor],
    bank: tuple[Tensor, Tensor],
    neighbour_counts: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> list[NeighbourAccuracy]:
    """Classify pictures by those they resemble.

    Args:
        queries: Features (Q, D) and classes (Q,).
        bank: Features (M, D) and classes (M,) of the training images.
        neighbour_counts: Each K to report; one search serves all.
        temperature: Of the votes.

    Returns:
        The accuracies of each K, in order.

    Raises:
        ValueError: If a picture has no class, there are no queries, or the temperature is not
            positive.

    Source:
        Wu et al. 2018, section 3.4, and DINO's `eval_knn.py`.
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    (query_vectors, query_labels), (bank_vectors, bank_labels) = queries, bank
    for name, labels in (("queries", query_labels), ("bank", bank_labels)):
        if not len(labels):
            raise ValueError(f"The {name} are empty.")
        if labels.min() < 0:
            raise ValueError(
                f"{int((labels < 0).sum())} pictures of the {name} have no class; put images into "
                "one sub-folder a class, or name the column of classes."
            )
    neighbours = find_neighbours(query_vectors, bank_vectors, max(neighbour_counts))
    # A class that the bank lacks can be asked for, but never be said.
    num_classes = int(max(query_labels.max(), bank_labels.max())) + 1
    results = []
    for count in neighbour_counts:
        votes = vote(neighbours, bank_labels, count, num_classes, temperature)
        # With fewer than five votes, the rest of five classes would be chance.
        ranked = votes.topk(min(5, count, num_classes), dim=1).indices
        is_right = ranked == query_labels[:, None]
        top1, top5 = is_right[:, 0].float().mean(), is_right.any(1).float().mean()
        results.append(NeighbourAccuracy(count, float(top1), float(top5)))
    return results


def _nearest_of_part(queries: Tensor, part: Tensor, count: int) -> Neighbours:
    """Search a part of the bank; both are of length 1."""
    num_groups = -(-len(part) // _GROUP)
    padding = num_groups * _GROUP - len(part)
    padded = torch.nn.functional.pad(part, (0, 0, 0, padding)).T
    found = []
    for rows in queries.split(_QUERY_ROWS):
        similarities = rows @ padded
        if padding:
            similarities[:, -padding:] = -torch.inf
        found.append(_top(similarities, count, len(part)))
    return Neighbours(*(torch.cat(values) for values in zip(*found, strict=True)))


def _top(similarities: Tensor, count: int, length: int) -> Neighbours:
    """The largest of each row, by the groups that can hold them.

    The k largest numbers lie in the k groups of largest maximum, so that few need to be sorted.
    """
    num_groups = similarities.shape[1] // _GROUP
    if count >= num_groups:
        return Neighbours(*similarities.topk(min(count, length), dim=1))
    # Members of a group lie `num_groups` apart: the maximum then runs along the rows of memory.
    grouped = similarities.view(len(similarities), _GROUP, num_groups)
    groups = grouped.amax(1).topk(count, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, _GROUP, -1)).flatten(1)
    best, places = candidates.topk(count, dim=1)
    member = places.div(count, rounding_mode="floor")
    return Neighbours(best, member * num_groups + groups.gather(1, places % count))


def _merge(first: Neighbours, second: Neighbours, count: int) -> Neighbours:
    if not first.indices.shape[1]:
        return second
    similarities = torch.cat((first.similarities, second.similarities), dim=1)
    indices = torch.cat((first.indices, second.indices), dim=1)
    best, places = similarities.topk(min(count, similarities.shape[1]), dim=1)
    return Neighbours(best, indices.gather(1, places))
