import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from sgtr_hf.auto import DEFAULT_CHECKPOINT
from sgtr_hf.cli import main
from sgtr_hf.hub.model_card import EXAMPLE_DRAWING, EXAMPLE_THRESHOLD, example_section


ASSETS = resources.files("sgtr_hf") / "assets"
PICTURE = str(ASSETS / "tabletop.jpg")


@pytest.fixture(scope="module")
def generate():
    return pipeline("scene-graph")


def test_the_default_model_is_the_one_that_ships(generate):
    assert generate.model.name_or_path == DEFAULT_CHECKPOINT
    # Stored as float16, loaded as float32.
    assert generate.model.dtype == torch.float32
    assert len(generate.model.config.id2label) == 12
    assert len(generate.model.config.id2predicate) == 10


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16", torch.float64])
def test_every_part_takes_the_precision_that_is_asked_for(dtype):
    generate = pipeline("scene-graph", dtype=dtype)
    wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    weights = [*generate.model.parameters(), *generate.model.buffers()]
    assert {tensor.dtype for tensor in weights if tensor.is_floating_point()} == {wanted}
    words = {(t.subject, t.predicate, t.object) for t in generate(PICTURE).triplets()}
    assert ("book", "on", "table") in words


def test_it_finds_the_graph_of_the_demo_picture(generate):
    graph = generate(PICTURE, threshold=0.1)
    assert graph.image_size == (480, 640)
    words = {(triplet.subject, triplet.predicate, triplet.object) for triplet in graph.triplets()}
    assert ("book", "on", "table") in words
    assert "table" in {graph.entity_name(index) for index in range(graph.num_entities)}


def test_a_batch_equals_single_pictures(generate):
    picture = Image.open(PICTURE)
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    single = [generate(picture), generate(mirrored)]
    batched = generate([picture, mirrored], batch_size=2)
    for one, other in zip(single, batched, strict=True):
        assert one.labels.tolist() == other.labels.tolist()
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


@pytest.mark.parametrize("count", [1, 40])
def test_given_boxes_are_all_in_the_graph(generate, count):
    # Small boxes in the sky, of which the model says that nothing is there.
    boxes = [[5 + 10 * index, 5, 12 + 10 * index, 12] for index in range(count)]
    graph = generate(PICTURE, boxes=boxes)
    assert graph.num_entities == count
    first, second = generate([{"image": PICTURE, "boxes": boxes[: 1 + n]} for n in range(2)],
                             batch_size=2)  # fmt: skip
    assert (first.num_entities, second.num_entities) == (1, min(2, count))


def test_the_demo_command(tmp_path, capsys):
    output = tmp_path / "graph.json"
    assert main(["predict", PICTURE, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["relations"]
    assert "on - table" in capsys.readouterr().out


def test_the_card_says_how_it_came_about(generate):
    card = (Path(DEFAULT_CHECKPOINT) / "README.md").read_text()
    for words in ("mR@20", "frequency baseline", "ceiling", "seed", "make-tabletop", "minutes"):
        assert words in card
    assert (Path(DEFAULT_CHECKPOINT) / "model.safetensors").stat().st_size < 16 * 2**20
    # The sample picture's graph in it is what the model finds.
    assert example_section(generate(PICTURE, threshold=EXAMPLE_THRESHOLD)) in card
    assert (Path(DEFAULT_CHECKPOINT) / EXAMPLE_DRAWING).is_file()
