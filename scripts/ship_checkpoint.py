"""Put a trained model into the package: `python scripts/ship_checkpoint.py RUN REPORT FOLDER`.

Weights are stored as float16, which halves the file and rounds eight times finer than bfloat16, and
load as float32 since the configuration says so. The card is made of the run's record and of the
report of `evaluate_model.py`.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline

from sgtr_hf import SceneGraph, SgtrForSceneGraphGeneration, SgtrImageProcessor
from sgtr_hf.hub.model_card import EXAMPLE_DRAWING, EXAMPLE_THRESHOLD, write_model_card
from sgtr_hf.hub.publication_card import REPORT_NAME
from sgtr_hf.visualization.scene_graph_drawing import draw_scene_graph


MAX_BYTES = 16 * 2**20
SAMPLE = Path("src/sgtr_hf/assets/tabletop.jpg")


def main() -> None:
    """Load, store, write the card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="output folder of a training run")
    parser.add_argument("report", type=Path, help="JSON of evaluate_model.py")
    parser.add_argument("folder", type=Path, help="where the checkpoint goes")
    parser.add_argument(
        "--detector-runs",
        type=Path,
        nargs="*",
        default=[],
        help="runs of the detector it was trained on, the first first",
    )
    options = parser.parse_args()

    model = SgtrForSceneGraphGeneration.from_pretrained(options.run / "final", dtype=torch.float16)
    model.save_pretrained(options.folder)
    config_file = options.folder / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    SgtrImageProcessor.from_pretrained(options.run / "final").save_pretrained(options.folder)
    size = (options.folder / "model.safetensors").stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"error: the weights have {size} bytes, more than {MAX_BYTES}.")
    runs = [*options.detector_runs, options.run]
    report = json.loads(options.report.read_text())
    # What `sgtr-hf push` makes `model-index` of; details by class and predicate would not be read.
    summary = {name: value for name, value in report.items() if name != "details"}
    (options.folder / REPORT_NAME).write_text(json.dumps(summary, indent=2) + "\n")
    write_model_card(
        options.folder / "README.md",
        report,
        [json.loads((run / "training.json").read_text()) for run in runs],
        model.config,
        draw_example(options.folder),
    )


def draw_example(folder: Path) -> SceneGraph:
    """Return the graph of the sample picture, and put its drawing beside the weights."""
    graph = pipeline("scene-graph", model=str(folder))(str(SAMPLE), threshold=EXAMPLE_THRESHOLD)
    drawing = draw_scene_graph(Image.open(SAMPLE), graph)
    drawing.convert("RGB").save(folder / EXAMPLE_DRAWING, quality=80)
    return graph


if __name__ == "__main__":
    main()
