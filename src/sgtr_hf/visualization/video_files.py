"""Frames in and out of files: folders of images, animated GIF and WebP, and videos through PyAV."""

import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from ..image_processing.picture_reading import IMAGE_SUFFIXES, read_image


_ANIMATED = (".gif", ".webp")
_VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm")
_MILLISECONDS = 1000


def read_frames(source: str | Path) -> Iterator[Image.Image]:
    """Read the frames of a video one after the other, as RGB pictures.

    Args:
        source: A folder of images, in the order of their names, an animated GIF or WebP, or a
            video file, which needs PyAV.

    Raises:
        ValueError: If there are no frames.
        ImportError: If PyAV is needed and not installed.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"The folder {path} has no image to be a frame.")
        yield from map(read_image, files)
    elif not path.is_file():
        raise ValueError(f"There is no video or folder of frames {path}.")
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        with Image.open(path) as animation:
            for frame in ImageSequence.Iterator(animation):
                yield frame.convert("RGB")
    else:
        av = _load_av()
        try:
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_image()
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"{path} cannot be read as a video: {error}") from error


def check_video_name(path: Path) -> None:
    """Reject a file that `write_video` could not write.

    Raises:
        ValueError: If its ending is of no video.
        ImportError: If PyAV is needed and not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in (*_ANIMATED, *_VIDEOS):
        raise ValueError(
            f"The video {path} must end in one of {', '.join((*_ANIMATED, *_VIDEOS))}."
        )
    if suffix in _VIDEOS:
        _load_av()


def write_video(path: str | Path, frames: Iterable[Image.Image], frames_per_second: float) -> int:
    """Write frames of one size, and return their number.

    Args:
        path: Ends in .gif or .webp for an animated image, else in that of a video, which needs
            PyAV.
        frames: RGB pictures.
        frames_per_second: How fast they are shown.

    Raises:
        ValueError: If there is no frame, frames differ in size, or the ending is of no video.
        ImportError: If PyAV is needed and not installed.
    """
    path = Path(path)
    check_video_name(path)
    if path.suffix.lower() in _VIDEOS:
        return _encode(path, _of_one_size(frames), frames_per_second)
    pictures = list(_of_one_size(frames))
    if not pictures:
        raise ValueError(f"There is no frame to write into {path}.")
    duration = round(_MILLISECONDS / frames_per_second)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return len(pictures)


def _of_one_size(frames: Iterable[Image.Image]) -> Iterator[Image.Image]:
    size: tuple[int, int] | None = None
    for number, frame in enumerate(frames):
        size = size or frame.size
        if frame.size != size:
            raise ValueError(
                f"The frames of a video must have one size; frame {number} has {frame.size}, the "
                f"first {size}."
            )
        yield frame


def _encode(path: Path, frames: Iterator[Image.Image], frames_per_second: float) -> int:
    av = _load_av()
    first = next(frames, None)
    if first is None:
        raise ValueError(f"There is no frame to write into {path}.")
    # Common players want even sides and colours at half resolution.
    width, height = (side - side % 2 for side in first.size)
    with av.open(str(path), "w") as container:
        rate = Fraction(frames_per_second).limit_denominator(1000)
        stream = container.add_stream("h264", rate=rate)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv420p"
        for count, image in enumerate(itertools.chain([first], frames), start=1):  # noqa: B007
            frame = av.VideoFrame.from_image(image.crop((0, 0, width, height)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return count


def _load_av() -> Any:
    try:
        import av
        import av.error
    except ImportError as error:
        raise ImportError(
            'Video files need PyAV, which is not installed: `pip install "sgtr-hf[video]"`. '
            "Animated .gif and .webp files work without it."
        ) from error
    return av
