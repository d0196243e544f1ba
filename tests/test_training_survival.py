"""Whatever ends a run, the same command goes on with it, to the bit."""

import os
import random
import resource
import shutil
import signal
import time

import pytest
import torch
from safetensors import SafetensorError

from sgtr_hf.training.checkpoints import (
    find_checkpoint,
    find_damage,
    list_checkpoints,
    save_model,
)
from sgtr_hf.training.command import run_recipe as run_command
from sgtr_hf.training.loop import Trainer
from tiny_training_run import (
    assert_same_state,
    losses_by_update,
    make_recipe,
    train,
    write_recipe,
    write_squares,
)
from training_processes import run_recipe, start, start_group


pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def fields_of(data, output_dir, **training):
    """A run that is mostly busy with saving."""
    return {
        "data": str(data), "output_dir": str(output_dir), "epochs": 3, "checkpoint_every": 0.2,
        "evaluate_every": 100, "keep_checkpoints": 3,
    } | training  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    process = start(run_recipe, fields_of(data, folder))
    process.join(300)
    assert process.exitcode == 0
    return folder


@pytest.fixture(scope="module")
def short_run(data, tmp_path_factory):
    """A run with checkpoints of updates 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("short")
    fields = {"checkpoint_every": 0.2, "evaluate_every": 100, "keep_checkpoints": 3}
    train(data, folder, max_steps=3, **fields)
    return folder


@pytest.fixture
def checkpoints(short_run, tmp_path):
    """Copies of its checkpoints, to be spoilt."""
    return list_checkpoints(shutil.copytree(short_run, tmp_path / "run"))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def assert_as_whole(folder, whole_run):
    assert losses_by_update(folder) == losses_by_update(whole_run)
    names = [path.name for path in list_checkpoints(whole_run)]
    assert [path.name for path in list_checkpoints(folder)] == names
    for name in names:
        assert_same_state(folder / name, whole_run / name)


def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_bit(data, whole_run, tmp_path):
    for _ in range(2):
        process = start(run_recipe, fields_of(data, tmp_path))
        wait_for((tmp_path / "checkpoint.unfinished").is_dir)
        kill(process)
        assert process.exitcode == -signal.SIGKILL
    train(**fields_of(data, tmp_path))
    assert_as_whole(tmp_path, whole_run)


def wait_for_a_checkpoint(folder, known):
    """Wait for a newer checkpoint than those that were known."""
    wait_for(lambda: set(list_checkpoints(folder)) - set(known))


@pytest.mark.slow
def test_a_run_that_is_killed_at_ten_random_moments_goes_on_to_the_bit(data, tmp_path):
    moments = random.Random(0)
    fields = {"epochs": 8}
    train(**fields_of(data, tmp_path / "whole", **fields))
    folder = tmp_path / "killed"
    for number in range(10):
        known = list_checkpoints(folder)
        process = start(run_recipe, fields_of(data, folder, **fields))
        if number % 3 == 0:
            wait_for((folder / "checkpoint.unfinished").is_dir)
        else:
            wait_for_a_checkpoint(folder, known)
            time.sleep(moments.uniform(0, 0.2))
        kill(process)
        assert process.exitcode == -signal.SIGKILL
    train(**fields_of(data, folder, **fields))
    assert_as_whole(folder, tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_bit(data, tmp_path):
    def run(folder):
        return start_group(run_recipe, 2, fields_of(data, folder, batch_size=2))

    def finish(folder):
        for process in run(folder):
            process.join()
            assert process.exitcode == 0

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    for _ in range(2):
        known = list_checkpoints(killed)
        group = run(killed)
        wait_for_a_checkpoint(killed, known)
        for process in group:
            kill(process)
    finish(killed)
    assert_as_whole(killed, whole)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: os.truncate(path / "optimizer.bin", 100), r"optimizer\.bin has 100 bytes"),
        (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda path: (path / "checkpoint.json").unlink(), r"checkpoint\.json is missing"),
        (lambda path: os.truncate(path / "checkpoint.json", 9), r"checkpoint\.json is missing or"),
    ],
    ids=["cut off", "missing", "no list", "half a list"],
)
def test_a_damaged_checkpoint_is_passed_over(checkpoints, caplog, spoil, words):
    folder = checkpoints[0].parent
    spoil(checkpoints[2])
    assert find_checkpoint(folder, "auto") == checkpoints[1]
    assert caplog.records[0].message.startswith(f"The checkpoint {checkpoints[2]} is passed over")
    with pytest.raises(ValueError, match=words):
        find_checkpoint(folder, str(checkpoints[2]))


def test_a_run_goes_on_from_an_older_checkpoint_and_says_so(data, checkpoints, caplog):
    folder = checkpoints[0].parent
    losses = losses_by_update(folder)
    os.truncate(checkpoints[2] / "random_states_0.pkl", 0)
    with caplog.at_level("INFO"):
        train(data, folder, max_steps=3, checkpoint_every=0.2, evaluate_every=100)
    assert f"Resumed from {checkpoints[1]}." in caplog.text
    assert losses_by_update(folder) == losses
    # It was made again.
    assert find_damage(checkpoints[2]) is None


def test_an_older_checkpoint_is_not_resumed_beside_newer_ones(checkpoints, tmp_path):
    folder = checkpoints[0].parent
    with pytest.raises(ValueError, match=r"is older than .*output_dir"):
        find_checkpoint(folder, str(checkpoints[0]))
    assert find_checkpoint(folder, str(checkpoints[2])) == checkpoints[2]
    # Another run may begin with it.
    assert find_checkpoint(tmp_path / "new", str(checkpoints[0])) == checkpoints[0]
    # What somebody put beside is no checkpoint of the run.
    checkpoints[0].rename(folder / "checkpoint-mybackup")
    assert find_checkpoint(folder, "auto") == checkpoints[2]


def test_another_division_into_batches_is_refused_within_an_epoch(data, tmp_path, caplog):
    train(data, tmp_path, max_steps=2, evaluate_every=100)
    recipe = make_recipe(data, tmp_path, max_steps=4, evaluate_every=100)
    recipe.training.batch_size += 1
    with pytest.raises(ValueError, match=r"within an epoch, with `training\.batch_size` "):
        Trainer(recipe).run()
    train(data, tmp_path / "ended", epochs=1, max_steps=None, evaluate_every=100)
    recipe = make_recipe(data, tmp_path / "ended", epochs=2, max_steps=None, evaluate_every=100)
    recipe.training.seed += 1
    Trainer(recipe).run()
    assert "`training.seed` was" in caplog.text


def test_a_model_that_cannot_be_written_leaves_the_former_one(tmp_path):
    class Model:
        def save_pretrained(self, folder):
            folder.mkdir()
            raise SafetensorError("No space left on device")

    (tmp_path / "best").mkdir()
    with pytest.raises(OSError, match=r"The model best could not be written .*No space left"):
        save_model(Model(), None, tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_run_without_a_complete_checkpoint_is_an_error(checkpoints):
    for path in checkpoints:
        shutil.rmtree(path)
        path.mkdir()
    with pytest.raises(ValueError, match=r"All checkpoints in .* are damaged; delete them"):
        find_checkpoint(checkpoints[0].parent, "auto")


def test_a_full_disk_spoils_no_checkpoint(data, tmp_path):
    recipe = make_recipe(data, tmp_path, max_steps=3, evaluate_every=100, checkpoint_every=100)
    trainer = Trainer(recipe)
    original = trainer._after_update
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def after_update():
        original()
        # From now on no file can grow beyond that.
        if trainer.progress.updates == 1:
            trainer._save_checkpoint()
        if trainer.progress.updates == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            trainer._save_checkpoint()

    trainer._after_update = after_update
    try:
        with pytest.raises(OSError, match=r"update 2 could not be written.*Free some space"):
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-00000001"]
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "checkpoint-00000001"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"]
)
def test_a_signal_saves_and_sets_the_exit_code(data, tmp_path, monkeypatch, number, code):
    recipe = make_recipe(data, tmp_path / "run", max_steps=4, evaluate_every=100)
    original = Trainer._after_update

    def after_update(trainer):
        original(trainer)
        if trainer.progress.updates == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "_after_update", after_update)
    monkeypatch.setattr("sys.argv", ["train_detr.py", str(write_recipe(recipe, tmp_path))])
    with pytest.raises(SystemExit) as stop:
        run_command("Train.", task="detection")
    assert stop.value.code == code
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-00000002"]


def test_a_loss_that_is_not_finite_names_step_images_and_parts(data, tmp_path):
    trainer = Trainer(make_recipe(data, tmp_path, max_steps=3, evaluate_every=100))
    original = trainer.task.compute_losses

    def compute_losses(model, batch, progress):
        losses = original(model, batch, progress)
        return losses | {"loss": losses["loss"] * (torch.nan if progress.updates == 1 else 1)}

    trainer.task.compute_losses = compute_losses
    words = r"after update 1 \(loss nan, loss_class .*with the images squares-\d+, .*process 0"
    with pytest.raises(FloatingPointError, match=words):
        trainer.run()
