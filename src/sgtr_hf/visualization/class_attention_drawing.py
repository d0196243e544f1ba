"""Attention of the class token over its picture: a panel a head, and a heat map for a film."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from .panel_grid import make_panels, render


_INCHES = 2.6
_HEAT_OPACITY = 0.65
_SHADE = 0.25


def draw_class_attention(
    image: Image.Image,
    attention: NDArray[np.floating],
    marked: NDArray[np.bool_] | None = None,
    columns: int = 4,
) -> Image.Image:
    """Draw what each head looks at.

    Args:
        image: As the model saw it.
        attention: (heads, h, w).
        marked: (heads, h, w) patches that hold most of it; the others are darkened, and their
            border is drawn.
        columns: Panels in a row.
    """
    heads = len(attention)
    panels: list[tuple[str, NDArray[Any] | None, NDArray[np.bool_] | None]]
    panels = [("picture", None, None), ("mean", attention.mean(0), None)]
    panels += [
        (f"head {head}", attention[head], None if marked is None else marked[head])
        for head in range(heads)
    ]
    figure, all_axes = make_panels(
        image.height / image.width, len(panels), columns, _INCHES, title_inches=0.25
    )
    for axes, (title, heat, patches) in zip(all_axes, panels, strict=False):
        axes.set_title(title, fontsize=8)
        if heat is None:
            axes.imshow(image)
        elif patches is None:
            axes.imshow(overlay_heat(image, heat))
        else:
            axes.imshow(_keep_marked(image, patches))
            outline = _enlarge(patches, image.size).astype(float)
            axes.contour(outline, levels=[0.5], colors="orange", linewidths=1)
    return render(figure)


def overlay_heat(image: Image.Image, heat: NDArray[np.floating]) -> Image.Image:
    """Lay a heat map (h, w) over its picture, from its smallest to its largest value."""
    lowest, highest = float(heat.min()), float(heat.max())
    strength = (heat - lowest) / (highest - lowest) if highest > lowest else np.zeros(heat.shape)
    colors = (colormaps["inferno"](strength)[..., :3] * 255).astype(np.uint8)
    layer = Image.fromarray(colors).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, layer, _HEAT_OPACITY)


def _keep_marked(image: Image.Image, patches: NDArray[np.bool_]) -> Image.Image:
    pixels = np.asarray(image).astype(np.float32)
    kept = np.where(_enlarge(patches, image.size)[..., None], pixels, pixels * _SHADE)
    return Image.fromarray(kept.astype(np.uint8))


def _enlarge(patches: NDArray[np.bool_], size: Sequence[int]) -> NDArray[np.bool_]:
    layer = Image.fromarray(patches.astype(np.uint8))
    return np.asarray(layer.resize((size[0], size[1]), Image.Resampling.NEAREST)) > 0
