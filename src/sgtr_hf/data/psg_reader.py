"""Reads PSG: panoptic scene graphs on COCO images, as boxes and, on request, masks."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .json_streaming import read_list, stream_items
from .record_source import Record, RecordSource


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

    def records() -> Iterator[Record]:
        for entry in stream_items(path, "data.item"):
            is_test = str(entry["image_id"]) in test_ids
            if split is not None and is_test != (split == "test"):
                continue
            if split == "test" and not entry["relations"]:
                continue
            yield _record(entry, folder, masks=masks, keep_duplicates=keep_duplicates)

    return RecordSource(names, predicates, records, has_masks=masks)


def _record(entry: dict[str, Any], folder: Path, *, masks: bool, keep_duplicates: bool) -> Record:
    objects: list[dict[str, Any]] = [
        {
            "id": int(segment["id"]),
            "bbox": list(map(float, annotation["bbox"])),
            "label": int(annotation["category_id"]),
        }
        for annotation, segment in zip(entry["annotations"], entry["segments_info"], strict=True)
    ]
    if masks:
        panoptic = read_panoptic(folder / entry["pan_seg_file_name"])
        for entity in objects:
            entity["mask"] = {"bytes": encode_mask(panoptic == entity["id"]), "path": None}
    triplets = [tuple(map(int, relation)) for relation in entry["relations"]]
    if not keep_duplicates:
        triplets = list(dict.fromkeys(triplets))
    return {
        "image": {"path": str(folder / entry["file_name"]), "bytes": None},
        "image_id": str(entry["image_id"]),
        "width": int(entry["width"]),
        "height": int(entry["height"]),
        "objects": objects,
        "relations": [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in triplets
        ],
    }


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
