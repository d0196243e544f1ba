import multiprocessing
import os
import shutil
import signal
import subprocess
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sgtr_hf import SgtrDetrForObjectDetection
from sgtr_hf.training.checkpoints import list_checkpoints
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.recipe import load_recipe
from tiny_training_run import (
    losses_by_update,
    make_recipe,
    read_log,
    squares_record,
    train,
    write_squares,
)


pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    """An uninterrupted run with dropout, denoising, crops, an average and all evaluations."""
    folder = tmp_path_factory.mktemp("whole")
    train(data, folder)
    return folder


def interrupt_after(trainer, update):
    """Send SIGTERM to this process after an update, as a scheduler does."""
    original = trainer._after_update

    def after_update():
        original()
        if trainer.progress.updates == update:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._after_update = after_update


@pytest.mark.parametrize("update", [3, 5], ids=["within an epoch", "at the end of an epoch"])
def test_sigterm_saves_a_checkpoint_that_resumes_to_the_bit(data, whole_run, tmp_path, update):
    trainer = Trainer(make_recipe(data, tmp_path))
    interrupt_after(trainer, update)
    with pytest.raises(KeyboardInterrupt, match=f"update {update}"):
        trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{update:08d}"]
    # Other random numbers drawn in between must not matter.
    torch.manual_seed(99)
    train(data, tmp_path)
    assert losses_by_update(tmp_path) == losses_by_update(whole_run)
    resumed, whole = read_log(tmp_path, "validation"), read_log(whole_run, "validation")
    assert {step: line["AP"] for step, line in resumed.items()} == {
        step: line["AP"] for step, line in whole.items()
    }
    weights = [
        SgtrDetrForObjectDetection.from_pretrained(folder / "final").state_dict()
        for folder in (tmp_path, whole_run)
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_signals_to_every_process_of_a_run_lose_nothing(data, tmp_path):
    """Schedulers and Ctrl-C signal the loader's workers too."""
    recipe = make_recipe(data, tmp_path)
    recipe.data.num_workers = 1
    trainer = Trainer(recipe)
    original = trainer._after_update
    # Of tests before this one.
    others = multiprocessing.active_children()

    def after_update():
        original()
        if trainer.progress.updates == 2:
            workers = [child for child in multiprocessing.active_children() if child not in others]
            assert len(workers) == 1
            subprocess.run(["kill", "-TERM", str(workers[0].pid)], check=True)
            workers[0].join(0.5)
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._after_update = after_update
    with pytest.raises(KeyboardInterrupt, match="update 2"):
        trainer.run()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-00000002"]


def test_the_handlers_of_signals_come_back(data, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(data, tmp_path, max_steps=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_run_repeats_what_came_after_its_checkpoint(data, whole_run, tmp_path):
    # Evaluation dies at the end of the first epoch, after the checkpoint; the log goes further.
    trainer = Trainer(make_recipe(data, tmp_path))
    trainer._evaluate = lambda: (_ for _ in ()).throw(RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"split": "train", "step": 6, "loss": 1000}\n{"split": "tr')
    train(data, tmp_path)
    assert losses_by_update(tmp_path) == losses_by_update(whole_run)
    assert read_log(tmp_path, "validation").keys() == {5, 10}


def test_the_same_command_after_the_end_changes_nothing(data, tmp_path):
    train(data, tmp_path, max_steps=2)
    before = losses_by_update(tmp_path)
    trainer = train(data, tmp_path, max_steps=2)
    assert trainer.progress.updates == 2
    assert losses_by_update(tmp_path) == before


def test_a_new_run_does_not_mix_with_an_old_one(data, tmp_path):
    train(data, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"output_dir.*resume=auto"):
        Trainer(make_recipe(data, tmp_path, resume=None))


def test_the_loss_falls_within_twenty_updates(data, tmp_path):
    train(data, tmp_path, max_steps=20, ema_decay=0.0, evaluate_every=100)
    losses = list(losses_by_update(tmp_path).values())
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


def test_log_lines_name_every_loss_and_the_speed(whole_run):
    line = read_log(whole_run)[10]
    assert {"loss", "loss_class", "loss_box", "loss_giou", "loss_denoising_box"} <= line.keys()
    assert {"learning_rate", "images_per_second", "gradient_norm", "seconds"} <= line.keys()
    assert line["epoch"] == 2.0
    assert line["images_per_second"] > 0
    parts = [value for name, value in line.items() if name.startswith("loss_")]
    assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)


def test_a_log_line_averages_all_updates_since_the_last(data, whole_run, tmp_path):
    train(data, tmp_path, log_every=5)
    every = list(losses_by_update(whole_run).values())
    averaged = losses_by_update(tmp_path)
    assert averaged.keys() == {5, 10}
    assert averaged[5] == pytest.approx(sum(every[:5]) / 5, rel=1e-5)
    assert averaged[10] == pytest.approx(sum(every[5:]) / 5, rel=1e-5)


def test_fractions_of_an_epoch_evaluate_and_save_in_between(data, tmp_path):
    train(data, tmp_path, evaluate_every=0.4, checkpoint_every=0.6, keep_checkpoints=2)
    assert read_log(tmp_path, "validation").keys() == {2, 4, 6, 8, 10}
    # Of 3, 6, 9 and the end, the last two stay.
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["checkpoint-00000009", "checkpoint-00000010"]


def test_the_best_model_stays(data, tmp_path):
    trainer = Trainer(make_recipe(data, tmp_path, max_steps=1))
    with torch.no_grad():
        model = trainer._evaluated_model()
        for value, figure in ((1.0, 0.3), (2.0, 0.5), (3.0, 0.4), (4.0, None)):
            model.class_head.bias.fill_(value)
            trainer._keep_best("AP", {"AP": figure, "details": []})
    best = SgtrDetrForObjectDetection.from_pretrained(tmp_path / "best")
    assert best.class_head.bias.unique().tolist() == [2.0]
    assert trainer.progress.best == 0.5
    assert trainer.progress.best_record == {"updates": 0, "figures": {"AP": 0.5}}
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["best"]


@pytest.mark.parametrize("clip", [0.0, 1.0], ids=["unclipped", "clipped"])
def test_a_gradient_that_is_not_finite_leaves_the_weights_alone(data, tmp_path, clip):
    trainer = Trainer(make_recipe(data, tmp_path, max_steps=3, gradient_clip_norm=clip))
    parameter = trainer.model.class_head.bias
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"after update 0 .*loss_class.*learning_rate"):
        trainer.run()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert list_checkpoints(tmp_path) == []


def test_gradient_accumulation_updates_once_in_two_batches(data, tmp_path):
    # Of five batches an epoch, the last makes no update.
    trainer = train(data, tmp_path, gradient_accumulation_steps=2, epochs=2)
    assert trainer.progress.updates == trainer.num_updates == 4
    assert trainer.progress.epoch == 2
    with pytest.raises(ValueError, match=r"20 images.*6 batches of 4.*accumulation_steps"):
        Trainer(make_recipe(data, tmp_path / "few", gradient_accumulation_steps=6))


def test_gradient_checkpointing_changes_memory_only(data, tmp_path):
    fields = {"max_steps": 2, "ema_decay": 0.0, "evaluate_every": 100}
    train(data, tmp_path / "plain", model={"dropout": 0.0}, **fields)
    train(data, tmp_path / "saving", model={"dropout": 0.0}, gradient_checkpointing=True, **fields)
    plain, saving = losses_by_update(tmp_path / "plain"), losses_by_update(tmp_path / "saving")
    assert saving == pytest.approx(plain, rel=1e-5)


def test_the_record_tells_how_to_make_the_model_again(data, whole_run):
    record = yaml.safe_load((whole_run / "training.json").read_text())
    assert {"command", "commit", "seed", "threads", "versions", "processor"} <= record.keys()
    assert record["images_seen"] == 40
    assert record["recipe"] == asdict(make_recipe(data, whole_run))
    assert asdict(load_recipe(whole_run / "recipe.yaml")) == record["recipe"]


def test_too_few_images_are_an_error(tmp_path):
    data = write_squares(tmp_path / "data", train=[squares_record(0)])
    with pytest.raises(ValueError, match=r"1 images.*batches of 4.*training\.batch_size"):
        Trainer(make_recipe(data, tmp_path / "run"))


def test_an_annotation_that_cannot_be_meant_stops_before_training(tmp_path):
    records = [squares_record(index) for index in range(8)]
    records[6]["relations"] = [{"subject": 0, "object": 7, "predicate": 1}]
    data = write_squares(tmp_path / "data", train=records)
    with pytest.raises(ValueError, match=r"squares-6: `relations\[0\]\.object`.*6 good records"):
        Trainer(make_recipe(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_annotations_that_do_not_fit_are_told_with_their_images(data, tmp_path):
    with pytest.raises(ValueError, match=r"`num_queries`.* after update 0, with the images squa"):
        train(data, tmp_path, model={"num_queries": 1, "select_queries": False})


def test_weights_that_are_not_finite_are_named_before_the_first_update(data, whole_run, tmp_path):
    folder = shutil.copytree(whole_run / "final", tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["class_head.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = replace(make_recipe(data, tmp_path / "run"), model={}, pretrained_model=str(folder))
    with pytest.raises(ValueError, match=r"`class_head\.weight` .* holds NaN"):
        Trainer(recipe).run()


@pytest.mark.parametrize("entry", ["pretrained_model", "detector"])
def test_a_model_to_start_from_that_is_not_there_is_named(data, tmp_path, entry):
    task = "detection" if entry == "pretrained_model" else "scene_graph"
    recipe = replace(
        make_recipe(data, tmp_path / "run", task=task), model={}, **{entry: "/nowhere/to/be/found"}
    )
    with pytest.raises(ValueError, match=f"`{entry}` /nowhere/to/be/found is not there"):
        Trainer(recipe).run()
