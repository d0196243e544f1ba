"""Times DETR-R50 here and in transformers on the same weights, and SGTR-VG150 beside its backbone.

Run it on an idle machine. Each case runs in a process of its own, so that its peak memory is its
own; ratios compare cases of one run. Another reference can be named as an import path:

    python benchmarks/inference.py --reference package.module:function

where the function takes the number of classes and returns a module that maps pixel values to
anything.
"""

import argparse
import importlib
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import sgtr_hf
from sgtr_hf.post_processing import find_scene_graphs


NUM_CLASSES, NUM_PREDICATES = 150, 50
MODES = ("eager", "channels-last", "compile", "bf16")


class Case(NamedTuple):
    """What one process measures."""

    model: str
    mode: str
    batch_size: int
    height: int
    width: int
    repeats: int


class Measurement(NamedTuple):
    """What it found."""

    milliseconds: float
    megabytes: float
    """Peak of the process above what it had before the first run."""
    gigaflops: float
    parts: dict[str, float]
    """Milliseconds of parts."""


def median_milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call after two warm-up calls."""
    for _ in range(2):
        function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def resnet(depth: int) -> ResNetConfig:
    """ResNet-50 or ResNet-101 that returns its last stage."""
    blocks = [3, 4, 6 if depth == 50 else 23, 3]  # noqa: PLR2004
    return ResNetConfig(depths=blocks, layer_type="bottleneck", out_features=["stage4"])


def make_model(name: str) -> nn.Module:
    """Build a model with random weights; speed does not depend on them."""
    torch.manual_seed(0)
    if name == "detr (ours)":
        config = sgtr_hf.SgtrDetrConfig(backbone_config=resnet(50), num_labels=NUM_CLASSES)
        return sgtr_hf.SgtrDetrForObjectDetection(config)
    if name == "detr (transformers)":
        return DetrForObjectDetection(
            DetrConfig(
                use_timm_backbone=False, backbone=None, backbone_config=resnet(50),
                num_labels=NUM_CLASSES,
            )
        )  # fmt: skip
    if name == "sgtr":
        detector = {"backbone_config": resnet(101), "num_labels": NUM_CLASSES}
        names = {index: str(index) for index in range(NUM_PREDICATES)}
        return sgtr_hf.SgtrForSceneGraphGeneration(
            sgtr_hf.SgtrConfig(detector_config=detector, id2predicate=names)
        )
    module, _, function = name.partition(":")
    model: nn.Module = getattr(importlib.import_module(module), function)(NUM_CLASSES)
    return model


def prepare(model: nn.Module, pixel_values: Tensor, mode: str) -> Callable[[], Any]:
    """Return a call of the model in a mode."""
    if mode == "channels-last":
        model = model.to(memory_format=torch.channels_last)
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    elif mode == "bf16":
        model, pixel_values = model.to(torch.bfloat16), pixel_values.to(torch.bfloat16)
    elif mode == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    return lambda: model(pixel_values)


@torch.inference_mode()
def measure(case: Case) -> Measurement:
    """Measure one case; runs in its own process."""
    model = make_model(case.model).eval()
    pixel_values = torch.randn(case.batch_size, 3, case.height, case.width)
    with FlopCounterMode(display=False) as counter:
        model(pixel_values)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call = prepare(model, pixel_values, case.mode)
    whole = median_milliseconds(call, case.repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    parts = {}
    if isinstance(model, sgtr_hf.SgtrForSceneGraphGeneration) and case.mode == "eager":
        parts = measure_parts(model, pixel_values, case.repeats)
    return Measurement(whole, peak / 1024, counter.get_total_flops() / 1e9, parts)


def measure_parts(
    model: sgtr_hf.SgtrForSceneGraphGeneration, pixel_values: Tensor, repeats: int
) -> dict[str, float]:
    """Time backbone and post-processing alone, the latter on spread predictions."""
    outputs = dict(model(pixel_values))
    # Of random weights all predictions are alike; these are not.
    outputs["pred_boxes"] = torch.rand_like(outputs["pred_boxes"]) * 0.4 + 0.3
    outputs["entity_probabilities"] = torch.rand_like(outputs["entity_probabilities"])
    outputs["predicate_probabilities"] = torch.rand_like(outputs["predicate_probabilities"])
    for role in ("subject_scores", "object_scores"):
        outputs[role] = torch.rand_like(outputs[role])
    sizes = torch.tensor([pixel_values.shape[-2:]] * len(pixel_values))
    backbone = model.model.detector.model.backbone
    images = pixel_values.contiguous(memory_format=torch.channels_last)
    return {
        "backbone": median_milliseconds(lambda: backbone(images), repeats),
        "post-processing": median_milliseconds(
            lambda: find_scene_graphs(outputs, sizes, top_k=300), repeats
        ),
    }


def matrix_rate() -> float:
    """Measure the machine's rate of float32 matrix products in GFLOP/s."""
    size = 2048
    left, right = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / 1e6 / median_milliseconds(lambda: left @ right, 10)


def run(case: Case) -> Measurement:
    """Measure in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, case).result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["600x800", "800x1066"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--reference", help="import path of another model, module:function")
    options = parser.parse_args()
    models = ["detr (transformers)", "detr (ours)", "sgtr"]
    models += [options.reference] if options.reference else []
    rate = matrix_rate()
    print(f"{torch.get_num_threads()} threads, {rate:.0f} GFLOP/s in float32 matrix products")
    print("| size | batch | mode | model | ms | ratio | peak MB | GFLOP | share of rate |")
    print("|---|---|---|---|---|---|---|---|---|")
    for size in options.sizes:
        height, width = map(int, size.split("x"))
        for batch_size in options.batch_sizes:
            for mode in options.modes:
                reference = None
                for name in models:
                    case = Case(name, mode, batch_size, height, width, options.repeats)
                    found = run(case)
                    reference = reference or found.milliseconds
                    share = found.gigaflops / found.milliseconds * 1000 / rate
                    print(
                        f"| {size} | {batch_size} | {mode} | {name} | {found.milliseconds:.0f} | "
                        f"{found.milliseconds / reference:.2f} | {found.megabytes:.0f} | "
                        f"{found.gigaflops:.0f} | {share:.0%} |",
                        flush=True,
                    )
                    print_parts(found)


def print_parts(found: Measurement) -> None:
    """Say what lies around the backbone."""
    if not found.parts:
        return
    backbone, post_processing = found.parts["backbone"], found.parts["post-processing"]
    around = found.milliseconds - backbone + post_processing
    print(
        f"  SGTR: backbone {backbone:.0f} ms, post-processing {post_processing:.1f} ms, all that "
        f"is not the backbone {around:.0f} ms = {around / backbone:.1%} of it",
        flush=True,
    )


if __name__ == "__main__":
    main()
