"""Pictures, and recipes of trainings on them, so small that a run takes a second."""

import datasets
import numpy as np
from PIL import Image

from sgtr_hf.image_processing.multi_crop import MultiCropSettings
from sgtr_hf.training.image_recipe import (
    ClassificationData,
    ClassificationRecipe,
    ClassificationTraining,
    SelfDistillationData,
    SelfDistillationRecipe,
    SelfDistillationTraining,
)
from sgtr_hf.training.loop import Trainer


NAMES = ["red", "green", "blue"]
VIT = {
    "image_size": 16, "patch_size": 4, "d_model": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "feed_forward_dim": 32, "drop_path": 0.1,
}  # fmt: skip
HEAD = {"num_prototypes": 20, "head_hidden_dim": 16, "head_bottleneck_dim": 8}


def picture(index):
    """A noisy picture of one of three colours."""
    generator = np.random.default_rng(index)
    pixels = generator.integers(0, 120, (16, 16, 3))
    pixels[..., index % 3] += 130
    return Image.fromarray(pixels.astype(np.uint8))


def write_picture_rows(folder, num_train=24, num_validation=9, num_shards=1):
    """Write Parquet splits with the columns image and label."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    for split, start, count, shards in (
        ("train", 0, num_train, num_shards), ("validation", 999, num_validation, 1),
    ):  # fmt: skip
        rows = [{"image": picture(start + i), "label": (start + i) % 3} for i in range(count)]
        data = datasets.Dataset.from_list(rows, features=features)
        for number in range(shards):
            part = data.shard(shards, number, contiguous=True)
            part.to_parquet(folder / f"{split}-{number:05d}-of-{shards:05d}.parquet")
    return folder


def write_picture_folder(folder, *, with_classes=True):
    """Write the same as image files, in a sub-folder a split and, below it, a class."""
    for split, start, count in (("train", 0, 24), ("validation", 999, 9)):
        for index in range(start, start + count):
            name = NAMES[index % 3] if with_classes else "."
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            picture(index).save(folder / split / name / f"{index}.png")
    return folder


def _defaults(training):
    defaults = {"epochs": 2, "batch_size": 8, "log_every": 1, "num_threads": 1}
    if training.get("max_steps"):
        defaults["epochs"] = None
    return defaults | training


def _processor():
    return {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}


def distillation_recipe(data, output_dir, model=None, data_fields=None, **training):
    """Three updates an epoch."""
    crops = MultiCropSettings(global_size=16, local_size=8, num_local_crops=2)
    fields = {"warmup_epochs": 1.0, "learning_rate": 1e-2, "teacher_momentum": 0.9}
    return SelfDistillationRecipe(
        task="self_distillation",
        data=SelfDistillationData(
            str(data), num_workers=0, crops=crops, neighbour_images=12, **(data_fields or {})
        ),
        training=SelfDistillationTraining(str(output_dir), **_defaults(fields | training)),
        model=VIT | HEAD | (model or {}),
        image_processor=_processor(),
    )


def classification_recipe(data, output_dir, model=None, data_fields=None, **training):
    """Three updates an epoch."""
    fields = {"learning_rate": 3e-3, "warmup_steps": 2, "gradient_clip_norm": 1.0}
    return ClassificationRecipe(
        task="classification",
        data=ClassificationData(
            str(data), num_workers=0, crop_scale=[0.5, 1.0], **(data_fields or {})
        ),
        training=ClassificationTraining(str(output_dir), **_defaults(fields | training)),
        model=VIT | (model or {}),
        image_processor=_processor(),
    )


def run_pretraining(fields):
    """Train to the end, in a process of a group."""
    Trainer(distillation_recipe(**fields)).run()
