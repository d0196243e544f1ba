"""Reads PSG: panoptic scene graphs on COCO images, as boxes and, on request, masks."""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .json_streaming import read_list, stream_items
from .record_checks import box_from_corners, box_from_size, triplet, whole_number
from .record_source import Reading, Record, RecordSource


# Numbers of Detectron2 for the two ways in which a box may be written.
_BOX_MODES = {0: box_from_corners, 1: box_from_size}


def read_psg(
    path: str | Path,
    split: str | None = None,
    images: str | Path | None = None,
    *,
    masks: bool = False,
    keep_duplicates: bool = False,
) -> RecordSource:
    """Read `psg.json` or one of its variants. Boxes are x1, y1, x2, y2 there too.

    Args:
        path: The JSON file.
        split: "train", "test", or None for all; test images without relations are left out, as
            the benchmark does.
        images: Folder with `train2017`, `val2017` and their panoptic twins; that of the file if
            None.
        masks: Cut the masks of entities out of the panoptic pictures.
        keep_duplicates: Keep a triplet that is annotated twice.

    Raises:
        ValueError: If the file is missing or is not PSG, or the split is not known.
    """
    path = Path(path)
    if split not in (None, "train", "test"):
        raise ValueError(f'`split` must be "train", "test" or None, got {split!r}.')
    folder = path.parent if images is None else Path(images)
    names = [
        str(name) for field in ("thing_classes", "stuff_classes") for name in read_list(path, field)
    ]
    predicates = [str(name) for name in read_list(path, "predicate_classes")]
    if not names or not predicates:
        raise ValueError(f"{path} lacks `thing_classes` or `predicate_classes`; is it PSG?")
    test_ids = {str(image_id) for image_id in read_list(path, "test_image_ids")}

    def records(reading: Reading) -> Iterator[Record]:
        def build(entry: dict[str, Any]) -> Record:
            triplets = [triplet(row) for row in entry["relations"]]
            if not keep_duplicates and len(set(triplets)) < len(triplets):
                reading.left_out["duplicate triplets"] += len(triplets) - len(set(triplets))
                triplets = list(dict.fromkeys(triplets))
            return _record(entry, triplets, folder, masks=masks)

        entries = _entries_of_split(path, split, test_ids, reading.left_out)
        return reading.records(entries, build, lambda entry: entry["image_id"])

    return RecordSource(names, predicates, records, str(path), has_masks=masks)


def _entries_of_split(
    path: Path, split: str | None, test_ids: set[str], left_out: Counter[str]
) -> Iterator[dict[str, Any]]:
    for entry in stream_items(path, "data.item"):
        is_test = str(entry.get("image_id")) in test_ids
        if split is not None and is_test != (split == "test"):
            continue
        if split == "test" and not entry.get("relations", True):
            left_out["test images without relations"] += 1
            continue
        yield entry


def _record(
    entry: dict[str, Any], triplets: list[tuple[int, int, int]], folder: Path, *, masks: bool
) -> Record:
    annotations, segments = entry["annotations"], entry["segments_info"]
    if len(annotations) != len(segments):
        raise ValueError(
            f"`annotations` and `segments_info` must have one length, got {len(annotations)} and "
            f"{len(segments)}"
        )
    objects: list[dict[str, Any]] = [
        {
            "id": whole_number(segment["id"], "id"),
            "bbox": _box(annotation),
            "label": whole_number(annotation["category_id"], "category_id"),
        }
        for annotation, segment in zip(annotations, segments, strict=True)
    ]
    if masks:
        panoptic = read_panoptic(folder / entry["pan_seg_file_name"])
        for entity in objects:
            entity["mask"] = {"bytes": encode_mask(panoptic == entity["id"]), "path": None}
    return {
        "image": {"path": str(folder / entry["file_name"]), "bytes": None},
        "image_id": str(entry["image_id"]),
        "width": whole_number(entry["width"], "width"),
        "height": whole_number(entry["height"], "height"),
        "objects": objects,
        "relations": [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in triplets
        ],
    }


def _box(annotation: dict[str, Any]) -> list[float]:
    mode = annotation.get("bbox_mode", 0)
    if mode not in _BOX_MODES:
        raise ValueError(f"`bbox_mode` must be 0 (corners) or 1 (corner and size), got {mode!r}")
    return _BOX_MODES[mode](annotation["bbox"])


def read_panoptic(path: Path) -> np.ndarray:
    """Return the segment ids (H, W) of a panoptic picture: red + 256 green + 65536 blue.

    Raises:
        ValueError: If it cannot be opened.
    """
    try:
        with Image.open(path) as picture:
            colors = np.asarray(picture.convert("RGB"), dtype=np.int64)
    except OSError as error:
        raise ValueError(f"The panoptic picture {path} cannot be opened: {error}") from error
    ids: np.ndarray = colors @ np.array([1, 256, 256**2])
    return ids


def encode_mask(mask: np.ndarray) -> bytes:
    """Return a boolean mask (H, W) as a PNG of one bit a pixel."""
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    return file.getvalue()
