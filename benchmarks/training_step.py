"""Times a training step of SGTR on 8 images of 15 relations each, and the shares of its parts.

The detector is frozen, as in the release's training on Visual Genome. Run it on an idle machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import ResNetConfig

import sgtr_hf


NUM_IMAGES, NUM_RELATIONS, NUM_ENTITIES = 8, 15, 12
NUM_CLASSES, NUM_PREDICATES = 150, 50


def make_model() -> sgtr_hf.SgtrForSceneGraphGeneration:
    """SGTR for Visual Genome with random weights."""
    torch.manual_seed(0)
    backbone = ResNetConfig(depths=[3, 4, 23, 3], layer_type="bottleneck", out_features=["stage4"])
    detector = {"backbone_config": backbone, "num_labels": NUM_CLASSES}
    names = {index: str(index) for index in range(NUM_PREDICATES)}
    config = sgtr_hf.SgtrConfig(detector_config=detector, id2predicate=names, freeze_detector=True)
    return sgtr_hf.SgtrForSceneGraphGeneration(config).train()


def make_labels() -> list[dict[str, torch.Tensor]]:
    """Random annotations."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    return [
        {
            "class_labels": draw(NUM_CLASSES, NUM_ENTITIES),
            "boxes": torch.rand(NUM_ENTITIES, 4, generator=generator) * 0.4 + 0.2,
            "relations": torch.cat(
                (draw(NUM_ENTITIES, NUM_RELATIONS, 2), draw(NUM_PREDICATES, NUM_RELATIONS, 1)), 1
            ),
        }
        for _ in range(NUM_IMAGES)
    ]


class Stopwatch:
    """Adds up the milliseconds that methods of an object take."""

    def __init__(self, owner: object, *names: str) -> None:
        self.milliseconds = 0.0
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments, **settings)
            self.milliseconds += 1000 * (time.perf_counter() - started)
            return result

        return timed


def step(
    model: sgtr_hf.SgtrForSceneGraphGeneration,
    optimizer: torch.optim.Optimizer,
    pixel_values: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    stopwatch: Stopwatch,
) -> dict[str, float]:
    """Make one update and return the milliseconds of its parts."""
    stopwatch.milliseconds = 0.0
    started = time.perf_counter()
    loss = model(pixel_values, labels=labels).loss
    ready = time.perf_counter()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    end = time.perf_counter()
    heads_and_losses = stopwatch.milliseconds
    return {
        "encoders and decoders": 1000 * (ready - started) - heads_and_losses,
        "heads, assembling, matching and losses": heads_and_losses,
        "backward and update": 1000 * (end - ready),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="480x640")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    model, labels = make_model(), make_labels()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    pixel_values = torch.randn(NUM_IMAGES, 3, height, width)
    stopwatch = Stopwatch(model, "read_levels", "losses")
    runs = [
        step(model, optimizer, pixel_values, labels, stopwatch) for _ in range(options.repeats + 1)
    ][1:]
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    whole = sum(medians.values())
    print(f"{NUM_IMAGES} images of {options.size}, {torch.get_num_threads()} threads")
    for name, value in medians.items():
        print(f"{name:40s} {value:8.0f} ms  {value / whole:6.1%}")


if __name__ == "__main__":
    main()
