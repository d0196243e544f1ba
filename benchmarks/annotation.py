"""How close `sgtr-hf annotate` comes to the bare forward rate of its model.

    python benchmarks/annotation.py [--images 400] [--batch-size 8]

Writes JPEG files of tabletop size into a temporary folder, annotates them (decoding, resizing,
forward, post-processing and writing included), and compares with forward passes of the same
batches that lie ready in memory. The two take turns, since the clock of a machine drifts. The
machine must be idle otherwise.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import sgtr_hf
from sgtr_hf.auto import DEFAULT_CHECKPOINT
from sgtr_hf.data.annotation import AnnotationSettings, Annotator
from sgtr_hf.data.corpus import Corpus, open_corpus


PICTURE = Path(sgtr_hf.__file__).parent / "assets" / "tabletop.jpg"


def main() -> None:
    """Measure, and print a line a round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = AutoModelForObjectDetection.from_pretrained(options.model).eval()
    processor = AutoImageProcessor.from_pretrained(options.model)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        write_pictures(pictures, options.images)
        corpus = open_corpus(pictures, "train", 1000)
        print(f"{options.images} pictures, batch size {options.batch_size}, images per second:")
        for workers in options.workers:
            rates = []
            for number in range(options.rounds):
                bare = forward_rate(model, processor, options)
                output = Path(folder) / f"out-{workers}-{number}"
                whole = annotation_rate(model, processor, corpus, output, workers, options)
                rates.append((bare, whole, whole / bare))
            bare, whole, share = (statistics.median(column) for column in zip(*rates, strict=True))
            print(f"{workers} workers: forward {bare:.2f}, annotate {whole:.2f}, share {share:.3f}")


def write_pictures(folder: Path, count: int) -> None:
    """Write crops of the sample picture, each a little different."""
    folder.mkdir()
    picture = Image.open(PICTURE)
    for number in range(count):
        shift = number % 16
        crop = picture.crop((shift, 0, picture.width - 16 + shift, picture.height))
        crop.save(folder / f"{number:06d}.jpg", quality=90)


@torch.inference_mode()
def forward_rate(model: torch.nn.Module, processor: object, options: argparse.Namespace) -> float:
    """Images per second of the model alone, after one batch to warm up."""
    batch = processor(images=[str(PICTURE)] * options.batch_size, return_tensors="pt")
    model(**batch)
    count = max(options.images // options.batch_size, 1)
    started = time.perf_counter()
    for _ in range(count):
        model(**batch)
    return count * options.batch_size / (time.perf_counter() - started)


def annotation_rate(
    model: torch.nn.Module,
    processor: object,
    corpus: Corpus,
    output: Path,
    workers: int,
    options: argparse.Namespace,
) -> float:
    """Images per second of annotating, from the start of the workers to the last file."""
    settings = AnnotationSettings("model", "none", batch_size=options.batch_size)
    annotator = Annotator(model, processor, settings, output, workers)
    started = time.perf_counter()
    report = annotator.run(corpus)
    return report.annotated / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
