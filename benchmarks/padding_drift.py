"""Measures what padding in a batch of mixed sizes changes in the results.

Every picture of the shipped sample is scaled to one of three sizes and goes through the shipped
model alone and in a batch with the others; printed are the differences of the entities' best
probabilities and of their boxes.
"""

from importlib import resources

import datasets
import torch
from transformers import AutoImageProcessor

import sgtr_hf
from sgtr_hf.auto import DEFAULT_CHECKPOINT
from sgtr_hf.pipelines.scene_graph_pipeline import collate_padded


# Shortest sides, in pixels.
SIZES = (160, 192, 224)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    model = sgtr_hf.SgtrForSceneGraphGeneration.from_pretrained(DEFAULT_CHECKPOINT)
    processor = AutoImageProcessor.from_pretrained(DEFAULT_CHECKPOINT)
    folder = resources.files("sgtr_hf") / "assets" / "tabletop_sample"
    images = datasets.load_dataset(str(folder), split="train")["image"]
    inputs = [
        processor(
            images=image,
            size={"height": SIZES[index % 3], "width": SIZES[(index + 1) % 3]},
            return_tensors="pt",
        )
        for index, image in enumerate(images)
    ]
    together = model(**collate_padded([dict(features) for features in inputs]))
    scores, boxes = [], []
    for index, features in enumerate(inputs):
        alone = model(**features)
        # The same query may have moved to another rank: compare the sorted best probabilities.
        best = alone.entity_probabilities[0].amax(-1).sort(descending=True)
        padded = together.entity_probabilities[index].amax(-1).sort(descending=True)
        scores.append((best.values - padded.values).abs())
        is_likely = best.values > 0.5  # noqa: PLR2004
        difference = (
            alone.pred_boxes[0][best.indices] - together.pred_boxes[index][padded.indices]
        ).abs()
        boxes.append(difference[is_likely].amax(-1))
    drift = torch.cat(scores)
    print(f"{len(images)} pictures, shortest sides {SIZES}")
    print(f"best probability of a query: mean {drift.mean():.4f}, largest {drift.max():.4f}")
    likely = torch.cat(boxes)
    print(f"box of a likely entity (share of a side): median {likely.median():.4f}")


if __name__ == "__main__":
    main()
