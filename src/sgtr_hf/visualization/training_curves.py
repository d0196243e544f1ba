"""Draws the log of a training run."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


# Entries of a line that are no curves.
_BOOKKEEPING = (
    "split", "step", "epoch", "seconds", "learning_rate", "images_per_second", "weight_decay",
    "teacher_momentum", "teacher_temperature",
)  # fmt: skip
_METRICS = ("AP", "AP50", "R@20", "mR@20", "R@50", "mR@50", "baseline_R@20", "baseline_mR@20",
            "knn_top1", "top1", "top5")  # fmt: skip
MAX_LOSSES = 8


def draw_training_curves(log_path: Path, output: Path) -> None:
    """Draw losses, learning rate and metrics of a `log.jsonl` over the steps, as one PNG.

    Args:
        log_path: JSON lines, each with "split" and "step"; a broken line is left out.
        output: The picture's file.

    Raises:
        ValueError: If the log has no line.
    """
    lines = read_log(log_path)
    if not lines:
        raise ValueError(f"The log {log_path} has no complete line; train for a while first.")
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, rate_axes, metric_axes = figure.subplots(1, 3)
    train = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] != "train"]
    names = [name for name in (train[0] if train else {}) if name not in _BOOKKEEPING]
    # Losses of the earlier levels follow those of the last; the first few tell the story.
    final_names = [name for name in names if not name[-1].isdigit()][:MAX_LOSSES]
    _plot(loss_axes, train, final_names, "loss", logarithmic=True)
    _plot(rate_axes, train, ["learning_rate"], "learning rate", logarithmic=False)
    metrics = [name for name in _METRICS if any(name in line for line in validation)]
    _plot(metric_axes, validation, metrics, "validation", logarithmic=False, marker="o")
    metric_axes.set_ylim(0, 1)
    figure.savefig(output, dpi=110)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a log; an interruption may have cut the last one."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def _plot(
    axes: Axes,
    lines: list[dict[str, Any]],
    names: list[str],
    title: str,
    *,
    logarithmic: bool,
    marker: str = "",
) -> None:
    for name in names:
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=name, marker=marker, linewidth=1)
    axes.set_title(title)
    axes.set_xlabel("updates")
    axes.grid(alpha=0.3)
    if logarithmic and lines:
        axes.set_yscale("log")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, framealpha=0.5)
