"""Comparison of a graph with the triplets that the original kept."""

import numpy as np


def assert_kept(graph, boxes, triplets, scores):
    """Compare in order.

    Args:
        graph: Made by the released rules.
        boxes: (N, 4) corners of the recorded entities.
        triplets: (300, 3) subject, object, predicate from 0.
        scores: (300,).
    """
    expected = np.concatenate((boxes[triplets[:, 0]], boxes[triplets[:, 1]], triplets[:, 2:]), 1)
    relations = graph.relations
    corners = graph.boxes_xyxy
    found = np.concatenate(
        (corners[relations[:, 0]], corners[relations[:, 1]], relations[:, 2:]), axis=1
    )
    np.testing.assert_allclose(graph.relation_scores, scores, rtol=1e-5)
    for position, row in enumerate(expected):
        # Scores that agree to the last bits may change places with the rounding of a softmax.
        rivals = np.flatnonzero(np.abs(scores - scores[position]) < 1e-6)
        assert np.abs(found[rivals] - row).max(axis=1).min() < 1e-2, position
        if len(rivals) == 1:
            assert np.abs(found[position] - row).max() < 1e-2, position
