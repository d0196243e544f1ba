"""Evaluate a model on a split: `python scripts/evaluate_model.py MODEL DATA [--split test]`.

Prints detection accuracy and, for a scene graph model, recalls beside the frequency baseline on the
same detections and the detector's ceiling; `--output` writes all of it, with the details by class
and predicate, as JSON.
"""

import argparse
import json
import sys
import time
import typing
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import sgtr_hf
from sgtr_hf.command_arguments import add_labels_per_entity
from sgtr_hf.data.training_dataset import Collator, SceneGraphDataset, load_split
from sgtr_hf.metrics.frequency_baseline import FrequencyBaseline
from sgtr_hf.training.evaluation import (
    Evaluator,
    Mode,
    check_vocabularies,
    evaluate,
    format_figures,
)


def main() -> None:
    """Parse, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("data", help="folder that datasets.load_dataset reads")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--mode",
        choices=typing.get_args(Mode),
        default="sgdet",
        help="give the model nothing, the annotated boxes, or boxes and classes",
    )
    add_labels_per_entity(parser)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    try:
        report = evaluate_model(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(format_figures(report["figures"]))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def evaluate_model(options: argparse.Namespace) -> dict[str, Any]:
    """Return figures, details and how they came about."""
    model = AutoModelForObjectDetection.from_pretrained(options.model, dtype=torch.float32)
    image_processor = AutoImageProcessor.from_pretrained(options.model)
    dataset = SceneGraphDataset(load_split(options.data, options.split))
    dataset.check()
    check_vocabularies(model.config, dataset)
    baseline = None
    if isinstance(model, sgtr_hf.SgtrForSceneGraphGeneration):
        train = SceneGraphDataset(load_split(options.data, "train"))
        sizes = (len(train.id2label), len(train.id2predicate))
        baseline = FrequencyBaseline(*sizes).fit(train.references())
    if options.labels_per_entity > 1 and options.mode != "sgdet":
        raise ValueError(
            f"`--labels-per-entity` is of the mode sgdet; the boxes that {options.mode} is given "
            "have one class each."
        )
    evaluator = Evaluator(
        image_processor,
        dataset.id2label,
        dataset.id2predicate,
        baseline,
        labels_per_entity=options.labels_per_entity,
    )
    loader = DataLoader(
        dataset, batch_size=options.batch_size, collate_fn=Collator(image_processor)
    )
    started = time.monotonic()
    evaluate(model, tqdm(loader, unit="batch"), evaluator, options.mode)
    figures = evaluator.compute()
    return {
        "model": str(options.model),
        "data": str(options.data),
        "split": options.split,
        "mode": options.mode,
        "labels_per_entity": options.labels_per_entity,
        "images": len(dataset),
        "seconds": round(time.monotonic() - started, 1),
        "version": sgtr_hf.__version__,
        "details": figures.pop("details"),
        "figures": figures,
    }


if __name__ == "__main__":
    main()
