"""The same images give the same gradients and weights, however they are divided.

Processes are real ones, each of which asserts how many there are.
"""

import pytest
import torch

from tiny_training_run import DETECTOR, squares_record, write_squares
from training_processes import SGTR_PLUS, start_group, train_plainly


pytestmark = pytest.mark.usefixtures("without_drawing")


NUM_UPDATES = 5
# Nothing depends on what a process drew before: no dropout; noise is seeded by the image.
PLAIN_DETECTOR = DETECTOR | {"dropout": 0.0}
MODELS = {
    "detection": ("detection", PLAIN_DETECTOR),
    "softmax detection": ("detection", PLAIN_DETECTOR | {"classification": "softmax"}),
    "SGTR": ("scene_graph", {"predicate_classification": "softmax"}),
    "SGTR+": ("scene_graph", SGTR_PLUS),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images with two, one or no square."""
    records = [squares_record(index) for index in range(16)]
    for index, record in enumerate(records):
        if index % 4 == 1:
            record["objects"], record["relations"] = record["objects"][:1], []
        if index % 4 == 3:
            record["objects"], record["relations"] = [], []
    return write_squares(tmp_path_factory.mktemp("squares"), train=records)


def train(data, folder, kind, layout):
    """Return the results of all processes."""
    task, model = MODELS[kind]
    if task == "scene_graph":
        model = model | {"dropout": 0.0, "detector_config": PLAIN_DETECTOR}
    num_processes, batch_size, accumulation = layout
    name = "x".join(map(str, layout))
    fields = {
        "data": str(data), "output_dir": str(folder / name), "task": task, "model": model,
        "max_steps": NUM_UPDATES, "batch_size": batch_size, "ema_decay": 0.0,
        "gradient_accumulation_steps": accumulation, "gradient_clip_norm": 0.0,
        "evaluate_every": 100, "checkpoint_every": 100,
    }  # fmt: skip
    output = str(folder / f"result-{name}")
    if num_processes == 1:
        train_plainly(1, output, fields)
    else:
        group = start_group(train_plainly, num_processes, num_processes, output, fields)
        for process in group:
            process.join(300)
        assert [process.exitcode for process in group] == [0] * num_processes
    return [torch.load(f"{output}-{rank}.pt") for rank in range(num_processes)]


def assert_alike(results, expected):
    for result in results:
        for part in ("gradients", "weights"):
            assert result[part].keys() == expected[part].keys()
            for name, tensor in result[part].items():
                where = f"{part} of {name}"
                torch.testing.assert_close(
                    tensor, expected[part][name], atol=1e-5, rtol=1e-5,
                    msg=lambda text, where=where: f"{where}: {text}",
                )  # fmt: skip


def assert_moved(result, start):
    """What the first layout did is a training, or all layouts would agree on nothing."""
    largest = max(gradient.abs().max() for gradient in result["gradients"].values())
    assert largest > 1e-3
    assert len(result["counts"]) == NUM_UPDATES == len(start["counts"])


@pytest.mark.parametrize(
    "kind",
    [pytest.param("detection", marks=pytest.mark.slow), "softmax detection", "SGTR", "SGTR+"],
)
def test_processes_and_accumulation_change_nothing(data, tmp_path, kind):
    (expected,) = train(data, tmp_path, kind, (1, 8, 1))
    accumulated = train(data, tmp_path, kind, (1, 4, 2))
    assert_moved(expected, accumulated[0])
    assert_alike(accumulated, expected)
    assert_alike(train(data, tmp_path, kind, (2, 4, 1)), expected)


@pytest.mark.parametrize(
    "kind", [pytest.param("softmax detection", marks=pytest.mark.slow), "SGTR+"]
)
def test_a_process_without_annotations_changes_nothing(data, tmp_path, kind):
    (expected,) = train(data, tmp_path, kind, (1, 2, 1))
    results = train(data, tmp_path, kind, (2, 1, 1))
    # Some updates have a process with nothing annotated beside one with something.
    pairs = list(zip(results[0]["counts"], results[1]["counts"], strict=True))
    assert any((first == 0) != (second == 0) for first, second in pairs)
    assert_alike(results, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_that_accumulate_change_nothing(data, tmp_path, kind):
    (expected,) = train(data, tmp_path, kind, (1, 8, 1))
    assert_alike(train(data, tmp_path, kind, (2, 2, 2)), expected)
