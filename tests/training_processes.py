"""Trainings in processes of their own, which start in an instant: a server has imported all."""

import multiprocessing
import os
import socket
import sys
import traceback

import torch

from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.tasks.scene_tasks import DetectionTask, SceneGraphTask
from tiny_training_run import make_recipe


# What the plus of SGTR+ is.
SGTR_PLUS = {
    "predicate_node_generator": "spatial_aware", "graph_assembling": "unified",
    "pair_queries": True, "num_triplet_denoising_groups": 2, "auxiliary_assignments": 2,
    "predicate_decoder_layers": 2,
}  # fmt: skip


def start(function, *arguments):
    """Run a function of this file in a new process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sgtr_hf.training.loop"])
    process = context.Process(target=_guarded, args=(function, *arguments))
    process.start()
    return process


def start_group(function, num_processes, *arguments):
    """Run a function in processes that find each other as those of `torchrun` do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = []
    for rank in range(num_processes):
        variables = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "ACCELERATE_USE_CPU": "1",
        }  # fmt: skip
        group.append(start(_in_group, variables, function, *arguments))
    return group


def _in_group(variables, function, *arguments):
    os.environ.update(variables)
    function(*arguments)


def _guarded(function, *arguments):
    code = 1
    try:
        function(*arguments)
        code = 0
    except (Exception, KeyboardInterrupt):  # noqa: BLE001 - the other process must not wait for it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Threads of libraries are not waited for.
        os._exit(code)


def run_recipe(fields, data_settings=()):
    """Train to the end."""
    recipe = make_recipe(**fields)
    vars(recipe.data).update(data_settings)
    Trainer(recipe).run()


class _WithPlainSteps:
    """SGD, whose steps are the gradients, and no evaluation."""

    def make_optimizer(self, model):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.005)

    def evaluate(self, model, progress):
        return {self.best_figure: 0.0}


class PlainDetection(_WithPlainSteps, DetectionTask):
    pass


class PlainSceneGraphs(_WithPlainSteps, SceneGraphTask):
    pass


def train_plainly(num_processes, output, fields):
    """Make some updates; keep the first gradients, the last weights and how much was annotated."""
    recipe = make_recipe(**fields)
    task = PlainDetection if recipe.task == "detection" else PlainSceneGraphs
    trainer = Trainer(recipe, task)
    assert trainer.accelerator.num_processes == num_processes
    gradients, counts = [], []
    original_clip, original_prepare = trainer.task.clip_gradients, trainer.task.prepare_update

    def clip_gradients(model, progress):
        gradients.append({name: p.grad.clone() for name, p in named(model) if p.requires_grad})
        return original_clip(model, progress)

    def prepare_update(model, batches):
        counts.append(sum(len(label["boxes"]) for batch in batches for label in batch["labels"]))
        return original_prepare(model, batches)

    def named(model):
        return trainer.accelerator.unwrap_model(model).named_parameters()

    trainer.task.clip_gradients, trainer.task.prepare_update = clip_gradients, prepare_update
    trainer.run()
    rank = trainer.accelerator.process_index
    weights = {name: p.detach().clone() for name, p in named(trainer.model)}
    result = {"gradients": gradients[0], "weights": weights, "counts": counts}
    torch.save(result, f"{output}-{rank}.pt")
