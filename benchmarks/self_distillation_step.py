"""Times a step of self-distillation, as a share of the machine's rate of matrix products.

    python benchmarks/self_distillation_step.py [--batch-size 8] [--repeats 5]
    python benchmarks/self_distillation_step.py --recipe recipes/dino_cifar10.yaml --batch-size 64
    python benchmarks/self_distillation_step.py --reference my_module:make_step

Without a recipe it is ViT-S/16 with 65,536 prototypes, 2 crops of 224 and 8 of 96 pixels. A step is
forward, backward, limits of gradients, AdamW and the teacher's average. Run it on an idle machine.

A reference is a function of the global crops (2, B, 3, H, W), the local ones (L, B, 3, h, w) and
the number of prototypes that returns a function which makes one step. Both take turns in one
process, so that the ratio holds even if the clock rate drifts; peak memory is of a fresh process
each.
"""

import argparse
import importlib
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sgtr_hf import DinoVitConfig, DinoVitForPreTraining
from sgtr_hf.image_processing.multi_crop import MultiCropSettings
from sgtr_hf.training.image_recipe import IMAGE_RECIPES, SelfDistillationRecipe
from sgtr_hf.training.recipe import load_recipe
from sgtr_hf.training.self_distillation_schedules import limit_gradients, make_parameter_groups


MATRIX_SIZE = 2048
NANOSECONDS = 1e9
Step = Callable[[], None]


def read_settings(options: argparse.Namespace) -> tuple[DinoVitConfig, MultiCropSettings]:
    """The model and the crops to measure."""
    if options.recipe is None:
        return DinoVitConfig(drop_path=0.1), MultiCropSettings()
    recipe = load_recipe(options.recipe, kinds=IMAGE_RECIPES)
    if not isinstance(recipe, SelfDistillationRecipe):
        raise ValueError(f"{options.recipe} is no recipe of self-distillation.")
    return DinoVitConfig(**recipe.model), recipe.data.crops


def make_crops(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random crops of a batch."""
    _, crops = read_settings(options)
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(count, options.batch_size, 3, size, size, generator=generator).to(
            options.device
        )
        for count, size in (
            (2, crops.global_size), (crops.num_local_crops, crops.local_size),
        )
    )  # fmt: skip


def make_own_step(options: argparse.Namespace) -> Step:
    """A step of this package."""
    torch.manual_seed(0)
    config, _ = read_settings(options)
    model = DinoVitForPreTraining(config).to(options.device).train()
    optimizer = torch.optim.AdamW(make_parameter_groups(model), lr=1e-5)
    views, local = make_crops(options)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            loss = model(views, local if len(local) else None).loss
        loss.backward()
        limit_gradients(model, 3.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(0.996)

    return step


def make_reference_step(options: argparse.Namespace) -> Step:
    """A step of another implementation."""
    module, _, name = options.reference.partition(":")
    config, _ = read_settings(options)
    function = getattr(importlib.import_module(module), name)
    return function(*make_crops(options), config.num_prototypes)


def count_operations(options: argparse.Namespace) -> int:
    """Floating point operations of the matrix products of a step."""
    config, _ = read_settings(options)
    # Fused attention is not counted on every device.
    model = DinoVitForPreTraining(config).train()
    model.set_attn_implementation("eager")
    one = argparse.Namespace(**vars(options) | {"batch_size": 1, "device": "cpu"})
    views, local = make_crops(one)
    with FlopCounterMode(display=False) as counter:
        model(views, local if len(local) else None).loss.backward()
    return counter.get_total_flops() * options.batch_size


def matrix_rate(options: argparse.Namespace) -> float:
    """The machine's rate of matrix products in operations a second, the best of ten."""
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    one, two = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=options.device) for _ in range(2)
    )
    return 2 * MATRIX_SIZE**3 / min(measure(lambda: torch.mm(one, two), options) for _ in range(10))


def measure(step: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of a step."""
    if options.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter_ns()
    step()
    if options.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - started) / NANOSECONDS


def report_peak(options: argparse.Namespace, is_reference: bool, queue: object) -> None:
    """Put the peak memory in MB of two steps into a queue; run in a fresh process."""
    torch.set_num_threads(options.threads)
    step = (make_reference_step if is_reference else make_own_step)(options)
    step()
    step()
    if options.device == "cuda":
        queue.put(torch.cuda.max_memory_allocated() / 2**20)
    else:
        # Kilobytes on Linux.
        queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def peak_memory(options: argparse.Namespace, *, is_reference: bool) -> float:
    """Peak memory in MB of a fresh process that makes two steps."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=report_peak, args=(options, is_reference, queue))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", help="takes model and crops of a recipe")
    parser.add_argument("--reference", help="module:function of another implementation")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        steps = {"sgtr_hf": make_own_step(options)}
        if options.reference is not None:
            steps[options.reference] = make_reference_step(options)
    except (ValueError, ImportError, AttributeError) as error:
        sys.exit(f"error: {error}")
    operations, rate = count_operations(options), matrix_rate(options)
    # The first step makes the moments of the optimizer.
    times = [{name: measure(step, options) for name, step in steps.items()}
             for _ in range(options.repeats + 1)][1:]  # fmt: skip
    print(
        f"{options.batch_size} images, {options.threads} threads, {operations / 1e9:.1f} GFLOP a "
        f"step, matrix products at {rate / 1e9:.0f} GFLOP/s"
    )
    for name in steps:
        seconds = statistics.median(turn[name] for turn in times)
        peak = peak_memory(options, is_reference=name != "sgtr_hf")
        print(
            f"{name:30s} {seconds:8.3f} s  {options.batch_size / seconds:7.2f} images/s  "
            f"{operations / seconds / rate:6.1%} of the matrix rate  {peak:7.0f} MB"
        )


if __name__ == "__main__":
    main()
