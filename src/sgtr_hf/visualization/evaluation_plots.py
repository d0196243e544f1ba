"""Draws what an evaluation found: calibration, precision over recall, recall of predicates."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


_GROUP_COLORS = {"head": "tab:red", "body": "tab:orange", "tail": "tab:blue"}


def draw_reliability_diagram(precision: Mapping[str, Any], path: Path) -> None:
    """Draw how often predictions of a score are right, and how many there are.

    Args:
        precision: What `report_precision` returns.
        path: The picture's file.

    Raises:
        ValueError: If the scores are no probabilities, or there are none.
    """
    calibration = precision["calibration"]
    counts = np.array(calibration["bins"]["count"])
    if not counts.sum():
        raise ValueError("There is no calibration to draw: no prediction, or scores beyond [0, 1].")
    edges = np.linspace(0, 1, len(counts) + 1)
    shares = np.array(calibration["bins"]["share_right"])
    means = np.array(calibration["bins"]["mean_score"])
    figure = Figure(figsize=(5, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    upper.plot((0, 1), (0, 1), color="gray", linestyle="--", linewidth=1, label="calibrated")
    upper.bar(
        edges[:-1], np.nan_to_num(shares), 1 / len(counts), align="edge", alpha=0.5,
        edgecolor="tab:blue", label="share right",
    )  # fmt: skip
    upper.plot(means, shares, "o", color="tab:blue", markersize=4, label="at the mean score")
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share of right triplets")
    upper.set_title(f"expected calibration error {calibration['ECE']:.3f}")
    upper.legend(fontsize=8)
    lower.bar(edges[:-1], counts, 1 / len(counts), align="edge", color="tab:gray")
    lower.set(xlabel="score", ylabel="triplets", yscale="log")
    figure.savefig(path)


def draw_precision_recall(precision: Mapping[str, Any], path: Path) -> None:
    """Draw precision over recall, and F1 over the threshold.

    Args:
        precision: What `report_precision` returns.
        path: The picture's file.
    """
    curve = {name: np.array(values) for name, values in precision["curve"].items()}
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.plot(curve["recall"], curve["precision"], drawstyle="steps-pre")
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
    left.set_title(f"triplets, average precision {precision['AP']:.3f}")
    total = curve["precision"] + curve["recall"]
    product = 2 * curve["precision"] * curve["recall"]
    f1 = np.divide(product, total, out=np.zeros_like(total), where=total > 0)
    right.plot(curve["threshold"], f1)
    if not math.isnan(precision["best_threshold"]):
        right.axvline(precision["best_threshold"], color="gray", linestyle="--", linewidth=1)
        right.set_title(f"best {precision['best_F1']:.3f} at {precision['best_threshold']:.3f}")
    right.set(ylim=(0, 1), xlabel="least score", ylabel="F1")
    figure.savefig(path)


def draw_predicate_recalls(
    recalls: Mapping[str, float], counts: Mapping[str, int], groups: Mapping[str, Sequence[str]],
    title: str, path: Path,
) -> None:  # fmt: skip
    """Draw the recall of each predicate, the most frequent first.

    Args:
        recalls: Of the annotated predicates.
        counts: How often each is annotated.
        groups: Predicates of each group, for the colours.
        title: As in "R@50".
        path: The picture's file.
    """
    names = sorted(recalls, key=lambda name: (-counts[name], name))
    group_of = {name: group for group, members in groups.items() for name in members}
    figure = Figure(figsize=(max(6, 0.25 * len(names)), 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = [_GROUP_COLORS.get(group_of.get(name, ""), "tab:gray") for name in names]
    axes.bar(range(len(names)), [recalls[name] for name in names], color=colors)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set(title=f"{title} of predicates, most frequent first", ylabel=title, ylim=(0, 1))
    figure.savefig(path)
