import numpy as np
import pytest
import torch
from PIL import Image

import sgtr_hf
from conftest import small_config
from sgtr_hf.modeling.given_entities import given_logits, pad_given_entities
from sgtr_hf.modeling.modeling_sgtr_detr import entity_probabilities
from sgtr_hf.modeling.query_selection import ScoredCells
from sgtr_hf.pipelines.scene_graph_pipeline import SceneGraphPipeline, relative_boxes


PLUS = {
    "predicate_node_generator": "spatial_aware",
    "graph_assembling": "unified",
    "pair_queries": True,
}
BOXES = [torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.3, 0.4], [0.5, 0.8, 0.9, 0.3]])]
LABELS = [torch.tensor([0, 2, 1])]


def make_model(detector=None, **fields):
    torch.manual_seed(0)
    return sgtr_hf.SgtrForSceneGraphGeneration(
        small_config({"select_queries": True} | (detector or {}), **(PLUS | fields))
    ).eval()


@pytest.mark.parametrize("fields", [{}, {"pair_queries": False}], ids=["pairs", "no pairs"])
def test_given_boxes_and_labels_come_out_again(pixel_values, fields):
    model = make_model(**fields)
    with torch.no_grad():
        output = model(pixel_values[:1], entity_boxes=BOXES, entity_labels=LABELS)
        boxes_only = model(pixel_values[:1], entity_boxes=BOXES)
    torch.testing.assert_close(output.pred_boxes[0], BOXES[0])
    torch.testing.assert_close(output.entity_probabilities[0], torch.eye(3)[LABELS[0]])
    torch.testing.assert_close(boxes_only.pred_boxes[0], BOXES[0])
    assert boxes_only.entity_probabilities.min() > 0
    assert boxes_only.entity_probabilities.max() < 1


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_given_boxes_hold_an_entity_of_some_class(classification):
    config = small_config({"classification": classification}).detector
    boxes = [BOXES[0][:2]]
    given = pad_given_entities(config, boxes, None, torch.device("cpu"))
    columns = config.num_labels + (classification == "softmax")
    logits = torch.linspace(-9, 40, 2 * columns).reshape(1, 2, columns)
    found = given_logits(config, logits, given)
    probabilities = entity_probabilities(found, classification)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(1, 2), rtol=0, atol=1e-4)
    alone = entity_probabilities(logits, classification)
    expected = alone / alone.sum(-1, keepdim=True)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-4)


def test_content_of_a_given_box_is_that_of_a_sure_cell_on_it():
    model = make_model()
    selection = model.model.detector.model.query_selection
    box = torch.tensor([[[0.4, 0.4, 0.2, 0.2]]])
    near, far = torch.tensor([0.4, 0.4, 0.2, 0.19]), torch.tensor([0.8, 0.8, 0.2, 0.2])
    features = torch.eye(3, 16)[None]

    def content(logits, *boxes):
        cells = ScoredCells(features, torch.tensor(logits)[None, :, None], torch.stack(boxes)[None])
        selection.score = lambda *_: cells
        return selection.content_at(features, cells.boxes, box)[0, 0].argmax().item()

    # Of two cells on the box the surer one; one elsewhere never, however sure it is.
    assert content([-4.0, 2.0, 9.0], box[0, 0], near, far) == 1
    assert content([1.0, -2.0, 9.0], near, box[0, 0], far) == 0
    # Where none touches it, the nearest.
    further = torch.tensor([0.9, 0.9, 0.1, 0.1])
    assert content([0.0, 0.0, 9.0], far, further, further) == 0


def test_padding_of_given_entities_changes_nothing(pixel_values):
    model = make_model(num_predicate_queries=4)
    boxes = [BOXES[0][:2], BOXES[0]]
    labels = [LABELS[0][:2], LABELS[0]]
    with torch.no_grad():
        together = model(pixel_values, entity_boxes=boxes, entity_labels=labels)
        alone = model(pixel_values[:1], entity_boxes=boxes[:1], entity_labels=labels[:1])
    # Two entities make two pairs, besides those with themselves that fill the queries up.
    torch.testing.assert_close(
        together.predicate_logits[0, :2], alone.predicate_logits[0, :2], rtol=0, atol=1e-5
    )
    assert (together.predicate_probabilities[0, 2:] < 1e-9).all()
    assert (together.entity_probabilities[0, 2] < 1e-9).all()
    assert (together.subject_scores[0, :, 2] == 0).all()


def test_an_image_without_and_with_one_entity_runs(pixel_values):
    model = make_model()
    boxes = [torch.zeros(0, 4), BOXES[0][:1]]
    with torch.no_grad():
        output = model(pixel_values, entity_boxes=boxes)
    graphs = sgtr_hf.SgtrImageProcessor().post_process_scene_graph(output, threshold=1e-6)
    assert [len(graph.relations) for graph in graphs] == [0, 0]


def test_order_of_given_entities_does_not_matter(pixel_values):
    model = make_model(num_predicate_queries=6)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        first = model(pixel_values[:1], entity_boxes=BOXES)
        second = model(pixel_values[:1], entity_boxes=[BOXES[0][order]])
    torch.testing.assert_close(
        first.predicate_logits, second.predicate_logits, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        first.subject_scores[..., order], second.subject_scores, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entity_labels": LABELS}, "`entity_labels` need `entity_boxes`"),
        ({"entity_boxes": BOXES * 2}, "one entry for each of the 1 images"),
        ({"entity_boxes": BOXES, "entity_labels": [LABELS[0][:2]]}, "each of the 3 boxes"),
        ({"entity_boxes": BOXES, "entity_labels": [LABELS[0] + 1]}, "from 0 to 2"),
        ({"entity_boxes": [BOXES[0] * 100]}, "relative to the image"),
        ({"entity_boxes": [BOXES[0][:, :3]]}, "shape \\(num_entities, 4\\)"),
        ({"entity_boxes": BOXES, "labels": []}, "must hold one dict an image"),
    ],
    ids=["no boxes", "images", "count", "range", "pixels", "shape", "training"],
)
def test_wrong_entities_are_refused(pixel_values, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(pixel_values[:1], **arguments)


def test_learned_queries_cannot_take_entities(pixel_values):
    model = make_model({"query_type": "learned", "select_queries": False})
    with pytest.raises(ValueError, match="anchor queries"):
        model(pixel_values[:1], entity_boxes=BOXES)


def test_the_pipeline_takes_entities():
    processor = sgtr_hf.SgtrImageProcessor(size={"height": 64, "width": 96})
    generate = SceneGraphPipeline(model=make_model(), image_processor=processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8))
    boxes = [[10, 10, 60, 50], [30, 20, 110, 70]]
    graph = generate(picture, boxes=boxes, labels=["cup", 2], threshold=0.0)
    assert graph.labels.tolist() == [0, 2]
    np.testing.assert_allclose(graph.boxes_xyxy, boxes, atol=1e-3)
    many = [
        {"image": picture, "boxes": boxes[:count], "labels": [0, 2][:count]} for count in (2, 1)
    ]
    graphs = generate(many, batch_size=2)
    assert [len(graph.labels) for graph in graphs] == [2, 1]
    with pytest.raises(ValueError, match="belong to one picture"):
        generate([picture], boxes=boxes)
    with pytest.raises(ValueError, match="'plate', which this model does not know"):
        generate(picture, boxes=boxes, labels=["cup", "plate"])
    with pytest.raises(ValueError, match="for all pictures of a batch"):
        list(generate([many[0], {"image": picture}], batch_size=2))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [([[10, 10, 5, 20]], "`boxes\\[0\\]`"), ([1, 2, 3], "shape"), ([[200, 0, 300, 9]], "area")],
    ids=["inverted", "flat", "outside"],
)
def test_wrong_pixel_boxes_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        relative_boxes(boxes, 100, 50)
