import numpy as np
import pytest

from conftest import small_config
from sgtr_hf import SceneGraph
from sgtr_hf.training.score_calibration import fit_calibration, read_emitted_triplets


SIZE = (100, 100)
BOXES = np.array([[0, 0, 40, 40], [50, 50, 90, 90]], dtype=np.float32)


def make_graphs(count=2000, temperature=2.0, offset=-0.5, seed=0):
    """Images with one triplet each, right as often as its logit over the temperature says."""
    random = np.random.default_rng(seed)
    predictions, references = [], []
    for _ in range(count):
        logit = random.normal(0, 3)
        probability = 1 / (1 + np.exp(-logit))
        truth = random.random() < 0.8 / (1 + np.exp(-(logit / temperature + offset)))
        fields = {"boxes_xyxy": BOXES, "labels": np.array([0, 1]), "image_size": SIZE}
        relation = np.array([[0, 1, 0]])
        predictions.append(
            SceneGraph(
                **fields,
                scores=np.ones(2, dtype=np.float32),
                relations=relation,
                relation_scores=np.array([0.8 * probability], dtype=np.float32),
                predicate_distributions=np.array([[probability, 0.1]], dtype=np.float32),
            )
        )
        annotated = relation if truth else relation[:, [1, 0, 2]]
        references.append(
            SceneGraph(
                **fields,
                scores=np.ones(2, dtype=np.float32),
                relations=annotated,
                relation_scores=np.ones(1, dtype=np.float32),
            )
        )
    return predictions, references


def test_calibration_finds_the_temperature_and_the_offset():
    fitted = fit_calibration(small_config(), *make_graphs())
    assert fitted.score_temperature == pytest.approx(2.0, abs=0.3)
    assert fitted.score_offset == pytest.approx(-0.5, abs=0.15)
    assert fitted.num_triplets == 2000
    assert fitted.after["ECE"] < 0.03 < fitted.before["ECE"]
    assert sum(fitted.before["bins"]["count"]) == 2000


def test_emitted_triplets_undo_the_present_settings():
    predictions, references = make_graphs(count=5)
    plain = read_emitted_triplets(small_config(), predictions, references)
    config = small_config(score_temperature=3.0, score_offset=0.2)
    scaled = read_emitted_triplets(config, predictions, references)
    np.testing.assert_allclose(scaled.predicate_logits, (plain.predicate_logits - 0.2) * 3)
    scores = [graph.relation_scores[0] for graph in predictions]
    np.testing.assert_allclose(plain.scores(1.0, 0.0), scores, rtol=1e-5)
    np.testing.assert_allclose(scaled.scores(3.0, 0.2), scores, rtol=1e-5)


def test_calibration_refuses_what_it_cannot_fit():
    predictions, references = make_graphs(count=3)
    with pytest.raises(ValueError, match="'softmax'"):
        fit_calibration(small_config(predicate_classification="softmax"), predictions, references)
    with pytest.raises(ValueError, match="right and wrong triplets, got 0 right of 0"):
        fit_calibration(small_config(), *empty_graphs())


def empty_graphs():
    nothing = SceneGraph(
        boxes_xyxy=np.zeros((0, 4), dtype=np.float32),
        labels=np.zeros(0, dtype=np.int64),
        scores=np.zeros(0, dtype=np.float32),
        relations=np.zeros((0, 3), dtype=np.int64),
        relation_scores=np.zeros(0, dtype=np.float32),
        image_size=SIZE,
        predicate_distributions=np.zeros((0, 2), dtype=np.float32),
    )
    return [nothing], [nothing]
