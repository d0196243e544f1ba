"""What the commands of `sgtr-hf` share: kinds of arguments, and checks before the work begins."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .image_processing.picture_reading import IMAGE_SUFFIXES


def positive(text: str) -> int:
    """Read a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    """Read a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def probability(text: str) -> float:
    """Read a number between 0 and 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {value}")
    return value


def positive_number(text: str) -> float:
    """Read a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {value}")
    return value


def image_paths(images: Iterable[str]) -> Iterator[str]:
    """Files and URLs as they are, folders as the image files in them.

    Raises:
        ValueError: If a folder has no image.
        FileNotFoundError: If there is no such file or folder.
    """
    for image in images:
        if image.startswith(("http://", "https://")):
            yield image
            continue
        path = Path(image)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise ValueError(f"the folder {path} has no image ({', '.join(IMAGE_SUFFIXES)}).")
            yield from map(str, files)
        elif path.is_file():
            yield image
        else:
            raise FileNotFoundError(f"there is no file or folder {path}.")


def model_folder(model: str, name: str = "--model") -> str:
    """Reject a local folder that is no checkpoint, or not there, before it is taken for a Hub id.

    Args:
        model: Folder or Hub id.
        name: Of the option or entry that names it.

    Raises:
        ValueError: If it is none.
    """
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"`{name}` {model} is not a checkpoint: the folder has no config.json.")
    # A Hub id is a name, or an owner and a name.
    if not path.exists() and (path.is_absolute() or model.startswith(".") or model.count("/") > 1):
        raise ValueError(
            f"`{name}` {model} is not there, and cannot be the id of a model on the Hub."
        )
    return model


def check_output_names(drawing: Path | None, *others: Path | None) -> None:
    """Complain before the work is done, not after.

    Raises:
        ValueError: If the folder of a file does not exist, a file is a folder, or a drawing is not
            named like one.
    """
    for path in (drawing, *others):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} of {path.name} does not exist.")
        if path is not None and path.is_dir():
            raise ValueError(f"the output {path} is a folder; name a file in it.")
    if drawing is not None and drawing.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"the drawing {drawing} must end like an image file, as in graph.png.")


def drawing_names(path: Path | None, images: Sequence[str]) -> list[Path | None]:
    """Name a drawing for each image: the path itself, or with several the image's name in it.

    Images of one name in different folders get a number, too.
    """
    if path is None or len(images) == 1:
        return [path] * len(images)
    names: list[str] = []
    for image in images:
        stem, number = Path(image).stem, 1
        name = stem
        while name in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
    return [path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names]


def add_labels_per_entity(parser: argparse.ArgumentParser) -> None:
    """Add the option of that name."""
    parser.add_argument(
        "--labels-per-entity",
        type=positive,
        default=1,
        metavar="L",
        help="likeliest classes of an entity that may each be a node; 2 raises recall",
    )
