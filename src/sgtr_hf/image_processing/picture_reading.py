"""Pictures in any form become RGB images of 8 bits."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_utils import load_image


# Files that folders of pictures are made of.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_CHANNELS = (1, 3, 4)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_REMEDY = "Set `PIL.Image.MAX_IMAGE_PIXELS` to allow more."


def read_image(source: Any, timeout: float | None = None) -> Image.Image:
    """Open a picture of any kind as 8-bit RGB, upright as its EXIF tag says.

    Args:
        source: A path or URL, a PIL image of any mode, or an array or tensor (H, W), (H, W, C) or
            (C, H, W) of 1, 3 or 4 channels: 8 or 16 bits, or floats in [0, 1].
        timeout: Seconds to wait for a URL.

    Raises:
        ValueError: If it cannot be read, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
        TypeError: If it is not a picture.
    """
    if isinstance(source, (str, bytes)) or hasattr(source, "__fspath__"):
        try:
            with _open(str(source), timeout) as image:
                return _upright_rgb(image)
        except _TOO_LARGE as error:
            raise ValueError(
                f"{source} is refused: it has more pixels than the limit of "
                f"{Image.MAX_IMAGE_PIXELS} pixels. {_REMEDY}"
            ) from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{source} cannot be read as a picture: {error}") from error
    if isinstance(source, (np.ndarray, Tensor)):
        return _array_to_rgb(np.asarray(source))
    if not isinstance(source, Image.Image):
        raise TypeError(
            f"A picture must be a path, URL, PIL image, array or tensor, got "
            f"{type(source).__name__}."
        )
    check_pixels(*source.size)
    try:
        return _upright_rgb(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"The picture is broken and cannot be decoded: {error}") from error


def check_pixels(width: int, height: int) -> None:
    """Reject a size that would take too much memory, before it is taken.

    Pillow itself warns above its limit, and refuses twice as many pixels.

    Raises:
        ValueError: If there are more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(
            f"A picture of {width} x {height} pixels is refused: the limit is {limit} pixels. "
            f"{_REMEDY}"
        )


def _open(source: str, timeout: float | None) -> Image.Image:
    """Open a file without decoding it, or load what is at a URL or in base64."""
    try:
        is_file = Path(source).is_file()
    except OSError:
        # Longer than a name can be.
        is_file = False
    return Image.open(source) if is_file else load_image(source, timeout=timeout)


def _upright_rgb(image: Image.Image) -> Image.Image:
    check_pixels(*image.size)
    return _to_rgb(ImageOps.exif_transpose(image))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode in _WIDE_MODES or image.mode == "F":
        return _array_to_rgb(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colors = image.convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray) -> Image.Image:
    """Bring numbers of any range to 8 bits, and channels to three."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"A picture must have shape (H, W), (H, W, C) or (C, H, W), got {array.shape}."
        )
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:  # noqa: PLR2004
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS:  # noqa: PLR2004
        raise ValueError(f"A picture must have 1, 3 or 4 channels, got shape {array.shape}.")
    if array.ndim == 3 and array.shape[-1] == 1:  # noqa: PLR2004
        array = array[..., 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_8_bits(array))))


def _to_8_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    values = array.astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("The numbers of a picture must be finite and not negative.")
    is_float = np.issubdtype(array.dtype, np.floating)
    highest = values.max()
    if is_float and highest <= 1:
        factor = 255.0
    elif highest <= 255:  # noqa: PLR2004
        factor = 1.0
    elif highest <= 65535:  # noqa: PLR2004
        # 16 bits are scaled, not cut off: 65535 becomes 255.
        factor = 255 / 65535
    else:
        raise ValueError(f"The numbers of a picture must not exceed 65535, got {highest}.")
    if array.dtype == np.uint16:
        factor = 255 / 65535
    return np.asarray((values * factor).round().astype(np.uint8))
