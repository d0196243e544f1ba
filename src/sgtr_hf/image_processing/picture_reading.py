"""Pictures in any form become RGB images of 8 bits."""

import math
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers.image_utils import load_image


# Files that folders of pictures are made of.
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_WIDE_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_CHANNELS = (1, 3, 4)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_REMEDY = "Set `PIL.Image.MAX_IMAGE_PIXELS` to allow more."
# Of the names of files; text that is longer is a picture in base64.
_LONGEST_NAME = 255


def read_image(source: Any, timeout: float | None = None) -> Image.Image:
    """Open a picture of any kind as 8-bit RGB, upright as its EXIF tag says.

    Args:
        source: A path or URL, the content of a file as bytes or text in base64, a PIL image of any
            mode, or an array or tensor (H, W), (H, W, C) or (C, H, W) of 1, 3 or 4 channels: 8 or
            16 bits, or floats in [0, 1].
        timeout: Seconds to wait for a URL; None waits for as long as it takes.

    Raises:
        ValueError: If it cannot be read, or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`.
        TypeError: If it is not a picture.
    """
    _check_timeout(timeout)
    if isinstance(source, (str, bytes, bytearray)) or hasattr(source, "__fspath__"):
        return _read_encoded(source, timeout)
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        # NumPy has no bfloat16, and a float32 holds each of its numbers.
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source)
    if not isinstance(source, Image.Image):
        raise TypeError(
            f"A picture must be a path, URL, bytes, PIL image, array or tensor, got "
            f"{type(source).__name__}."
        )
    check_pixels(*source.size)
    try:
        return _upright_rgb(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"The picture of mode {source.mode} is broken and cannot be decoded: {error}"
        ) from error


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


def _check_timeout(timeout: Any) -> None:
    if timeout is None:
        return
    is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout < math.inf:
        error = ValueError if is_number else TypeError
        raise error(f"`timeout` must be a number of seconds above 0, or None, got {timeout!r}.")


def _read_encoded(source: Any, timeout: float | None) -> Image.Image:
    """Decode a file, what is at a URL, or bytes; errors name it, but never hold its content."""
    is_content = isinstance(source, (bytes, bytearray))
    name = f"The content of {len(source)} bytes" if is_content else str(source) or "An empty name"
    if len(name) > _LONGEST_NAME and not _is_url(name):
        name = f"{name[:100]}...{name[-100:]}"
    try:
        opened = Image.open(BytesIO(source)) if is_content else _open(str(source), timeout)
        with opened as image:
            return _upright_rgb(image)
    except _TOO_LARGE as error:
        raise ValueError(
            f"{name} is refused: it has more pixels than the limit of "
            f"{Image.MAX_IMAGE_PIXELS} pixels. {_REMEDY}"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{name} cannot be read as a picture: what it holds is in no format of pictures that "
            "Pillow knows."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def _is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def _open(source: str, timeout: float | None) -> Image.Image:
    """Open a file without decoding it, or load what is at a URL or in base64."""
    if _is_url(source):
        return Image.open(BytesIO(_download(source, timeout)))
    try:
        if Path(source).is_file():
            return Image.open(source)
        is_there = bool(source) and Path(source).exists()
    except OSError:
        if len(source) <= _LONGEST_NAME:
            raise
        is_there = False
    if is_there:
        raise ValueError("it is a folder or a device; name a file.")
    return _decode_base64(source)


def _decode_base64(source: str) -> Image.Image:
    try:
        return load_image(source)
    except (IndexError, ValueError) as error:
        cause = error.__context__
    if isinstance(cause, _TOO_LARGE):
        raise cause
    if source.startswith("data:"):
        raise ValueError("the text after the comma must be a picture in base64.")
    raise ValueError("there is no such file, and it is neither a URL nor a picture in base64.")


def _download(url: str, timeout: float | None) -> bytes:
    try:
        response = httpx.get(url, timeout=timeout, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise ValueError(f"the download failed with {type(error).__name__}: {error}") from error
    if not response.is_success:
        raise ValueError(f"the server answered {response.status_code} {response.reason_phrase}.")
    return bytes(response.content)


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
        # Pillow knows one way out of grey levels that are multiplied by their opacity.
        colors = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        white = Image.new("RGBA", colors.size, "white")
        return Image.alpha_composite(white, colors).convert("RGB")
    return image.convert("RGB")


def _array_to_rgb(array: np.ndarray) -> Image.Image:
    """Bring numbers of any range to 8 bits, and channels to three."""
    if array.dtype.kind not in "buif":
        raise TypeError(f"A picture must be an array of numbers, got one of {array.dtype}.")
    if array.ndim == 4:  # noqa: PLR2004
        raise ValueError(
            f"One picture is expected, got a batch of shape {array.shape}; give `list(batch)` "
            "where several pictures are taken, or one of them."
        )
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
