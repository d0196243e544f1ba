"""A data set and a recipe so small that a run takes a second."""

import dataclasses
import json

import numpy as np
import torch
import yaml
from datasets import Dataset
from PIL import Image

from sgtr_hf.data.schema import scene_graph_features
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.recipe import DataSettings, Recipe, TrainingSettings


ENTITIES, PREDICATES = ["red", "green", "blue"], ["left of", "right of", "above"]
DETECTOR = {
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"],
    },
    "frozen_backbone_stages": 0, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2,
    "feed_forward_dim": 48, "num_attention_heads": 4, "num_queries": 6, "dropout": 0.1,
    "query_type": "anchors", "classification": "focal", "num_denoising_groups": 2,
}  # fmt: skip
SCENE_GRAPH = {
    "predicate_encoder_layers": 1, "predicate_decoder_layers": 1, "num_predicate_queries": 6,
    "num_attention_heads": 4, "feed_forward_dim": 32, "detector_config": DETECTOR,
}  # fmt: skip


def squares_record(index):
    """Two coloured squares side by side; the first is left of the second."""
    generator = np.random.default_rng(index)
    pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
    objects = []
    for number, left in enumerate((4, 36)):
        label, top = int(generator.integers(3)), int(generator.integers(4, 36))
        pixels[top : top + 24, left : left + 24] = np.eye(3)[label] * 255
        box = [float(left), float(top), left + 24.0, top + 24.0]
        objects.append({"id": number, "bbox": box, "label": label})
    return {
        "image": Image.fromarray(pixels), "image_id": f"squares-{index}", "width": 64,
        "height": 64, "objects": objects,
        "relations": [{"subject": 0, "object": 1, "predicate": 0}],
    }  # fmt: skip


def write_squares(folder, train=None, num_validation=5):
    """Write a train and a validation split; 20 images to train on unless records are given."""
    folder.mkdir(parents=True, exist_ok=True)
    features = scene_graph_features(ENTITIES, PREDICATES)
    splits = {
        "train": train or [squares_record(index) for index in range(20)],
        "validation": [squares_record(100 + index) for index in range(num_validation)],
    }
    for split, records in splits.items():
        dataset = Dataset.from_list(records, features=features)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def make_recipe(data, output_dir, task="detection", model=None, detector=None, **training):
    """A detection recipe of two epochs of five updates, in which nothing is switched off."""
    defaults = {
        "epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "backbone_learning_rate": 1e-3,
        "warmup_steps": 2, "log_every": 1, "ema_decay": 0.5, "num_threads": 1,
        "gradient_clip_norm": 1.0,
    }  # fmt: skip
    if training.get("max_steps"):
        defaults["epochs"] = None
    return Recipe(
        task=task,
        data=DataSettings(
            str(data), flip_swaps=[PREDICATES[:2]], brightness=0.2, least_crop=0.8, num_workers=0
        ),
        training=TrainingSettings(str(output_dir), **(defaults | training)),
        model=dict(DETECTOR if task == "detection" else SCENE_GRAPH) | (model or {}),
        image_processor={"size": {"height": 64, "width": 64}},
        detector=detector,
    )


def train(*arguments, **fields):
    """Run a recipe to its end."""
    trainer = Trainer(make_recipe(*arguments, **fields))
    trainer.run()
    return trainer


def read_log(folder, split="train"):
    """Lines of the log by update."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["split"] == split}


def losses_by_update(folder):
    """The loss of each update, and no update twice."""
    text = (folder / "log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in text if '"train"' in line]
    assert len(steps) == len(set(steps))
    return {step: line["loss"] for step, line in read_log(folder).items()}


def write_recipe(recipe, folder):
    """Write a recipe file, as the scripts read it."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    return path


def assert_same_state(checkpoint, other):
    """Weights, optimizer, schedule, average, progress and random states are equal to the bit."""
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert (checkpoint / "model.safetensors").read_bytes() == (
        other / "model.safetensors"
    ).read_bytes()
    for name in names:
        if name.endswith((".bin", ".pkl")):
            states = [torch.load(path / name, weights_only=False) for path in (checkpoint, other)]
            _assert_equal(*states, name)


def _assert_equal(value, other, place):
    assert type(value) is type(other), place
    if isinstance(value, dict):
        assert value.keys() == other.keys(), place
        for name in value.keys() - {"seconds"}:
            _assert_equal(value[name], other[name], f"{place}.{name}")
    elif isinstance(value, list | tuple):
        assert len(value) == len(other), place
        for index, pair in enumerate(zip(value, other, strict=True)):
            _assert_equal(*pair, f"{place}[{index}]")
    elif isinstance(value, torch.Tensor):
        assert torch.equal(value, other), place
    elif isinstance(value, np.ndarray):
        assert np.array_equal(value, other), place
    else:
        assert value == other, place
