"""Measures how many images a second are read, and what of the time is not the libraries' own.

Each stage is timed as the package does it, and as the bare calls of datasets, Pillow, torchvision
and torch that it rests on; then two workers read batches, and a training step consumes them. Run it
on an idle machine:

    python benchmarks/data_loading.py datasets/tabletop --images 2000
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import disable_progress_bars
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

import sgtr_hf
from sgtr_hf.auto import DEFAULT_CHECKPOINT
from sgtr_hf.data.dataset_loading import load_image_stream
from sgtr_hf.data.resampling import ResamplingSettings
from sgtr_hf.data.training_augmentation import Augmentation
from sgtr_hf.data.training_dataset import Collator, SceneGraphDataset, prepare_worker


BATCH_SIZE = 16
CROP, COLOR, HUE, SIDES = 0.8, 0.2, 0.1, (192, 224, 256, 288)
PICTURE = datasets.Image()

Picture = tuple[Image.Image, tv_tensors.BoundingBoxes | None]


@dataclass
class Stage:
    """A way to read images.

    Args:
        augmentation: What the package is told.
        bare: The libraries' calls that this takes, on a picture and its boxes.
    """

    augmentation: dict[str, Any]
    bare: Callable[[Image.Image, tv_tensors.BoundingBoxes], Picture]


def flip(image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Picture:
    """Mirror."""
    return functional.horizontal_flip(image), functional.horizontal_flip(boxes)


def crop(image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Picture:
    """Cut the mean of all random windows out."""
    height, width = (round(side * (1 + CROP) / 2) for side in (image.height, image.width))
    return functional.crop(image, 9, 9, height, width), functional.crop(boxes, 9, 9, height, width)


def light(image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Picture:
    """Change brightness and contrast."""
    return functional.adjust_contrast(functional.adjust_brightness(image, 1.1), 0.9), boxes


def color(image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Picture:
    """Change saturation and hue."""
    return functional.adjust_hue(functional.adjust_saturation(image, 1.1), 0.05), boxes


def ladder(image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Picture:
    """Bring the shorter side to the mean of the ladder."""
    side = [round(statistics.mean(SIDES))]
    return functional.resize(image, side), functional.resize(boxes, side)


def everything(image: Image.Image, boxes: tv_tensors.BoundingBoxes) -> Picture:
    """All of them."""
    for change in (flip, crop, light, color, ladder):
        image, boxes = change(image, boxes)
    return image, boxes


STAGES = {
    "bare decoding": Stage({}, lambda image, boxes: (image, boxes)),
    "+ resize ladder": Stage({"resize_sides": SIDES}, ladder),
    "+ flip": Stage({"flip_probability": 1.0}, flip),
    "+ crop": Stage({"least_crop": CROP}, crop),
    "+ brightness, contrast": Stage({"brightness": COLOR}, light),
    "+ saturation, hue": Stage({"saturation": COLOR, "hue": HUE}, color),
    "+ all of them": Stage(
        {"resize_sides": SIDES, "flip_probability": 1.0, "least_crop": CROP, "brightness": COLOR,
         "saturation": COLOR, "hue": HUE},
        everything,
    ),
}  # fmt: skip


def read_by_libraries(split: datasets.Dataset, stage: Stage, index: int) -> Picture:
    """Read an image by the libraries' calls alone."""
    row = split[index].to_pylist()[0]
    image = PICTURE.decode_example(row["image"])
    if not stage.augmentation:
        return image, None
    image = image.convert("RGB")
    corners = torch.tensor([entity["bbox"] for entity in row["objects"]]).reshape(-1, 4)
    boxes = tv_tensors.BoundingBoxes(
        corners, format="XYXY", canvas_size=(image.height, image.width)
    )
    return stage.bare(image, boxes)


def collate_bare(items: list[Picture], processor: Any, *, is_resized: bool) -> torch.Tensor:
    """Make a batch of pictures by the libraries' calls alone, those of one size together."""
    mean, std = processor.image_mean, processor.image_std
    groups: dict[torch.Size, list[torch.Tensor]] = {}
    for image, _ in items:
        tensor = functional.pil_to_tensor(image)
        groups.setdefault(tensor.shape, []).append(tensor)
    tensors: list[torch.Tensor] = []
    for group in groups.values():
        batch = torch.stack(group)
        size = [processor.size["height"], processor.size["width"]]
        if not is_resized and list(batch.shape[-2:]) != size:
            batch = functional.resize(batch, size, antialias=True)
        tensors += functional.normalize(batch.float() / 255, mean, std)
    height, width = (max(tensor.shape[axis] for tensor in tensors) for axis in (1, 2))
    padded = [
        functional.pad(tensor, [0, 0, width - tensor.shape[2], height - tensor.shape[1]])
        for tensor in tensors
    ]
    return torch.stack(padded)


def milliseconds(
    ways: Sequence[Callable[[list[int]], None]], indices: list[int], repeats: int
) -> list[float]:
    """Processor time an image of several ways to read the same images.

    They take turns, batch by batch, and of each batch the quickest repeat counts, so that what else
    the machine does falls on none of them.
    """
    times = [[float("inf")] * len(indices) for _ in ways]
    for _ in range(repeats):
        for first in range(0, len(indices), BATCH_SIZE):
            batch = indices[first : first + BATCH_SIZE]
            for spans, way in zip(times, ways, strict=True):
                started = time.process_time()
                way(batch)
                span = (time.process_time() - started) / len(batch)
                spans[first] = min(spans[first], span)
    return [1000 * statistics.mean(spans[::BATCH_SIZE]) for spans in times]


def measure_stages(
    split: datasets.Dataset, processor: Any, indices: list[int], repeats: int
) -> None:
    """Print a line a stage: the package, the bare calls, the share that is ours."""
    collator = Collator(processor, with_references=False)
    encoded = split.with_format("arrow")
    print(f"{'one process':32s}{'images/s':>10s}{'ms/image':>10s}{'bare ms':>10s}{'ours':>8s}")
    for name, stage in STAGES.items():
        augmentation = Augmentation(**stage.augmentation) if stage.augmentation else None
        dataset = SceneGraphDataset(split, augmentation)
        is_resized = "resize_sides" in stage.augmentation

        def read(batch: list[int], dataset: SceneGraphDataset = dataset) -> list[Any]:
            return [dataset[index] for index in batch]

        def read_bare(batch: list[int], stage: Stage = stage) -> list[Picture]:
            return [read_by_libraries(encoded, stage, index) for index in batch]

        report(name, *milliseconds((read, read_bare), indices, repeats))
        if name in ("bare decoding", "+ all of them"):
            both = (
                lambda batch, read=read: collator(read(batch)),
                lambda batch, read=read_bare, is_resized=is_resized: collate_bare(
                    read(batch), processor, is_resized=is_resized
                ),
            )
            times = milliseconds(both, indices, repeats)
            report(f"{name.removeprefix('+ ')} + collate", *times)


def report(name: str, ours: float, bare: float) -> None:
    """Print a line of the table."""
    share = (ours - bare) / ours
    print(f"{name:32s}{1000 / ours:10.0f}{ours:10.2f}{bare:10.2f}{share:8.1%}")


def measure_loader(name: str, dataset: Any, collator: Any, count: int) -> float:
    """Return and print the images a second of two workers, after their start."""
    loader = DataLoader(
        dataset,
        batch_size=BATCH_SIZE,
        num_workers=2,
        collate_fn=collator,
        worker_init_fn=prepare_worker,
        drop_last=True,
    )
    iterator = iter(loader)
    next(iterator)
    started, num_read = time.perf_counter(), 0
    for _ in range(count // BATCH_SIZE - 1):
        num_read += len(next(iterator)["labels"])
    rate = num_read / (time.perf_counter() - started)
    print(f"{name:32s}{rate:10.0f}")
    return rate


def measure_step(model_name: str, batch: dict[str, Any], repeats: int) -> float:
    """Return the images a second that a training step consumes, on all threads of torch."""
    from transformers import AutoModelForObjectDetection

    model = AutoModelForObjectDetection.from_pretrained(model_name).train()
    spans = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        model(**batch).loss.backward()
        model.zero_grad()
        spans.append(time.perf_counter() - started)
    return len(batch["labels"]) / statistics.median(spans[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="what sgtr_hf.data.load opens")
    parser.add_argument("--split", default="train")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=256, help="side of the model's input")
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help="folder or Hub id")
    options = parser.parse_args()
    disable_progress_bars()
    torch.set_num_threads(1)
    split = sgtr_hf.data.load(options.data, options.split).split
    indices = np.linspace(0, len(split) - 1, min(options.images, len(split))).astype(int).tolist()
    processor = sgtr_hf.SgtrImageProcessor(size={"height": options.size, "width": options.size})
    measure_stages(split, processor, indices, options.repeats)

    print(f"\n{'two workers, with collate':32s}{'images/s':>10s}")
    collator = Collator(processor, with_references=False)
    usual = Augmentation(flip_probability=0.5, brightness=COLOR, least_crop=CROP)
    plain, varied = SceneGraphDataset(split), SceneGraphDataset(split, usual)
    resampled = SceneGraphDataset(split, usual, 0, ResamplingSettings(0.1, 1.0))
    measure_loader("decoding", Subset(plain, indices), collator, len(indices))
    fed = measure_loader("flip, crop, light", Subset(varied, indices), collator, len(indices))
    measure_loader("the same, resampled", resampled, collator, len(indices))
    stream = load_image_stream(options.data, options.split, usual, shuffle_buffer=100)
    measure_loader(
        "the same, streamed", stream.for_training(0, 1, BATCH_SIZE), collator, len(indices)
    )

    batch = collator([varied[index] for index in indices[:BATCH_SIZE]])
    used = measure_step(options.model, batch, options.repeats)
    print(f"\na training step of {options.model} takes {used:.0f} images/s of the {fed:.0f}")


if __name__ == "__main__":
    main()
