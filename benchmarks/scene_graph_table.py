"""A row a model: accuracy in three modes, size and time, on one split.

    python benchmarks/scene_graph_table.py DATA MODEL [MODEL ...] [--output rows.json]

The rival of `dense_pair_head.py` is one of the models; it takes no given entities. Recalls are of
the graphs as emitted; "left, ..." is the least recall at 20 of left of, right of, in front of and
behind. Time is the median of a forward pass of one image, post-processing included; measure it on
an idle machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor

from dense_pair_head import DensePairHead
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.data.training_dataset import Collator, SceneGraphDataset, load_split
from sgtr_hf.metrics.frequency_baseline import FrequencyBaseline
from sgtr_hf.metrics.recall import SceneGraphRecall
from sgtr_hf.metrics.training_triplets import TrainingTriplets, count_training_triplets
from sgtr_hf.training.evaluation import UNCONSTRAINED, Evaluator, evaluate


PLACE_PREDICATES = ("left of", "right of", "in front of", "behind")
COLUMNS = (
    "AP50", "R@20", "R@50", "mR@20", "mR@50", "zR@20", "of ceiling", "left, ...",
    "SGCls R@20", "PredCls R@20", "parameters (M)", "ms",
)  # fmt: skip
NUM_TIMED = 30


class RecordingEvaluator(Evaluator):
    """Also measures the recall of triplets that training has never seen."""

    def __init__(self, seen_triplets: TrainingTriplets, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.zero_shot = SceneGraphRecall(protocol=UNCONSTRAINED, seen_triplets=seen_triplets)

    def update(self, outputs: Any, references: list[Any]) -> None:
        """Add a batch."""
        super().update(outputs, references)
        sizes = torch.tensor([reference.image_size for reference in references])
        graphs = self.image_processor.post_process_scene_graph(outputs, target_sizes=sizes)
        self.zero_shot.update(graphs, references)


def load_model(path: str) -> SgtrForSceneGraphGeneration:
    """Load a scene graph model, or the rival."""
    architectures = AutoConfig.from_pretrained(path).architectures or []
    kind = DensePairHead if "DensePairHead" in architectures else SgtrForSceneGraphGeneration
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def measure(path: str, dataset: SceneGraphDataset, train: SceneGraphDataset) -> dict[str, float]:
    """Return the row of a model."""
    model = load_model(path)
    processor = AutoImageProcessor.from_pretrained(path)
    references = train.references()
    sizes = (len(train.id2label), len(train.id2predicate))
    baseline = FrequencyBaseline(*sizes).fit(references)
    seen_triplets = count_training_triplets(references)
    row: dict[str, float] = {}
    modes = ["sgdet"] if isinstance(model, DensePairHead) else ["sgdet", "sgcls", "predcls"]
    for mode in modes:
        names = (dataset.id2label, dataset.id2predicate)
        evaluator = RecordingEvaluator(seen_triplets, processor, *names, baseline)
        loader = DataLoader(dataset, batch_size=16, collate_fn=Collator(processor))
        evaluate(model, loader, evaluator, mode)
        figures = evaluator.compute()
        if mode != "sgdet":
            row[{"sgcls": "SGCls R@20", "predcls": "PredCls R@20"}[mode]] = figures["R@20"]
            continue
        row |= {name: figures[name] for name in ("AP50", "R@20", "R@50", "mR@20", "mR@50")}
        row["zR@20"] = evaluator.zero_shot.compute()["zR@20"]
        row["of ceiling"] = figures["R@20"] / figures["ceiling_R"]
        by_predicate = figures["details"]["model"]["per_predicate"]
        row["left, ..."] = min(by_predicate["R@20"][name] for name in PLACE_PREDICATES)
    row["parameters (M)"] = sum(entry.numel() for entry in model.parameters()) / 1e6
    row["ms"] = measure_time(model, processor, dataset)
    return row


@torch.inference_mode()
def measure_time(model: torch.nn.Module, processor: Any, dataset: SceneGraphDataset) -> float:
    """Milliseconds an image."""
    inputs = processor(images=dataset[0].image, return_tensors="pt")
    times = []
    for _ in range(NUM_TIMED + 3):
        started = time.perf_counter()
        processor.post_process_scene_graph(model(inputs["pixel_values"]))
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[3:])


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dataset = SceneGraphDataset(load_split(options.data, options.split))
    train = SceneGraphDataset(load_split(options.data, "train"))
    rows = {}
    print("| model | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for path in options.models:
        rows[path] = measure(path, dataset, train)
        cells = [f"{rows[path][name]:.3f}" if name in rows[path] else "" for name in COLUMNS]
        print(f"| {path} | " + " | ".join(cells) + " |", flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
