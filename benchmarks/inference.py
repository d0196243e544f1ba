"""Times DETR-R50 here and in transformers on the same weights, and SGTR-VG150 beside its backbone.

Run it on an idle machine. The models of a table row take turns in one process, so that ratios hold
even if the clock rate drifts, and each time is the least of its turns, as other work only adds to
it; peak memory is measured in a fresh process each. The backbone of SGTR is timed within forward
passes of the whole. Another reference can be named as an import path:

    python benchmarks/inference.py --reference package.module:function

where the function takes the number of classes and returns a module that maps pixel values to
anything.
"""

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import sgtr_hf
from peak_memory import PeakMemory
from sgtr_hf.post_processing import find_scene_graphs
from transformers_weights import DETR_RULES, copy_weights


NUM_CLASSES, NUM_PREDICATES = 150, 50
MODES = ("eager", "channels-last", "compile", "bf16")
WITNESS, OURS, SGTR, BACKBONE = "detr (transformers)", "detr (ours)", "sgtr", "its backbone"


class Case(NamedTuple):
    """What a row of the table is about."""

    mode: str
    batch_size: int
    height: int
    width: int

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and images."""
        return torch.bfloat16 if self.mode == "bf16" else torch.float32

    def images(self) -> Tensor:
        """Random images."""
        images = torch.randn(self.batch_size, 3, self.height, self.width, dtype=self.dtype)
        if self.mode == "channels-last":
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def prepare(self, model: nn.Module) -> nn.Module:
        """Bring a float32 model into the mode; in place, except for compilation."""
        if self.mode == "channels-last":
            return model.to(memory_format=torch.channels_last)
        return model.to(self.dtype)


def resnet(depth: int) -> ResNetConfig:
    """ResNet-50 or ResNet-101 that returns its last stage."""
    blocks = [3, 4, 6 if depth == 50 else 23, 3]  # noqa: PLR2004
    return ResNetConfig(depths=blocks, layer_type="bottleneck", out_features=["stage4"])


def make_model(name: str) -> nn.Module:
    """Build a model in evaluation mode; both DETRs have the same random weights."""
    torch.manual_seed(0)
    if name == SGTR:
        detector = {"backbone_config": resnet(101), "num_labels": NUM_CLASSES}
        names = {index: str(index) for index in range(NUM_PREDICATES)}
        config = sgtr_hf.SgtrConfig(detector_config=detector, id2predicate=names)
        return sgtr_hf.SgtrForSceneGraphGeneration(config).eval()
    if name not in (WITNESS, OURS):
        module, _, function = name.partition(":")
        reference: nn.Module = getattr(importlib.import_module(module), function)(NUM_CLASSES)
        return reference.eval()
    witness = DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False,
            backbone=None,
            backbone_config=resnet(50),
            num_labels=NUM_CLASSES,
        )
    )
    if name == WITNESS:
        return witness.eval()
    config = sgtr_hf.SgtrDetrConfig(backbone_config=resnet(50), num_labels=NUM_CLASSES)
    ours = sgtr_hf.SgtrDetrForObjectDetection(config)
    copy_weights(witness, ours, DETR_RULES)
    return ours.eval()


def least_times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least milliseconds of calls that take turns, after two turns to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: min(found) for name, found in times.items()}


class Stopwatch:
    """Times the calls of a module within those of the model around it, in milliseconds."""

    def __init__(self, module: nn.Module) -> None:
        self.times: list[float] = []
        self._started = 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.times.append(1000 * (time.perf_counter() - self._started))


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Measure the machine's rate of matrix products in GFLOP/s."""
    # Without units for bfloat16 a processor needs seconds for a large product.
    size = size if dtype == torch.float32 else 512
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / 1e6 / least_times({"product": lambda: left @ right}, 10)["product"]


def gigaflops(model: nn.Module, images: Tensor) -> float:
    """Count the operations of a forward pass."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def peak_megabytes(name: str, case: Case) -> float:
    """Memory that a forward pass needs beside the weights; for a process of its own."""
    model = case.prepare(make_model(name))
    images = case.images()
    call = torch.compile(model) if case.mode == "compile" else model
    # Building the model took more than holding it does; that does not count.
    memory = PeakMemory()
    call(images)
    return memory.growth()


def in_fresh_process(name: str, case: Case) -> float:
    """Measure peak memory where nothing ran before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_megabytes, name, case).result()


def post_processing(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A call of post-processing on spread predictions; those of random weights are all alike."""
    outputs = dict(model(images))
    outputs["pred_boxes"] = torch.rand_like(outputs["pred_boxes"]) * 0.4 + 0.3
    for name in ("entity_probabilities", "predicate_probabilities", "subject_scores",
                 "object_scores"):  # fmt: skip
        outputs[name] = torch.rand_like(outputs[name])
    sizes = torch.tensor([images.shape[-2:]] * len(images))
    return lambda: find_scene_graphs(outputs, sizes, top_k=300)


@torch.inference_mode()
def measure(case: Case, names: Sequence[str], repeats: int) -> None:
    """Print a row for each model, and what lies around the backbone of SGTR."""
    images, rate = case.images(), matrix_rate(case.dtype)
    models = {name: case.prepare(make_model(name)) for name in names}
    work = {name: gigaflops(model, images) for name, model in models.items()}
    calls: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        run = torch.compile(model) if case.mode == "compile" else model
        calls[name] = lambda run=run: run(images)
    # Hooks would break a compiled graph apart.
    inner = None
    if SGTR in models and case.mode != "compile":
        backbone = models[SGTR].model.detector.model.backbone
        # The detector brings images into this layout, in all modes.
        arranged = images.contiguous(memory_format=torch.channels_last)
        work[BACKBONE] = gigaflops(backbone, arranged)
        calls["post-processing"] = post_processing(models[SGTR], images)
        inner = Stopwatch(backbone)
    times = least_times(calls, repeats)
    for name in names:
        share = work[name] / times[name] * 1000 / rate
        print(
            f"| {case.height}x{case.width} | {case.batch_size} | {case.mode} | {name} | "
            f"{times[name]:.0f} | {times[name] / times[names[0]]:.2f} | "
            f"{in_fresh_process(name, case):.0f} | {work[name]:.0f} | {share:.0%} |",
            flush=True,
        )
    if inner is not None:
        print_shares(times | {BACKBONE: min(inner.times)}, work)


def print_shares(times: dict[str, float], work: dict[str, float]) -> None:
    """Say what lies around the backbone, in time and in operations."""
    around = times[SGTR] - times[BACKBONE] + times["post-processing"]
    operations = (work[SGTR] - work[BACKBONE]) / work[BACKBONE]
    print(
        f"  sgtr: backbone {times[BACKBONE]:.0f} ms, post-processing "
        f"{times['post-processing']:.1f} ms, all around the backbone {around:.0f} ms = "
        f"{around / times[BACKBONE]:.1%} of it ({operations:.1%} of its operations)",
        flush=True,
    )


@torch.inference_mode()
def check_same_weights(case: Case) -> None:
    """Say how far the outputs of both DETRs are apart."""
    witness, ours = (make_model(name)(case.images().zero_() + 0.5) for name in (WITNESS, OURS))
    difference = (witness.logits - ours.logits).abs().max() / witness.logits.abs().max()
    print(f"both DETRs on the same weights: logits differ by {difference:.1e} at most", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["600x800", "800x1066"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--models", nargs="+", default=[WITNESS, OURS, SGTR])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--reference", help="import path of another model, module:function")
    options = parser.parse_args()
    names = [*options.models, *([options.reference] if options.reference else [])]
    sizes = [tuple(map(int, size.split("x"))) for size in options.sizes]
    print(
        f"{torch.get_num_threads()} threads, {matrix_rate(torch.float32):.0f} GFLOP/s in float32 "
        "matrix products",
        flush=True,
    )
    check_same_weights(Case("eager", 1, *sizes[0]))
    print("| size | batch | mode | model | ms | ratio | peak MB | GFLOP | share of rate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for height, width in sizes:
        for batch_size in options.batch_sizes:
            for mode in options.modes:
                measure(Case(mode, batch_size, height, width), names, options.repeats)


if __name__ == "__main__":
    main()
