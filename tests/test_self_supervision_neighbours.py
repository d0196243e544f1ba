import numpy as np
import pytest
import torch

from sgtr_hf.self_supervision.nearest_neighbours import (
    Neighbours,
    find_neighbours,
    neighbour_accuracy,
    vote,
)


def random_features(count, width=16, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def slow_neighbours(queries, bank, count):
    """Every similarity, every row sorted whole."""
    queries = queries / queries.norm(dim=1, keepdim=True)
    bank = bank / bank.norm(dim=1, keepdim=True)
    similarities = queries.double() @ bank.double().T
    order = similarities.argsort(dim=1, descending=True)[:, :count]
    return similarities.gather(1, order), order


def slow_prediction(query, bank, labels, count, temperature):
    """The definition, for one query: votes in a dictionary."""
    scores = [float(query @ row / query.norm() / row.norm()) for row in bank]
    nearest = sorted(range(len(bank)), key=lambda row: -scores[row])[:count]
    votes = {}
    for row in nearest:
        label = int(labels[row])
        votes[label] = votes.get(label, 0.0) + np.exp(scores[row] / temperature)
    return sorted(votes, key=lambda label: -votes[label])


@pytest.mark.parametrize(("size", "count"), [(1000, 5), (1003, 5), (40, 7), (5, 20), (1, 1)])
def test_the_nearest_are_found_exactly(size, count):
    queries, bank = random_features(301), random_features(size, seed=1)
    found = find_neighbours(queries, bank, count)
    similarities, order = slow_neighbours(queries, bank, count)
    assert found.indices.shape == (301, min(size, count))
    assert found.indices.equal(order)
    torch.testing.assert_close(found.similarities, similarities.float())


def test_a_bank_may_come_in_parts():
    queries, bank = random_features(20), random_features(700, seed=1)
    whole = find_neighbours(queries, bank, 30)
    parts = find_neighbours(queries, iter(bank.split(37)), 30)
    assert parts.indices.equal(whole.indices)
    torch.testing.assert_close(parts.similarities, whole.similarities)


def test_equal_features_are_found_once_each():
    bank = torch.ones(100, 4)
    found = find_neighbours(torch.ones(3, 4), bank, 60)
    assert all(len(set(row)) == 60 for row in found.indices.tolist())


def test_votes_are_weighted_by_similarity():
    neighbours = Neighbours(torch.tensor([[1.0, 0.9, 0.9]]), torch.tensor([[2, 0, 1]]))
    labels = torch.tensor([1, 1, 0])
    votes = vote(neighbours, labels, 3, num_classes=2, temperature=0.1)
    torch.testing.assert_close(votes, torch.tensor([[1.0, 2 * np.exp(-1)]]).float())
    assert vote(neighbours, labels, 3, 2, temperature=1.0).argmax() == 1
    assert vote(neighbours, labels, 1, 2, temperature=1.0).argmax() == 0


@pytest.mark.parametrize("count", [1, 4, 30])
def test_accuracy_follows_the_definition(count):
    queries, bank = random_features(50), random_features(90, seed=1)
    query_labels, labels = torch.arange(50) % 7, torch.arange(90) % 7
    [accuracy] = neighbour_accuracy((queries, query_labels), (bank, labels), [count], 0.2)
    ranked = [slow_prediction(query, bank, labels, count, 0.2) for query in queries]
    top1 = np.mean([row[0] == label for row, label in zip(ranked, query_labels, strict=True)])
    assert accuracy.top1 == pytest.approx(top1)
    if count in (1, 30):
        # Between them some classes have no vote, and which of them come fifth is chance.
        top5 = np.mean(
            [label in row[:5] for row, label in zip(ranked, query_labels.tolist(), strict=True)]
        )
        assert accuracy.top5 == pytest.approx(top5)


def test_one_picture_is_enough():
    feature, label = random_features(1), torch.tensor([0])
    [accuracy] = neighbour_accuracy((feature, label), (feature, label), [20])
    assert (accuracy.top1, accuracy.top5) == (1.0, 1.0)


def test_a_class_that_the_bank_lacks_is_wrong():
    feature = random_features(2)
    [accuracy] = neighbour_accuracy(
        (feature, torch.tensor([0, 3])), (feature, torch.tensor([0, 0])), [1]
    )
    assert accuracy.top1 == 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_neighbours": 0}, "at least 1"),
        ({"bank": torch.zeros(3, 5)}, "one model"),
        ({"bank": []}, "no features"),
    ],
)
def test_mistakes_are_named(change, words):
    arguments = {"queries": torch.ones(2, 4), "bank": torch.ones(3, 4), "num_neighbours": 1}
    with pytest.raises(ValueError, match=words):
        find_neighbours(**(arguments | change))


def test_pictures_without_a_class_are_refused():
    pair = (torch.ones(2, 4), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="1 pictures of the queries have no class"):
        neighbour_accuracy(pair, pair)
    with pytest.raises(ValueError, match="temperature"):
        neighbour_accuracy(pair, pair, [1], 0.0)
