"""What relations cost when entities are many: SGTR+ beside the dense pair head.

    python benchmarks/many_entities.py [--model src/sgtr_hf/assets/sgtr-tabletop]

Times all that follows the detector, post-processing included, on random entity nodes of one image,
and the most memory that its tensors take at once. Run it on an idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dense_pair_head import DensePairHead
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.modeling.detection_outputs import EntityLevels, SgtrDetrModelOutput
from sgtr_hf.modeling.modeling_sgtr_detr import entity_probabilities
from sgtr_hf.post_processing import find_scene_graphs


NUM_ENTITIES = (30, 100, 300)
NUM_TIMED = 20


def make_detections(
    model: SgtrForSceneGraphGeneration, num_entities: int, image_size: int
) -> SgtrDetrModelOutput:
    """The memory of an image, and random entity nodes."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(1, 3, image_size, image_size, generator=generator)
    detected = model.model.detector.model(pixel_values)
    boxes = torch.rand(1, num_entities, 4, generator=generator) * 0.3 + 0.2
    states = torch.randn(1, num_entities, model.config.d_model, generator=generator)
    return SgtrDetrModelOutput(last_hidden_state=states, pred_boxes=boxes, memory=detected.memory)


def sgtr_plus(
    model: SgtrForSceneGraphGeneration, detected: SgtrDetrModelOutput
) -> Callable[[], Any]:
    """All that follows the detector in SGTR+."""
    sizes = torch.tensor([[256, 256]])

    def run() -> Any:
        nodes = model.model(detector=detected)
        triplets = model.read_levels(nodes, nodes.triplets, sizes, all_levels=False)
        return find_scene_graphs(model._summarize(nodes.entity_levels, triplets), None)

    return run


def dense_pairs(model: DensePairHead, detected: SgtrDetrModelOutput) -> Callable[[], Any]:
    """All that follows the detector in the rival."""

    def run() -> Any:
        raw = model.model.detector.read_levels(detected)
        levels = EntityLevels(raw.logits, raw.boxes)
        probabilities = entity_probabilities(raw.logits[-1], model.config.detector.classification)
        logits = model.pair_logits(detected.last_hidden_state, probabilities, raw.boxes[-1])
        return find_scene_graphs(model._summarize_pairs(levels, probabilities, logits), None)

    return run


def measure(run: Callable[[], Any]) -> tuple[float, float]:
    """Return median milliseconds and MiB of the highest level of allocated tensors."""
    times = []
    for _ in range(NUM_TIMED + 3):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    level = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            highest = max(highest, level)
    return statistics.median(times[3:]), highest / 2**20


@torch.inference_mode()
def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="src/sgtr_hf/assets/sgtr-tabletop")
    parser.add_argument("--image-size", type=int, default=256)
    options = parser.parse_args()
    model = SgtrForSceneGraphGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    rival = DensePairHead(model.config).eval()
    rival.model.load_state_dict(model.model.state_dict(), strict=False)
    print("| entities | SGTR+ ms | MiB | dense pair head ms | MiB | ratio of times |")
    print("|---|---|---|---|---|---|")
    for count in NUM_ENTITIES:
        detected = make_detections(model, count, options.image_size)
        ours, theirs = measure(sgtr_plus(model, detected)), measure(dense_pairs(rival, detected))
        print(
            f"| {count} | {ours[0]:.1f} | {ours[1]:.1f} | {theirs[0]:.1f} | {theirs[1]:.1f} | "
            f"{ours[0] / theirs[0]:.2f} |"
        )


if __name__ == "__main__":
    main()
