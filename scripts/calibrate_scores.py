"""Fit the meaning of a model's scores: `python scripts/calibrate_scores.py MODEL DATA`.

Writes `class_score_scale`, `class_score_rivalry`, `class_score_offset`, and after that
`score_temperature` and `score_offset` into the model's config.json, so that the score of a triplet
is the probability that it is annotated; use a split that training has not seen.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoImageProcessor

from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.data.training_dataset import Collator, SceneGraphDataset, load_split
from sgtr_hf.scene_graph import SceneGraph
from sgtr_hf.training.class_calibration import fit_class_scores
from sgtr_hf.training.evaluation import check_vocabularies
from sgtr_hf.training.score_calibration import fit_calibration
from sgtr_hf.visualization.evaluation_plots import draw_reliability_diagram


def main() -> None:
    """Parse, predict, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a scene graph model")
    parser.add_argument("data", help="folder that datasets.load_dataset reads")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--plots", type=Path, help="folder for reliability diagrams before and after"
    )
    options = parser.parse_args()
    try:
        calibrate(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def calibrate(options: argparse.Namespace) -> None:
    """Run the model over the split, fit, and save the configuration."""
    model = SgtrForSceneGraphGeneration.from_pretrained(options.model, dtype=torch.float32).eval()
    dataset = SceneGraphDataset(load_split(options.data, options.split))
    check_vocabularies(model.config, dataset)
    processor = AutoImageProcessor.from_pretrained(options.model)
    loader = DataLoader(dataset, batch_size=options.batch_size, collate_fn=Collator(processor))
    classes = fit_class_scores(model, loader)
    print(
        f"classes: scale {classes.class_score_scale:.4f}, rivalry "
        f"{classes.class_score_rivalry:.4f}, offset {classes.class_score_offset:.4f}; negative "
        f"log-likelihood {classes.before:.4f} before, {classes.after:.4f} after"
    )
    predictions, references = predict(model, loader, processor)
    fitted = fit_calibration(model.config, predictions, references)
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        for name, report in (("before", fitted.before), ("after", fitted.after)):
            draw_reliability_diagram(
                {"calibration": report}, options.plots / f"reliability_{name}.png"
            )
    model.config.score_temperature = round(fitted.score_temperature, 4)
    model.config.score_offset = round(fitted.score_offset, 4)
    model.config.save_pretrained(options.model)
    print(
        f"{fitted.num_triplets} triplets of {len(dataset)} images: temperature "
        f"{fitted.score_temperature:.4f}, offset {fitted.score_offset:.4f}; expected calibration "
        f"error {fitted.before['ECE']:.4f} before, {fitted.after['ECE']:.4f} after"
    )


@torch.inference_mode()
def predict(
    model: SgtrForSceneGraphGeneration, loader: DataLoader[Any], processor: Any
) -> tuple[list[SceneGraph], list[SceneGraph]]:
    """Return predicted and annotated graphs."""
    predictions, references = [], []
    for batch in tqdm(loader, unit="batch"):
        outputs = model(batch["pixel_values"], batch.get("pixel_mask"))
        sizes = torch.tensor([reference.image_size for reference in batch["references"]])
        predictions += processor.post_process_scene_graph(outputs, target_sizes=sizes)
        references += batch["references"]
    return predictions, references


if __name__ == "__main__":
    main()
