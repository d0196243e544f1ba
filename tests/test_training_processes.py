"""Two CPU processes, started as users start them; slow, since each imports everything again."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sgtr_hf import SgtrDetrForObjectDetection
from test_streaming_training import write_shards
from tiny_training_run import (
    losses_by_update,
    make_recipe,
    read_log,
    squares_record,
    train,
    write_squares,
)


pytestmark = pytest.mark.slow

# Runs make_recipe in each process; the second one gets SIGTERM after `stop_after` updates.
WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from tiny_training_run import make_recipe
from sgtr_hf.training.loop import Trainer

recipe = make_recipe(**{fields!r})
recipe.data.__dict__.update({data_settings!r})
trainer = Trainer(recipe)
assert trainer.accelerator.num_processes == 2
original = trainer._after_update

def after_update():
    original()
    if trainer.progress.updates == {stop_after} and trainer.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)

trainer._after_update = after_update
trainer.run()
"""


def run_two_processes(folder, stop_after=0, data_settings=(), **fields):
    script = folder / "worker.py"
    tests = str(Path(__file__).parent)
    script.write_text(
        WORKER.format(
            tests=tests, fields=fields, stop_after=stop_after, data_settings=dict(data_settings)
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def test_two_processes_train_as_one_with_twice_the_batch(data, tmp_path):
    # Without random numbers of their own: dropout and denoising noise differ by process.
    model = {"dropout": 0.0, "num_denoising_groups": 0}
    train(data, tmp_path / "one", model=model)
    fields = {"data": str(data), "output_dir": str(tmp_path / "two"), "model": model}
    done = run_two_processes(tmp_path, batch_size=2, **fields)
    assert done.returncode == 0, done.stderr
    one, two = losses_by_update(tmp_path / "one"), losses_by_update(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-3)
    weights = [
        SgtrDetrForObjectDetection.from_pretrained(tmp_path / name / "final").class_head.weight
        for name in ("one", "two")
    ]
    assert weights[0].tolist() == [pytest.approx(row, abs=1e-3) for row in weights[1].tolist()]


def test_a_signal_to_one_process_stops_both_and_resumes_to_the_bit(data, tmp_path):
    fields = {"data": str(data), "batch_size": 2}
    done = run_two_processes(tmp_path, output_dir=str(tmp_path / "whole"), **fields)
    assert done.returncode == 0, done.stderr
    fields["output_dir"] = str(tmp_path / "half")
    stopped = run_two_processes(tmp_path, stop_after=3, **fields)
    assert stopped.returncode != 0
    assert "Stopped after update 3" in stopped.stderr
    checkpoint = tmp_path / "half" / "checkpoint-00000003"
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2
    done = run_two_processes(tmp_path, **fields)
    assert done.returncode == 0, done.stderr
    assert losses_by_update(tmp_path / "half") == losses_by_update(tmp_path / "whole")
    for step, line in read_log(tmp_path / "whole", "validation").items():
        assert read_log(tmp_path / "half", "validation")[step]["AP"] == line["AP"]


def test_scene_graphs_train_though_a_process_has_nothing_annotated(tmp_path):
    records = [squares_record(index) for index in range(8)]
    for record in records[::2]:
        record["objects"], record["relations"] = [], []
    data = write_squares(tmp_path / "data", train=records)
    done = run_two_processes(
        tmp_path, data=str(data), output_dir=str(tmp_path / "run"), task="scene_graph",
        batch_size=1, epochs=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses_by_update(tmp_path / "run")) == 8
    details = json.loads((tmp_path / "run" / "training.json").read_text())["figures"]["details"]
    # An odd number of images, each counted by one process.
    assert details["detection"]["num_images"] == details["model"]["num_images"] == 5


def test_two_processes_stream_their_own_shards_and_resume_to_the_bit(tmp_path):
    data = write_shards(tmp_path / "data", [9, 4, 7, 3])
    settings = {"streaming": True, "shuffle_buffer": 6, "num_workers": 2}
    fields = {"data": str(data), "batch_size": 2, "data_settings": settings}
    done = run_two_processes(tmp_path, output_dir=str(tmp_path / "whole"), **fields)
    assert done.returncode == 0, done.stderr
    # Of 23 images, each process has five batches of two, though its shards hold 16 or 7.
    assert len(losses_by_update(tmp_path / "whole")) == 10
    fields["output_dir"] = str(tmp_path / "half")
    stopped = run_two_processes(tmp_path, stop_after=7, **fields)
    assert "Stopped after update 7" in stopped.stderr
    done = run_two_processes(tmp_path, **fields)
    assert done.returncode == 0, done.stderr
    assert losses_by_update(tmp_path / "half") == losses_by_update(tmp_path / "whole")


def test_the_documented_command_runs(data, tmp_path):
    recipe = make_recipe(data, tmp_path / "run", max_steps=1)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    script = Path(__file__).parents[1] / "scripts" / "train_detr.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "recipe.yaml", "training.seed=3"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
