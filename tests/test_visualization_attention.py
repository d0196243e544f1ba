import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import sgtr_hf.cli
from conftest import small_config, small_detector_config
from sgtr_hf import SgtrDetrForObjectDetection, SgtrForSceneGraphGeneration, SgtrImageProcessor
from sgtr_hf.modeling.attention_recording import record_attention
from sgtr_hf.visualization.attention_maps import (
    detector_attention,
    draw_attention,
    triplet_attention,
)
from sgtr_hf.visualization.query_slots import (
    QuerySlots,
    collect_query_slots,
    draw_query_slots,
    slot_statistics,
)


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def graph_model(checkpoint_folder):
    return SgtrForSceneGraphGeneration.from_pretrained(
        checkpoint_folder, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def processor(checkpoint_folder):
    return AutoImageProcessor.from_pretrained(checkpoint_folder)


def test_recording_leaves_nothing_behind(graph_model):
    pixel_values = torch.randn(1, 3, 64, 96)
    with record_attention(graph_model) as recorded, torch.no_grad():
        graph_model(pixel_values)
    assert recorded
    for weights in recorded.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert not any(module._forward_hooks for module in graph_model.modules())


def test_heat_maps_hold_all_the_attention(graph_model, processor, picture):
    panels = detector_attention(graph_model, processor, picture, queries=[0, 7], points=[(0.1, 1)])
    assert len(panels) == 3
    for panel in panels:
        assert panel.heat.sum() == pytest.approx(1, abs=1e-4)
    assert panels[-1].point == (0.1, 1)
    assert panels[0].boxes.shape == (1, 4)


@pytest.mark.parametrize("generator", ["structural", "spatial_aware"])
def test_a_triplet_has_three_panels(generator, processor, picture):
    torch.manual_seed(0)
    config = small_config(predicate_node_generator=generator, attn_implementation="eager")
    graph_model = SgtrForSceneGraphGeneration(config).eval()
    panels = triplet_attention(graph_model, processor, picture, queries=[3])
    subject, predicate, object_ = panels
    assert [panel.title.split()[0] for panel in panels] == ["subject", "predicate", "object"]
    for role in (subject, object_):
        assert role.weights.sum() == pytest.approx(1, abs=1e-4)
    assert predicate.heat.sum() == pytest.approx(1, abs=1e-4)
    # The predicate's panel shows what the other two look at most.
    looked_at = [role.boxes[role.weights.argmax()] for role in (subject, object_)]
    np.testing.assert_array_equal(predicate.boxes, looked_at)
    drawing = np.asarray(draw_attention(picture, panels))
    # Three panels are drawn, not three empty frames.
    third = drawing.shape[1] // 3
    assert all(len(np.unique(part)) > 50 for part in np.split(drawing[:, : 3 * third], 3, axis=1))


def test_wrong_queries_points_and_backends_are_errors(
    graph_model, processor, picture, checkpoint_folder
):
    with pytest.raises(ValueError, match="`queries` must be below 10, got 10"):
        detector_attention(graph_model, processor, picture, queries=[10])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        detector_attention(graph_model, processor, picture, points=[(2, 0)])
    fused = AutoModelForObjectDetection.from_pretrained(checkpoint_folder)
    with pytest.raises(ValueError, match="eager"):
        detector_attention(fused, processor, picture)
    with pytest.raises(ValueError, match="no attention to draw"):
        draw_attention(picture, [])


def test_slots_are_counted_by_kind():
    boxes = np.zeros((4, 2, 4), dtype=np.float32)
    boxes[:, 0] = [0.25, 0.5, 0.1, 0.1]
    boxes[:, 1] = [0.5, 0.5, 0.9, 0.5]
    boxes[3, 1] = [0.5, 0.5, 0.5, 0.9]
    occupied = np.array([[True, False]] * 3 + [[False, False]])
    first, second = slot_statistics(QuerySlots(boxes, occupied))
    assert (first["small"], first["horizontal"], first["vertical"]) == (1, 0, 0)
    assert (second["small"], second["horizontal"], second["vertical"]) == (0, 0.75, 0.25)
    assert first["mean_centre"] == [0.25, 0.5]
    assert (first["occupancy"], second["occupancy"]) == (0.75, 0)
    with pytest.raises(ValueError, match="small_area"):
        slot_statistics(QuerySlots(boxes, occupied), small_area=2)


def test_slots_are_drawn_in_the_colours_of_the_paper():
    boxes = np.zeros((6, 3, 4), dtype=np.float32)
    boxes[..., :2] = 0.5
    boxes[:, 0, 2:], boxes[:, 1, 2:], boxes[:, 2, 2:] = 0.1, (0.9, 0.5), (0.5, 0.9)
    slots = QuerySlots(boxes, np.ones((6, 3), dtype=bool))
    drawing = np.asarray(draw_query_slots(slots)).astype(int)
    # The middle of each panel; below are the legend and its points.
    middle = drawing[: drawing.shape[0] * 3 // 4]
    thirds = np.array_split(middle, 3, axis=1)
    # Small: green; large and wide: red; large and high: blue.
    for panel, channel in zip(thirds, (1, 0, 2), strict=True):
        colored = panel[panel.max(-1) - panel.min(-1) > 60]
        assert len(colored) > 10
        assert (colored.argmax(-1) == channel).mean() > 0.95


@pytest.mark.parametrize("classification", ["softmax", "focal"])
def test_slots_of_both_kinds_of_heads(classification, picture):
    torch.manual_seed(0)
    model = SgtrDetrForObjectDetection(small_detector_config(classification=classification)).eval()
    processor = SgtrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    slots = collect_query_slots(model, processor, [picture, picture])
    assert slots.boxes.shape == (2, 10, 4)
    with torch.no_grad():
        output = model(**processor(images=picture, return_tensors="pt"))
    np.testing.assert_allclose(slots.boxes[0], output.pred_boxes[0].numpy())
    if classification == "softmax":
        expected = output.logits[0].argmax(-1) != output.logits.shape[-1] - 1
        assert slots.is_occupied[0].tolist() == expected.tolist()
    assert draw_query_slots(slots, num_slots=7).width > 0
    with pytest.raises(ValueError, match="at least one image"):
        collect_query_slots(model, processor, [])


def test_the_commands_write_their_files(tmp_path, picture, checkpoint_folder, capsys):
    image = tmp_path / "picture.png"
    picture.save(image)
    common = ["--model", str(checkpoint_folder), "--output"]
    for arguments in (
        ["attention", str(image), *common, str(tmp_path / "a.png"), "--points", "0.5,0.5"],
        ["attention", str(image), *common, str(tmp_path / "b.png"), "--triplets"],
        ["query-slots", str(tmp_path), *common, str(tmp_path / "c.jpg"), "--statistics",
         str(tmp_path / "c.json")],
    ):  # fmt: skip
        assert sgtr_hf.cli.main(arguments) == 0
    statistics = json.loads((tmp_path / "c.json").read_text())
    # The folder held the drawings of the first two commands too.
    assert statistics["images"] == 3
    assert len(statistics["queries"]) == 10
    assert sgtr_hf.cli.main(["attention", str(image), *common, str(tmp_path / "a.txt")]) == 2
    assert "must end like an image file" in capsys.readouterr().err
