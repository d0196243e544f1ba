"""Measure whether the memory of the host stays flat over a long training.

    python benchmarks/training_memory.py --steps 20000

trains a tiny detector with workers, an average, evaluations and checkpoints. It prints the memory
of the main process and its workers (proportional: what they share counts once; without the code of
libraries, whose share depends on what else runs on the machine) at ten points of the run, and how
much it grew after the first, by which all caches are full.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from sgtr_hf.data.schema import scene_graph_features
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.recipe import DataSettings, Recipe, TrainingSettings


_NUM_IMAGES, _SIDE, _BATCH_SIZE = 64, 64, 2
_MEMORY = ("Pss_Anon:", "Pss_Shmem:")
_MODEL = {
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"],
    },
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "feed_forward_dim": 48,
    "num_attention_heads": 4, "num_queries": 6, "query_type": "anchors",
    "classification": "focal", "num_denoising_groups": 2,
}  # fmt: skip


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000, help="updates (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="that read images")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        points = measure(Path(folder), options.steps, options.workers)
    for updates, megabytes in points:
        print(f"{updates:>8} updates  {megabytes:8.1f} MB")
    growth = points[-1][1] - points[0][1]
    print(f"growth from update {points[0][0]} to {points[-1][0]}: {growth:+.1f} MB")
    if options.output is not None:
        options.output.write_text(json.dumps({"points": points, "growth": growth}) + "\n")


def measure(folder: Path, steps: int, num_workers: int) -> list[tuple[int, float]]:
    """Return memory in MB by updates, at ten points of a run."""
    write_images(folder / "data")
    settings = TrainingSettings(str(folder / "run"), max_steps=steps)
    settings.batch_size, settings.num_threads, settings.ema_decay = _BATCH_SIZE, 1, 0.9
    # Epochs of 32 updates: whatever a run does happens often.
    settings.evaluate_every = settings.checkpoint_every = settings.log_every = 50
    data = DataSettings(str(folder / "data"), brightness=0.2, num_workers=num_workers)
    size = {"size": {"height": _SIDE, "width": _SIDE}}
    recipe = Recipe("detection", data, settings, model=_MODEL, image_processor=size)
    trainer = Trainer(recipe)
    points: list[tuple[int, float]] = []
    after_update = trainer._after_update

    def measure_after_update() -> None:
        after_update()
        if trainer.progress.updates % max(steps // 10, 1) == 0:
            points.append((trainer.progress.updates, own_megabytes()))

    trainer._after_update = measure_after_update
    trainer.run()
    return points


def own_megabytes() -> float:
    """Return the proportional memory of this process and its workers; needs Linux."""
    pids = ["self", *(str(process.pid) for process in multiprocessing.active_children())]
    kilobytes = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kilobytes += sum(int(line.split()[1]) for line in rollup if line.startswith(_MEMORY))
    return kilobytes / 1024


def write_images(folder: Path) -> None:
    """Write squares on noise as a train and a validation split."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for index in range(_NUM_IMAGES):
        pixels = generator.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)
        left, top = (int(value) for value in generator.integers(2, 30, 2))
        pixels[top : top + 24, left : left + 24] = 255
        box = [float(left), float(top), left + 24.0, top + 24.0]
        row = {"image": Image.fromarray(pixels), "image_id": str(index), "relations": []}
        row |= {"width": _SIDE, "height": _SIDE}
        rows.append(row | {"objects": [{"id": 0, "bbox": box, "label": 0}]})
    features = scene_graph_features(["square"], ["beside"])
    for split, part in (("train", rows), ("validation", rows[:8])):
        dataset = datasets.Dataset.from_list(part, features=features)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
