"""Makes a data set for an overfit check on photographs: relations that follow from COCO's boxes.

    python benchmarks/coco_geometric_relations.py INSTANCES.json IMAGES OUTPUT

Each entity is related with its nearest neighbour: inside, overlapping, or on the side on which it
lies. Both splits hold the same images, so figures show that the path works, and nothing more; see
recipes/sgtr_plus_coco_overfit.yaml.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from sgtr_hf.boxes import box_area
from sgtr_hf.data.coco_reader import read_coco
from sgtr_hf.data.schema import scene_graph_features


PREDICATES = ("inside", "overlapping", "left of", "right of", "above", "below")
MOST_ENTITIES = 15
# Share of the smaller box that must lie in the larger one.
INSIDE = 0.9


def relate(boxes: Tensor) -> list[tuple[int, int, int]]:
    """Relate each box with the nearest one, smaller with larger: (E, 4) corners to triples."""
    if len(boxes) < 2:  # noqa: PLR2004
        return []
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    gaps = (low - high).clamp(min=0).norm(dim=-1)
    shares = (high - low).clamp(min=0).prod(-1) / box_area(boxes)[:, None].clamp(min=1)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    distances = (centres[:, None] - centres[None]).norm(dim=-1)
    # Touching boxes are ranked by their centres.
    order = (gaps * 1e3 + distances).fill_diagonal_(torch.inf)
    relations = set()
    for index, nearest in enumerate(order.argmin(1).tolist()):
        subject, object_ = sorted((index, nearest), key=lambda entry: float(box_area(boxes[entry])))
        if shares[subject, object_] >= INSIDE:
            name = "inside"
        elif gaps[subject, object_] == 0:
            name = "overlapping"
        else:
            x, y = (centres[subject] - centres[object_]).tolist()
            sides = ("left of", "right of") if abs(x) > abs(y) else ("above", "below")
            name = sides[(x if abs(x) > abs(y) else y) > 0]
        relations.add((subject, object_, PREDICATES.index(name)))
    return sorted(relations)


def make_records(instances: Path, images: Path) -> Iterator[dict[str, Any]]:
    """Records of the one schema with the largest entities and their relations."""
    for record in read_coco(instances, images, index=True).checked():
        entities = sorted(record["objects"], key=lambda entity: -_area(entity["bbox"]))
        entities = entities[:MOST_ENTITIES]
        boxes = torch.tensor([entity["bbox"] for entity in entities]).reshape(-1, 4)
        relations = [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in relate(boxes)
        ]
        yield record | {"objects": entities, "relations": relations}


def _area(bbox: list[float]) -> float:
    return (bbox[2] - bbox[0]) * (bbox[3] - bbox[1])


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instances", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    source = read_coco(options.instances, options.images)
    features = scene_graph_features(source.entity_names, PREDICATES)
    rows = list(make_records(options.instances, options.images))
    data = datasets.Dataset.from_list(rows, features=features)
    options.output.mkdir(parents=True)
    for split in ("train", "validation"):
        data.to_parquet(options.output / f"{split}-00000-of-00001.parquet")
    num_relations = sum(len(row["relations"]) for row in rows)
    print(f"{options.output}: {len(rows)} images, {num_relations} relations")


if __name__ == "__main__":
    main()
