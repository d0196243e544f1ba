"""A row a model: accuracy in three modes, size and time, on one split.

    python benchmarks/scene_graph_table.py DATA MODEL [MODEL ...] [--labels-per-entity 2]

The rival of `dense_pair_head.py` is one of the models; it takes no given entities. Recalls are of
the graphs as emitted; "left, ..." is the least recall at 20 of left of, right of, in front of and
behind. Time is the median of a forward pass of one image, post-processing included; all models take
turns, since the clock of a machine drifts, and the machine must be idle (`--only-time` measures
nothing else). Below the table stands how far each model is from the first in R@20 and mR@20, with
the standard error of the difference over images drawn anew a thousand times, the same for both.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoImageProcessor

from dense_pair_head import DensePairHead
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.command_arguments import add_labels_per_entity
from sgtr_hf.data.training_dataset import Collator, SceneGraphDataset, load_split
from sgtr_hf.metrics.frequency_baseline import FrequencyBaseline
from sgtr_hf.metrics.recall import SceneGraphRecall
from sgtr_hf.metrics.training_triplets import TrainingTriplets, count_training_triplets
from sgtr_hf.training.class_calibration import fit_class_scores
from sgtr_hf.training.evaluation import UNCONSTRAINED, Evaluator, evaluate


Shares: TypeAlias = NDArray[np.float64]
PLACE_PREDICATES = ("left of", "right of", "in front of", "behind")
COLUMNS = (
    "AP50", "R@20", "R@50", "mR@20", "mR@50", "zR@20", "of ceiling", "left, ...",
    "SGCls R@20", "PredCls R@20", "parameters (M)", "ms",
)  # fmt: skip
NUM_TIMED = 30
NUM_UNTIMED = 3  # to warm up
NUM_DRAWS = 1000


class RecordingEvaluator(Evaluator):
    """Also measures the recall of triplets that training has never seen."""

    def __init__(
        self, seen_triplets: TrainingTriplets, *arguments: Any, labels_per_entity: int
    ) -> None:
        super().__init__(*arguments, labels_per_entity=labels_per_entity)
        self.zero_shot = SceneGraphRecall(protocol=UNCONSTRAINED, seen_triplets=seen_triplets)

    def update(self, outputs: Any, references: list[Any]) -> None:
        """Add a batch."""
        super().update(outputs, references)
        sizes = torch.tensor([reference.image_size for reference in references])
        graphs = self.image_processor.post_process_scene_graph(
            outputs, target_sizes=sizes, labels_per_entity=self.labels_per_entity
        )
        self.zero_shot.update(graphs, references)


def load_model(path: str) -> SgtrForSceneGraphGeneration:
    """Load a scene graph model, or the rival."""
    architectures = AutoConfig.from_pretrained(path).architectures or []
    kind = DensePairHead if "DensePairHead" in architectures else SgtrForSceneGraphGeneration
    return kind.from_pretrained(path, dtype=torch.float32).eval()


class FoundShares(NamedTuple):
    """What a model finds in each of I images among its first 20 triplets."""

    all: Shares
    """(I,) share of the annotated triplets; NaN without any."""
    by_predicate: Shares
    """(I, P) the same of each predicate."""

    @classmethod
    def of(cls, recall: SceneGraphRecall, num_predicates: int) -> "FoundShares":
        """Read them off a metric that has seen the images."""
        state = recall.state_dict()
        counts = state["relation_counts"]
        image = np.repeat(np.arange(len(counts)), counts)
        is_found = (state["ranks"] >= 0) & (state["ranks"] < 20)  # noqa: PLR2004
        found, annotated = np.zeros((2, len(counts), num_predicates))
        np.add.at(annotated, (image, state["predicates"]), 1)
        np.add.at(found, (image, state["predicates"]), is_found)
        with np.errstate(invalid="ignore"):
            return cls(found.sum(1) / annotated.sum(1), found / annotated)

    def draw(self, weights: Shares) -> tuple[Shares, Shares]:
        """Return R@20 and mR@20 of (D, I) numbers of times that images are drawn."""
        recall = _weighted_mean(weights, self.all[:, None])[:, 0]
        return recall, np.nanmean(_weighted_mean(weights, self.by_predicate), axis=1)


def _weighted_mean(weights: Shares, values: Shares) -> Shares:
    is_known = ~np.isnan(values)
    means: Shares = (weights @ np.where(is_known, values, 0)) / (weights @ is_known)
    return means


def compare(first: FoundShares, other: FoundShares) -> list[tuple[float, float]]:
    """Return by how much the other one is better in R@20 and mR@20, with standard errors."""
    num_images = len(first.all)
    draws = (
        np.random.default_rng(0)
        .multinomial(num_images, np.full(num_images, 1 / num_images), NUM_DRAWS)
        .astype(np.float64)
    )
    once = np.ones((1, num_images))
    return [
        (float((after - before)[0]), float((drawn_after - drawn_before).std()))
        for before, after, drawn_before, drawn_after in zip(
            first.draw(once), other.draw(once), first.draw(draws), other.draw(draws), strict=True
        )
    ]


def measure(
    path: str,
    dataset: SceneGraphDataset,
    train: SceneGraphDataset,
    labels_per_entity: int,
    calibration: SceneGraphDataset | None,
) -> tuple[dict[str, float], FoundShares]:
    """Return the row of a model, and what it finds in each image."""
    model = load_model(path)
    processor = AutoImageProcessor.from_pretrained(path)
    if calibration is not None:
        fit_class_scores(model, DataLoader(calibration, 16, collate_fn=Collator(processor)))
    references = train.references()
    sizes = (len(train.id2label), len(train.id2predicate))
    baseline = FrequencyBaseline(*sizes).fit(references)
    seen_triplets = count_training_triplets(references)
    row: dict[str, float] = {}
    modes = ["sgdet"] if isinstance(model, DensePairHead) else ["sgdet", "sgcls", "predcls"]
    for mode in modes:
        names = (dataset.id2label, dataset.id2predicate)
        evaluator = RecordingEvaluator(
            seen_triplets,
            processor,
            *names,
            baseline,
            # Given boxes have one class each.
            labels_per_entity=labels_per_entity if mode == "sgdet" else 1,
        )
        loader = DataLoader(dataset, batch_size=16, collate_fn=Collator(processor))
        evaluate(model, loader, evaluator, mode)
        figures = evaluator.compute()
        if mode != "sgdet":
            row[{"sgcls": "SGCls R@20", "predcls": "PredCls R@20"}[mode]] = figures["R@20"]
            continue
        shares = FoundShares.of(evaluator.recalls["model"], sizes[1])
        row |= {name: figures[name] for name in ("AP50", "R@20", "R@50", "mR@20", "mR@50")}
        row["zR@20"] = evaluator.zero_shot.compute()["zR@20"]
        row["of ceiling"] = figures["R@20"] / figures["ceiling_R"]
        by_predicate = figures["details"]["model"]["per_predicate"]
        row["left, ..."] = min(by_predicate["R@20"][name] for name in PLACE_PREDICATES)
    row["parameters (M)"] = sum(entry.numel() for entry in model.parameters()) / 1e6
    return row, shares


@torch.inference_mode()
def measure_times(paths: list[str], dataset: SceneGraphDataset) -> dict[str, float]:
    """Milliseconds an image of each model."""
    models = {path: load_model(path) for path in paths}
    processors = {path: AutoImageProcessor.from_pretrained(path) for path in paths}
    inputs = {
        path: processor(images=dataset[0].image, return_tensors="pt")["pixel_values"]
        for path, processor in processors.items()
    }
    times: dict[str, list[float]] = {path: [] for path in paths}
    for _ in range(NUM_TIMED + NUM_UNTIMED):
        for path in paths:
            started = time.perf_counter()
            processors[path].post_process_scene_graph(models[path](inputs[path]))
            times[path].append((time.perf_counter() - started) * 1e3)
    return {path: statistics.median(times[path][NUM_UNTIMED:]) for path in paths}


def main() -> None:
    """Measure, print a table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--split", default="test")
    parser.add_argument("--output", type=Path)
    add_labels_per_entity(parser)
    parser.add_argument(
        "--calibrate-on", metavar="SPLIT", help="fit the class scores of each model there first"
    )
    parser.add_argument("--only-time", action="store_true", help="print milliseconds an image")
    options = parser.parse_args()
    dataset = SceneGraphDataset(load_split(options.data, options.split))
    train = SceneGraphDataset(load_split(options.data, "train"))
    calibration = None
    if options.calibrate_on is not None:
        calibration = SceneGraphDataset(load_split(options.data, options.calibrate_on))
    times = measure_times(options.models, dataset)
    if options.only_time:
        for path, milliseconds in times.items():
            print(f"{path}: {milliseconds:.1f} ms, {milliseconds / times[options.models[0]]:.2f}")
        return
    rows, shares = {}, {}
    print("| model | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for path in options.models:
        rows[path], shares[path] = measure(
            path, dataset, train, options.labels_per_entity, calibration
        )
        rows[path]["ms"] = times[path]
        cells = [f"{rows[path][name]:.3f}" if name in rows[path] else "" for name in COLUMNS]
        print(f"| {path} | " + " | ".join(cells) + " |", flush=True)
    first = options.models[0]
    for path in options.models[1:]:
        for name, (gain, error) in zip(
            ("R@20", "mR@20"), compare(shares[first], shares[path]), strict=True
        ):
            rows[path] |= {f"{name} gain": gain, f"{name} gain error": error}
            print(f"{path}: {name} {gain:+.3f} beside {first}, standard error {error:.3f}")
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
