"""Videos with masks, as DAVIS keeps them: a folder of frames and one of PNG masks a video."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..image_processing.picture_reading import IMAGE_SUFFIXES


# Of an annotation that says nothing of a pixel.
VOID = 255


class AnnotatedVideo(NamedTuple):
    """One video, and the masks of some of its frames."""

    name: str
    frames: Path
    """Folder of images, or a video file."""
    masks: list[Path]
    """PNG files in the order of the frames, at least that of the first."""


def find_videos(
    frames: str | Path, masks: str | Path, names: Sequence[str] | None = None
) -> list[AnnotatedVideo]:
    """Pair videos with their masks.

    Args:
        frames: A folder with a folder of frames for each video; or one video: a folder of frames
            or a video file.
        masks: A folder with a folder of masks for each video; or those of the one video: a folder,
            or the PNG file of the first frame.
        names: Of the videos to take; all if None.

    Raises:
        ValueError: If there is none, or one has no masks.
    """
    frames, masks = Path(frames), Path(masks)
    if not frames.exists() or not masks.exists():
        raise ValueError(f"There is no {masks if frames.exists() else frames}.")
    if not frames.is_dir() or _has_images(frames):
        found = [AnnotatedVideo(frames.stem, frames, _mask_files(masks))]
    else:
        folders = sorted(folder for folder in frames.iterdir() if folder.is_dir())
        found = [
            AnnotatedVideo(folder.name, folder, _mask_files(masks / folder.name))
            for folder in folders
            if names is None or folder.name in names
        ]
    missing = sorted(set(names or ()) - {video.name for video in found})
    if missing or not found:
        raise ValueError(f"{frames} has no video {missing[0] if missing else 'folders'}.")
    return found


def read_mask(path: str | Path) -> NDArray[np.uint8]:
    """Read the number (H, W) of the object of each pixel, from a PNG with a palette or in grey.

    Raises:
        ValueError: If the file cannot be read or has colours instead of numbers.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "1", "I", "I;16"):
                raise ValueError(
                    f"{path} has mode {image.mode}; a mask must hold numbers of objects, as a PNG "
                    "with a palette or in grey."
                )
            numbers = np.asarray(image)
            if numbers.max() > VOID or numbers.min() < 0:
                raise ValueError(
                    f"{path} has numbers from {numbers.min()} to {numbers.max()}; a mask numbers "
                    f"objects from 1 to {VOID - 1}, 0 is none and {VOID} unknown."
                )
            return numbers.astype(np.uint8)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}") from error


def object_masks(numbers: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Part a mask of numbers (H, W) into objects.

    Returns:
        (objects, H, W) a mask an object, and (H, W) False where the annotation says nothing.
    """
    found = [number for number in np.unique(numbers) if number not in (0, VOID)]
    masks = np.stack([numbers == number for number in found]) if found else _no_masks(numbers)
    return masks, numbers != VOID


def write_masks(
    folder: Path, names: Sequence[str], masks: Iterator[NDArray[np.uint8]], palette: Path
) -> Iterator[NDArray[np.uint8]]:
    """Write masks as PNG files while they pass by, in the colours of a mask's palette."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(palette) as image:
        colors = image.getpalette() if image.mode == "P" else None
    for number, mask in enumerate(masks):
        name = names[number] if number < len(names) else f"{number:05d}"
        picture = Image.fromarray(mask)
        if colors is not None:
            picture.putpalette(colors)
        picture.save(folder / f"{name}.png")
        yield mask


def _no_masks(numbers: NDArray[np.uint8]) -> NDArray[np.bool_]:
    return np.zeros((0, *numbers.shape), dtype=bool)


def _has_images(folder: Path) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir())


def _mask_files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(path.glob("*.png")) if path.is_dir() else []
    if not files:
        raise ValueError(f"{path} holds no mask; it must be a PNG file or a folder of them.")
    return files
