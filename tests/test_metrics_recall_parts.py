"""Recalls of unseen, rare and grouped triplets, and weighted ones, beside plain loops."""

import math

import numpy as np
import pytest

from sgtr_hf.metrics.evaluation_protocols import PROTOCOLS
from sgtr_hf.metrics.recall import SceneGraphRecall
from sgtr_hf.metrics.training_triplets import TrainingTriplets, count_training_triplets
from sgtr_hf.predicate_groups import PUBLISHED_GROUPS, group_by_frequency
from slow_evaluation import (
    random_images,
    slow_constrained_list,
    slow_free_list,
    slow_ranks,
    slow_recalls,
)


TOP_K = (3, 8)


def classes_of(graph):
    """Class of the subject, class of the object, predicate."""
    return [
        (int(graph.labels[subject]), int(graph.labels[object_]), predicate)
        for subject, object_, predicate in graph.relations.tolist()
    ]


def slow_parts(ranks_of_images, pairs, k, protocol, training):
    """zR and rarity_R; `training` is the list of all triplets that training saw."""
    shares, found_weight, all_weight = [], 0.0, 0.0
    for ranks, (prediction, reference) in zip(ranks_of_images, pairs, strict=True):
        if protocol.skip_images_without_predictions and not prediction.num_relations:
            continue
        unseen = []
        for rank, triplet in zip(ranks, classes_of(reference), strict=True):
            hit = 0 <= rank < k
            weight = 1 / (1 + training.count(triplet))
            all_weight += weight
            found_weight += weight * hit
            if triplet not in training:
                unseen.append(hit)
        if unseen:
            shares.append(sum(unseen) / len(unseen))
    return {
        "zR": sum(shares) / len(shares) if shares else math.nan,
        "rarity_R": found_weight / all_weight if all_weight else math.nan,
    }


def slow_groups(by_predicate, counts, groups, protocol):
    figures = {
        "wR": sum(counts[predicate] * by_predicate[predicate] for predicate in by_predicate)
        / sum(counts[predicate] for predicate in by_predicate)
    }
    for name, members in groups.items():
        chosen = [
            by_predicate.get(predicate, 0.0)
            for predicate in members
            if protocol.average_all_predicates or predicate in by_predicate
        ]
        figures[f"mR_{name}"] = sum(chosen) / len(chosen) if chosen else math.nan
    return figures


@pytest.mark.parametrize("distributions", [False, True])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_parts_of_the_recall_equal_plain_loops(name, distributions):
    protocol = PROTOCOLS[name]
    for seed in range(4):
        predictions, references, num_predicates = random_images(
            seed, distributions=distributions, num_images=8
        )
        pairs = list(zip(predictions, references, strict=True))
        # Training saw every other annotation.
        training = [triplet for graph in references[::2] for triplet in classes_of(graph)][::2]
        groups = {"head": [0], "body": [1], "tail": list(range(2, num_predicates))}
        metric = SceneGraphRecall(
            TOP_K,
            name,
            num_predicates,
            seen_triplets=counted(training),
            predicate_groups=groups,
        )
        metric.update(predictions, references)
        report = metric.compute()
        used = [
            reference
            for prediction, reference in pairs
            if prediction.num_relations or not protocol.skip_images_without_predictions
        ]
        predicates = [triplet[2] for graph in used for triplet in classes_of(graph)]
        counts = {predicate: predicates.count(predicate) for predicate in set(predicates)}
        for prefix in ("", "ng-"):
            ranks = [
                slow_ranks(rows_of(prediction, protocol, prefix), prediction, reference, protocol)
                for prediction, reference in pairs
            ]
            for k in TOP_K:
                recalls = slow_recalls(ranks, references, predictions, k, protocol, num_predicates)
                expected = slow_parts(ranks, pairs, k, protocol, training)
                expected |= slow_groups(recalls["by_predicate"], counts, groups, protocol)
                for figure, value in expected.items():
                    found = report[f"{prefix}{figure}@{k}"]
                    assert found == pytest.approx(value, abs=1e-12, nan_ok=True), figure


def rows_of(prediction, protocol, prefix):
    if prefix:
        return slow_free_list(prediction, protocol, max(TOP_K))
    return slow_constrained_list(prediction, protocol)


def counted(triplets):
    rows, counts = np.unique(np.array(triplets).reshape(-1, 3), axis=0, return_counts=True)
    return TrainingTriplets(rows, counts)


def test_training_triplets_equal_plain_counting():
    _, references, num_predicates = random_images(5, distributions=False, num_images=20)
    found = count_training_triplets(iter(references))
    seen = [triplet for graph in references for triplet in classes_of(graph)]
    asked = np.array(list(np.ndindex(4, 4, num_predicates)))
    assert found.count(asked).tolist() == [seen.count(tuple(row)) for row in asked.tolist()]
    assert found.is_unseen(asked).tolist() == [tuple(row) not in seen for row in asked.tolist()]


def test_published_groups_are_complete():
    for name, sizes in (("vg150", (7, 21, 22)), ("open-images", (7, 8, 15))):
        groups = PUBLISHED_GROUPS[name]
        assert tuple(map(len, groups.values())) == sizes
        members = [predicate for group in groups.values() for predicate in group]
        assert sorted(members) == list(range(sum(sizes)))
    assert group_by_frequency([0, 9, 1, 6]) == {"head": [1], "body": [3], "tail": [2, 0]}
    assert group_by_frequency([]) == {"head": [], "body": [], "tail": []}
