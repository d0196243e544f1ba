"""Panels over one picture, in rows."""

from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def make_panels(
    ratio: float, count: int, columns: int, inches: float, title_inches: float
) -> tuple[Figure, list[Any]]:
    """Return a figure with room for panels, and their axes, of which the last may be left over.

    Args:
        ratio: Height over width of the picture.
        count: Panels.
        columns: Panels in a row, at most.
        inches: Width of a panel.
        title_inches: Height of its title.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    size = (inches * columns, (inches * ratio + title_inches) * rows)
    figure = Figure(figsize=size, dpi=110)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.94, wspace=0.03, hspace=0.12)
    all_axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in all_axes:
        axes.set_axis_off()
    return figure, all_axes


def render(figure: Figure) -> Image.Image:
    """Draw a figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
