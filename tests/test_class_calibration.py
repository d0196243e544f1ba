import numpy as np
import pytest
import torch

from conftest import small_config
from sgtr_hf import SceneGraph, SgtrForSceneGraphGeneration, SgtrImageProcessor
from sgtr_hf.modeling.prediction_heads import triplet_class_probabilities
from sgtr_hf.training.class_calibration import NUM_CLASSES, DetectedClasses, fit_class_scores


SIZE = (100, 200)
SCALE, RIVALRY, OFFSET = 2.0, -1.5, 0.7


def reference_with(labels, boxes):
    return SceneGraph(
        boxes_xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        scores=np.ones(len(labels), dtype=np.float32),
        relations=np.zeros((0, 3), dtype=np.int64),
        relation_scores=np.zeros(0, dtype=np.float32),
        image_size=SIZE,
    )


def meaning(probabilities):
    """How likely a class really is: a plain formula on numbers."""
    sums = np.log(probabilities.sum(-1, keepdims=True))
    odds = probabilities / (1 - probabilities)
    return 1 / (1 + np.exp(-(SCALE * np.log(odds) + RIVALRY * sums + OFFSET)))


def draw_images(count=400, num_entities=10, num_classes=6, seed=0):
    """One annotated entity a detection, of the classes that the dice say."""
    random = np.random.default_rng(seed)
    width = 1 / num_entities
    boxes = np.array([[(row + 0.5) * width, 0.5, 0.9 * width, 0.5] for row in range(num_entities)])
    for _ in range(count):
        probabilities = random.uniform(0.02, 0.7, (num_entities, num_classes))
        outputs = {
            "entity_probabilities": torch.from_numpy(probabilities)[None],
            "pred_boxes": torch.from_numpy(boxes)[None],
        }
        rows, labels = np.nonzero(random.random(probabilities.shape) < meaning(probabilities))
        centre = boxes[rows]
        corners = np.concatenate((centre[:, :2] - centre[:, 2:] / 2,
                                  centre[:, :2] + centre[:, 2:] / 2), axis=1)  # fmt: skip
        yield outputs, [reference_with(labels, corners * [200, 100, 200, 100])]


def test_fit_finds_what_the_scores_mean():
    classes = DetectedClasses()
    for outputs, references in draw_images():
        classes.update(outputs, references)
    fitted = classes.fit()
    found = (fitted.class_score_scale, fitted.class_score_rivalry, fitted.class_score_offset)
    assert found == pytest.approx((SCALE, RIVALRY, OFFSET), abs=0.2)
    assert fitted.after < fitted.before - 0.05


def test_a_class_is_right_where_an_annotated_box_of_it_overlaps_by_half():
    probabilities = torch.tensor([[[0.9, 0.2, 0.1], [0.3, 0.8, 0.6]]])
    outputs = {
        "entity_probabilities": probabilities,
        "pred_boxes": torch.tensor([[[0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]]]),
    }
    # In pixels of 200 x 100: all of the first detection, half and less of the second.
    boxes = [[0, 0, 100, 100], [100, 0, 150, 100], [100, 0, 149, 100]]
    classes = DetectedClasses()
    classes.update(outputs, [reference_with([0, 2, 1], boxes)])
    # Likeliest classes first: 0, 1, 2 of the first, 1, 2, 0 of the second.
    assert classes._rights[0].tolist() == [[True, False, False], [False, True, False]]


def test_only_the_likeliest_classes_decide_and_all_are_summed():
    probabilities = torch.full((1, 1, NUM_CLASSES + 3), 0.1)
    outputs = {"entity_probabilities": probabilities, "pred_boxes": torch.full((1, 1, 4), 0.5)}
    classes = DetectedClasses()
    classes.update(outputs, [reference_with([], [])])
    assert classes._logits[0].shape == (1, NUM_CLASSES)
    np.testing.assert_allclose(np.exp(classes._sums[0]), 0.1 * (NUM_CLASSES + 3), rtol=1e-6)


def test_what_cannot_be_fitted_says_why():
    classes = DetectedClasses()
    with pytest.raises(ValueError, match="needs images, got none"):
        classes.fit()
    outputs = {"entity_probabilities": torch.full((1, 2, 3), 0.4),
               "pred_boxes": torch.full((1, 2, 4), 0.5)}  # fmt: skip
    classes.update(outputs, [reference_with([], [])])
    with pytest.raises(ValueError, match="got 0 right of 6"):
        classes.fit()


def test_settings_are_applied_to_triplets_and_not_to_detections():
    probabilities = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain = small_config()
    assert triplet_class_probabilities(plain, probabilities) is probabilities
    config = small_config(
        class_score_scale=SCALE, class_score_rivalry=RIVALRY, class_score_offset=OFFSET
    )
    found = triplet_class_probabilities(config, probabilities)
    np.testing.assert_allclose(found, meaning(probabilities.double().numpy()), rtol=1e-4)

    torch.manual_seed(0)
    model = SgtrForSceneGraphGeneration(plain).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        model.config.class_score_offset = -1.0
        after = model(images)
    assert after.entity_probabilities.equal(before.entity_probabilities)
    process = SgtrImageProcessor().post_process_scene_graph
    first, second = (process(outputs)[0] for outputs in (before, after))
    assert min(first.num_relations, second.num_relations) > 0
    assert second.relation_scores.max() < first.relation_scores.max()
    # Nodes keep the scores of the detector.
    detected = before.entity_probabilities.amax(-1).numpy()
    assert np.isin(second.scores, detected).all()


def test_a_model_is_calibrated_by_its_outputs():
    torch.manual_seed(0)
    model = SgtrForSceneGraphGeneration(small_config()).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        labels = model(images).entity_probabilities.argmax(-1)
        boxes = model(images).pred_boxes
    corners = torch.cat(
        (boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1
    )
    references = [
        reference_with(row.tolist(), (corner * torch.tensor([200, 100, 200, 100])).tolist())
        for row, corner in zip(labels, corners, strict=True)
    ]
    fitted = fit_class_scores(model, [{"pixel_values": images, "references": references}])
    assert model.config.class_score_scale == pytest.approx(fitted.class_score_scale, abs=1e-4)
    assert model.config.class_score_offset == pytest.approx(fitted.class_score_offset, abs=1e-4)
    assert fitted.after < fitted.before
