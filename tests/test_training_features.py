"""What a recipe can switch on: clipping, compilation, patience, trackers, the line of progress."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.optimization import clip_each_gradient
from sgtr_hf.training.progress_bar import describe
from sgtr_hf.training.run_log import RunLog
from sgtr_hf.training.sharding import check_shares
from sgtr_hf.training.trackers import start_trackers
from tiny_pictures import classification_recipe, write_picture_rows
from tiny_training_run import losses_by_update, make_recipe, read_log, train, write_squares


pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def test_each_gradient_is_scaled_on_its_own():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1), nn.Linear(1, 1))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    model[2].bias.grad = torch.tensor([0.25])
    model[2].weight.grad = None
    clip_each_gradient(model, 0.5)
    norms = [
        parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None
    ]
    torch.testing.assert_close(torch.stack(norms), torch.tensor([0.5, 0.5, 0.5, 0.5, 0.25]))
    # The direction stays.
    assert model[0].weight.grad.unique().numel() == 1


def test_clipping_by_tensor_follows_the_recipe(data, tmp_path):
    trainer = Trainer(make_recipe(data, tmp_path, max_steps=1, gradient_clip_norm_per_tensor=1e-3))
    norms = []
    original = trainer.optimizer.step

    def step():
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.extend(gradient.norm().item() for gradient in gradients)
        original()

    trainer.optimizer.step = step
    trainer.run()
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)


def test_patience_ends_a_run(data, tmp_path):
    trainer = Trainer(make_recipe(data, tmp_path, epochs=6, patience=2, best_figure="AP50"))
    figures = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    trainer.task.evaluate = lambda *_: {"AP50": next(figures)}
    trainer.run()
    # Two evaluations, a better one, two that are not.
    assert read_log(tmp_path, "validation").keys() == {5, 10, 15, 20}
    assert (trainer.progress.best, trainer.progress.epoch) == (0.3, 4)
    assert (tmp_path / "final").is_dir()
    # The same command does not begin again.
    again = Trainer(make_recipe(data, tmp_path, epochs=6, patience=2, best_figure="AP50"))
    again.task.evaluate = lambda *_: {"AP50": 0.3}
    again.run()
    assert again.progress.updates == 20


def test_a_best_figure_must_be_known(data, tmp_path):
    with pytest.raises(ValueError, match=r"best_figure` must be one of AP, AP50.*got 'R@7'"):
        train(data, tmp_path, max_steps=1, best_figure="R@7")


def test_a_figure_of_which_less_is_better_keeps_no_model(tmp_path):
    data = write_picture_rows(tmp_path / "data")
    recipe = classification_recipe(data, tmp_path / "run", max_steps=1, best_figure="loss")
    with pytest.raises(ValueError, match=r"best_figure` must be one of top1, top5, got 'loss'"):
        Trainer(recipe).run()


def test_shares_that_would_hang_are_refused():
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=4)
    check_shares(accelerator, 8)
    with pytest.raises(ValueError, match=r"9 images; with FSDP .*multiple of the 4 processes"):
        check_shares(accelerator, 9)
    accelerator.distributed_type = DistributedType.MULTI_CPU
    check_shares(accelerator, 9)


# Dynamo looks at `.grad` of whatever it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.slow
def test_a_compiled_model_trains_alike_and_is_saved_alike(data, tmp_path):
    fields = {"max_steps": 2, "ema_decay": 0.0, "evaluate_every": 100}
    train(data, tmp_path / "plain", **fields)
    trainer = train(data, tmp_path / "compiled", compile_backend="eager", **fields)
    plain, compiled = (losses_by_update(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-5)
    saved = torch.load(
        tmp_path / "compiled" / "checkpoint-00000002" / "custom_checkpoint_0.pkl", weights_only=True
    )
    assert saved["last_epoch"] == 2
    assert not any("_orig_mod" in name for name in trainer.model.state_dict())


def test_half_precision_needs_a_gpu(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    # accelerate says so in the first run of a process, later that it has begun otherwise.
    words = r"fp16 mixed precision requires|`mixed_precision='fp16'`"
    with pytest.raises(ValueError, match=words):
        Trainer(make_recipe(data, tmp_path, mixed_precision="fp16"))


def test_a_tracker_that_is_not_installed_is_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr("sgtr_hf.training.trackers.get_available_trackers", list)
    with pytest.raises(ImportError, match="names trackio, which is not installed: `pip install"):
        Trainer(make_recipe(data, tmp_path, trackers=["trackio"]))


def test_trackers_get_the_lines_of_the_log(tmp_path):
    calls = []
    log = RunLog(tmp_path / "log.jsonl", enabled=True, track=lambda *call: calls.append(call))
    log.write("validation", 7, 1.0, {"AP": 0.5, "R@20": None})
    assert calls == [({"validation/AP": 0.5}, 7)]


def test_trackers_get_the_recipe(data, tmp_path):
    class Recorder:
        def init_trackers(self, project, config):
            self.project, self.config = project, config

    recorder = Recorder()
    recipe = make_recipe(data, tmp_path, trackers=["tensorboard"])
    start_trackers(recorder, recipe)
    assert recorder.project == "sgtr-hf"
    assert recorder.config["training.batch_size"] == 4
    assert recorder.config["model.query_type"] == "anchors"
    assert all(isinstance(value, int | float | str) for value in recorder.config.values())


@pytest.mark.slow
def test_tensorboard_shows_a_run(data, tmp_path):
    pytest.importorskip("tensorboard")
    train(data, tmp_path, max_steps=2, trackers=["tensorboard"])
    (events,) = (tmp_path / "sgtr-hf").glob("events*")
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"validation/AP" in content


def test_the_line_of_progress_names_the_largest_parts_and_the_speed():
    values = {
        "loss": 9.0, "loss_class": 1.0, "loss_class_0": 5.0, "loss_box": 3.0,
        "loss_box_1_of_entities": 6.0, "loss_giou": 2.0,
        "loss_denoising_box": 0.5, "loss_predicate": 4.0, "images_per_second": 12.34,
    }  # fmt: skip
    assert describe(values) == (
        "loss 9.000, predicate 4.000, box 3.000, giou 2.000, class 1.000, 12.3 images/s"
    )
