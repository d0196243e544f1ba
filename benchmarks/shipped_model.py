"""Times one 640 x 480 picture through the shipped model, stage by stage, on an idle machine.

Prints the median of each stage in milliseconds, its share, and the whole as a ratio to a reference
measured in the same run: the backbone of the model alone on the same input.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib import resources

import torch
from PIL import Image
from transformers import AutoImageProcessor

import sgtr_hf
from sgtr_hf.auto import DEFAULT_CHECKPOINT
from sgtr_hf.modeling.batch_norm_folding import FoldedInference


def median_milliseconds(stages: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the median time of each stage, all in turn: the machine's speed drifts meanwhile."""
    times: dict[str, list[float]] = {name: [] for name in stages}
    for repeat in range(repeats + 3):
        for name, stage in stages.items():
            started = time.perf_counter()
            stage()
            # Three warm-up turns.
            if repeat >= 3:  # noqa: PLR2004
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    image = Image.open(resources.files("sgtr_hf") / "assets" / "tabletop.jpg").convert("RGB")
    model = sgtr_hf.SgtrForSceneGraphGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    processor = AutoImageProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    pipe = sgtr_hf.SceneGraphPipeline(model=model, image_processor=processor)
    infer = FoldedInference()
    inputs = processor(images=image, return_tensors="pt")
    outputs = model(**inputs)
    sizes = torch.tensor([[image.height, image.width]])
    nodes = model.model(**inputs)
    stages = {
        "processing": lambda: processor(images=image, return_tensors="pt"),
        "model (with assembling)": lambda: infer(model, **inputs),
        "the same, norms not folded": lambda: model(**inputs),
        "  of it detector": lambda: model.model.detector.model(**inputs),
        "  of it heads and assembling": lambda: model.read_levels(
            nodes, nodes.triplets, sizes, all_levels=False
        ),
        "post-processing": lambda: processor.post_process_scene_graph(outputs, target_sizes=sizes),
        "whole pipeline": lambda: pipe(image),
        "reference: backbone alone": lambda: model.model.detector.model.backbone(
            inputs["pixel_values"]
        ),
    }
    times = median_milliseconds(stages, options.repeats)
    whole, reference = times["whole pipeline"], times["reference: backbone alone"]
    print(f"picture {image.width} x {image.height}, {torch.get_num_threads()} threads")
    for name, value in times.items():
        print(f"{name:30s} {value:7.1f} ms  {value / whole:6.1%}")
    print(f"whole pipeline / backbone alone = {whole / reference:.2f}")


if __name__ == "__main__":
    main()
