"""Two CPU processes, started as users start them; slow, since each imports everything again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgtr_hf.training.checkpoints import find_damage, list_checkpoints
from test_streaming_training import write_shards
from tiny_training_run import (
    losses_by_update,
    make_recipe,
    read_log,
    squares_record,
    write_recipe,
    write_squares,
)


pytestmark = pytest.mark.slow

# The command of the scripts; the second process gets SIGTERM after `stop_after` updates.
WORKER = """
import os, signal, sys
from sgtr_hf.training.command import run_recipe
from sgtr_hf.training.loop import Trainer

original = Trainer._after_update

def after_update(trainer):
    original(trainer)
    assert trainer.accelerator.num_processes == 2
    if trainer.progress.updates == {stop_after} and trainer.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)

Trainer._after_update = after_update
sys.argv = ["train.py", {recipe!r}]
run_recipe("Train.", task={task!r})
"""


def command_of_two_processes(folder, stop_after=0, data_settings=(), **fields):
    recipe = make_recipe(**fields)
    vars(recipe.data).update(data_settings)
    path = write_recipe(recipe, folder)
    script = folder / "worker.py"
    script.write_text(WORKER.format(recipe=str(path), task=recipe.task, stop_after=stop_after))
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]


ENVIRONMENT = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}


def run_two_processes(folder, **fields):
    return subprocess.run(
        command_of_two_processes(folder, **fields), env=ENVIRONMENT, capture_output=True,
        text=True, timeout=900, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def test_a_signal_to_one_process_stops_both_and_resumes_to_the_bit(data, tmp_path):
    fields = {"data": str(data), "batch_size": 2}
    done = run_two_processes(tmp_path, output_dir=str(tmp_path / "whole"), **fields)
    assert done.returncode == 0, done.stderr
    fields["output_dir"] = str(tmp_path / "half")
    stopped = run_two_processes(tmp_path, stop_after=3, **fields)
    assert stopped.returncode == 0, stopped.stderr
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


def test_a_signal_to_torchrun_saves_before_the_processes_end(data, tmp_path):
    fields = {"data": str(data), "output_dir": str(tmp_path / "run"), "batch_size": 2}
    command = command_of_two_processes(
        tmp_path, epochs=1000, evaluate_every=2000, checkpoint_every=2000, **fields
    )
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as launcher:
        log = tmp_path / "run" / "log.jsonl"
        while not (log.exists() and len(log.read_text().splitlines()) > 3):
            assert launcher.poll() is None
            time.sleep(0.2)
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=120)
    assert "Stopped after update" in errors
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert find_damage(checkpoint) is None
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2


def test_the_documented_command_runs(data, tmp_path):
    recipe = make_recipe(data, tmp_path / "run", max_steps=1)
    write_recipe(recipe, tmp_path)
    script = Path(__file__).parents[1] / "scripts" / "train_detr.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "recipe.yaml", "training.seed=3"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
