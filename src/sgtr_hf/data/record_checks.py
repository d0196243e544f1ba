"""What can be wrong with a record, and how it is said."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import ExifTags, Image, UnidentifiedImageError


_BOX_LENGTH = 4
# EXIF orientations of pictures that lie on their side.
_TURNED = (5, 6, 7, 8)


class Problem(NamedTuple):
    """A part of a record that cannot be meant.

    Args:
        part: The list it is in; "attributes" are those of an entity; "image" is the whole record.
        row: Its place in the list, for attributes that of the entity.
        field: What is wrong with it.
        message: Image, field, value and what is accepted.
        position: Of an attribute in its entity's list.
    """

    part: Literal["image", "objects", "attributes", "relations"]
    row: int
    field: str
    message: str
    position: int = 0


def find_problems(
    record: Mapping[str, Any], num_labels: int, num_predicates: int, num_attributes: int = 0
) -> list[Problem]:
    """List labels and indices out of range, and boxes that have no area inside their image."""
    if not (record["width"] > 0 and record["height"] > 0):
        message = (
            f"Image {record['image_id']}: `width` and `height` must be above 0, got "
            f"{record['width']} and {record['height']}."
        )
        return [Problem("image", 0, "size", message)]
    problems = []
    for index, entity in enumerate(record["objects"]):
        problems += _problems_of_entity(record, index, entity, (num_labels, num_attributes))
    limits = {
        "subject": len(record["objects"]),
        "object": len(record["objects"]),
        "predicate": num_predicates,
    }
    for index, relation in enumerate(record["relations"]):
        for name, limit in limits.items():
            if not _is_within(relation[name], limit):
                message = _range_message(
                    record, f"relations[{index}].{name}", limit, relation[name]
                )
                problems.append(Problem("relations", index, name, message))
                break
    return problems


def find_picture_problem(record: Mapping[str, Any]) -> Problem | None:
    """Decode the picture of a record, and compare its size with the record's."""
    entry, image_id = record["image"], record["image_id"]
    expected = (record["width"], record["height"])
    try:
        size = _decoded_size(entry)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = picture_reason(error)
        message = f"Image {image_id}: the picture {entry.get('path')} cannot be read: {reason}."
        return Problem("image", 0, "picture", message)
    if size == expected:
        return None
    message = (
        f"Image {image_id}: `width` and `height` are {expected[0]} and {expected[1]}, but the "
        f"picture has {size[0]} x {size[1]} pixels, turned as its EXIF tag says."
    )
    return Problem("image", 0, "size", message)


def picture_bytes(entry: Mapping[str, Any]) -> bytes:
    """Return the encoded picture of a record's image entry.

    Raises:
        OSError: If its file cannot be read.
        ValueError: If it has neither bytes nor a path.
    """
    content = entry.get("bytes")
    if content is not None:
        return bytes(content)
    if not entry.get("path"):
        raise ValueError("it has neither bytes nor a path")
    return Path(entry["path"]).read_bytes()


def picture_reason(error: Exception) -> str:
    """Say why a picture cannot be read; Pillow's own words name an object in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not a picture of any known kind"
    return str(error)


def box_from_corners(values: Any, field: str = "bbox") -> list[float]:
    """Return x1, y1, x2, y2 of a file's box as floats.

    Raises:
        ValueError: If it is not four numbers.
    """
    return [float(value) for value in _four_numbers(values, field)]


def box_from_size(values: Any, field: str = "bbox") -> list[float]:
    """Return x1, y1, x2, y2 of a file's x, y, width, height, with one rounding a number.

    Raises:
        ValueError: If it is not four numbers.
    """
    x, y, width, height = _four_numbers(values, field)
    return [float(x), float(y), float(x + width), float(y + height)]


def whole_number(value: Any, field: str) -> int:
    """Return a file's number as an integer.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise ValueError(f"`{field}` must be a whole number, got {value!r}")
    return int(value)


def triplet(values: Any, field: str = "relations") -> tuple[int, int, int]:
    """Return subject, object and predicate of a file's relation.

    Raises:
        ValueError: If it is not three whole numbers.
    """
    if not isinstance(values, Sequence) or len(values) != len(("subject", "object", "predicate")):
        raise ValueError(f"`{field}` must hold subject, object and predicate, got {values!r}")
    subject, object_, predicate = (whole_number(value, field) for value in values)
    return subject, object_, predicate


def _problems_of_entity(
    record: Mapping[str, Any], index: int, entity: Mapping[str, Any], limits: tuple[int, int]
) -> list[Problem]:
    num_labels, num_attributes = limits
    if not _is_within(entity["label"], num_labels):
        message = _range_message(record, f"objects[{index}].label", num_labels, entity["label"])
        return [Problem("objects", index, "label", message)]
    if not _has_area(entity["bbox"], record["width"], record["height"]):
        message = (
            f"Image {record['image_id']}: `objects[{index}].bbox` must be x1, y1, x2, y2 with an "
            f"area inside the image of {record['width']} x {record['height']} pixels, got "
            f"{entity['bbox']}."
        )
        return [Problem("objects", index, "bbox", message)]
    problems = []
    for position, attribute in enumerate(entity.get("attributes") or ()):
        if not _is_within(attribute, num_attributes):
            field = f"objects[{index}].attributes[{position}]"
            message = _range_message(record, field, num_attributes, attribute)
            problems.append(Problem("attributes", index, "number", message, position))
    return problems


def _range_message(record: Mapping[str, Any], field: str, count: int, value: Any) -> str:
    accepted = f"from 0 to {count - 1}" if count else "absent, there is nothing to choose from"
    return f"Image {record['image_id']}: `{field}` must be {accepted}, got {value}."


def _is_within(value: int | None, count: int) -> bool:
    return value is not None and 0 <= value < count


def _has_area(box: Sequence[float] | None, image_width: int, image_height: int) -> bool:
    if box is None or len(box) != _BOX_LENGTH:
        return False
    x1, y1, x2, y2 = box
    # Written so that a number that is not a number fails too.
    has_area = min(x2, image_width) - max(x1, 0) > 0 and min(y2, image_height) - max(y1, 0) > 0
    return has_area and all(map(math.isfinite, box))


def _decoded_size(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Decode a picture, JPEG at an eighth of its size, which finds all that is cut off."""
    with Image.open(io.BytesIO(picture_bytes(entry))) as picture:
        width, height = picture.size
        picture.draft(None, (width // 8, height // 8))
        picture.load()
        is_turned = picture.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (height, width) if is_turned else (width, height)


def _four_numbers(values: Any, field: str) -> Sequence[float]:
    is_box = isinstance(values, Sequence) and len(values) == _BOX_LENGTH
    if not is_box or not all(isinstance(value, (int, float)) for value in values):
        raise ValueError(f"`{field}` must be four numbers, got {values!r}")
    return list(values)
