"""Procedural textures of the tabletop scenes: wood, checks, stripes, labels, noise, panels."""

import colorsys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


SIZE = 64
_Texture = NDArray[np.float64]


def write_textures(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Draw `count` square textures, kind after kind, as PNG files; the seed decides them all."""
    generator = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        texture = _KINDS[index % len(_KINDS)](generator)
        path = folder / f"texture-{index:03d}.png"
        Image.fromarray((texture.clip(0, 1) * 255).astype(np.uint8)).save(path)
        paths.append(path)
    return paths


def random_color(
    generator: np.random.Generator, saturation: tuple[float, float] = (0.1, 0.9)
) -> NDArray[np.float64]:
    """A colour as red, green, blue in [0, 1]."""
    hue, value = generator.uniform(), generator.uniform(0.35, 1.0)
    return np.array(colorsys.hsv_to_rgb(hue, generator.uniform(*saturation), value))


def _grid() -> tuple[_Texture, _Texture]:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    return rows, columns


def _mix(weight: _Texture, first: _Texture, second: _Texture) -> _Texture:
    return weight[..., None] * first + (1 - weight[..., None]) * second


def _noise(generator: np.random.Generator) -> _Texture:
    """Fractal noise in [0, 1]: octaves of smoothly enlarged random grids."""
    total = np.zeros((SIZE, SIZE))
    for octave in range(2, 6):
        cells = Image.fromarray(generator.uniform(size=(2**octave, 2**octave)).astype(np.float32))
        total += np.asarray(cells.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) / 2 ** (
            octave - 1
        )
    return (total - total.min()) / (np.ptp(total) + 1e-9)


def _wood(generator: np.random.Generator) -> _Texture:
    rows, _ = _grid()
    rings = np.sin((rows * generator.uniform(3, 9) + _noise(generator)) * 2 * np.pi) / 2 + 0.5
    base = np.array([0.62, 0.43, 0.26]) * generator.uniform(0.6, 1.4)
    return _mix(rings, base, base * generator.uniform(0.6, 0.85))


def _check(generator: np.random.Generator) -> _Texture:
    rows, columns = _grid()
    count = int(generator.integers(2, 8))
    check = ((rows * count).astype(int) + (columns * count).astype(int)) % 2
    return _mix(check.astype(float), random_color(generator), random_color(generator))


def _stripes(generator: np.random.Generator) -> _Texture:
    rows, columns = _grid()
    angle, count = generator.uniform(0, np.pi), generator.uniform(2, 10)
    phase = (rows * np.cos(angle) + columns * np.sin(angle)) * count
    return _mix((phase % 1 < 0.5).astype(float), random_color(generator), random_color(generator))


def _fractal(generator: np.random.Generator) -> _Texture:
    return _mix(_noise(generator), random_color(generator), random_color(generator))


def _plain(generator: np.random.Generator) -> _Texture:
    return random_color(generator) * (0.9 + 0.1 * _noise(generator)[..., None])


def _label(generator: np.random.Generator) -> _Texture:
    """A printed label: bands, a block and lines that look like lettering."""
    colors = [tuple((random_color(generator) * 255).astype(int)) for _ in range(4)]
    picture = Image.new("RGB", (SIZE, SIZE), colors[0])
    draw = ImageDraw.Draw(picture)
    top = int(generator.integers(8, 24))
    draw.rectangle((0, top, SIZE, top + 24), fill=colors[1])
    draw.ellipse((8, top + 4, 24, top + 20), fill=colors[2])
    for line in range(3):
        width = int(generator.integers(12, 32))
        y = top + 6 + 6 * line
        draw.line((28, y, 28 + width, y), fill=colors[3], width=2)
    return np.asarray(picture) / 255.0


_KINDS: tuple[Callable[[np.random.Generator], _Texture], ...] = (
    _wood,
    _check,
    _stripes,
    _label,
    _fractal,
    _plain,
)
