"""The formats that can be read, by name, and how to tell them apart."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .coco_reader import read_coco, read_coco_rel, read_coco_rel_annotations
from .gqa_reader import read_gqa, read_gqa200
from .json_streaming import top_level_names
from .open_images_reader import read_open_images, read_open_images_csv
from .parquet_reader import load_stream, read_coco_parquet, read_parquet
from .psg_reader import read_psg
from .record_source import RecordSource
from .vg150_reader import read_vg150
from .visual_genome_reader import read_visual_genome


class ReadOptions(NamedTuple):
    """What a caller may say beside path and split.

    Args:
        images: Folder of the images, where the format does not say.
        vocabulary: JSON file of names, for formats with free names.
        with_index: For COCO files whose annotations are not in the order of their images.
        masks: Read masks, where the format has any.
    """

    images: Path | None = None
    vocabulary: Path | None = None
    with_index: bool = False
    masks: bool = False


class DetectedFormat(NamedTuple):
    """A format, and what it was recognised by."""

    name: str
    reason: str


Reader = Callable[[Path, str, ReadOptions], RecordSource]


def _names(options: ReadOptions, field: str) -> list[str] | None:
    if options.vocabulary is None:
        return None
    entries: Mapping[str, Sequence[str]] = json.loads(options.vocabulary.read_text())
    if field not in entries:
        raise ValueError(f"The vocabulary {options.vocabulary} has no `{field}`.")
    return list(entries[field])


def _required(value: Any, option: str, format_name: str) -> Any:
    if value is None:
        raise ValueError(f"The format `{format_name}` needs `{option}`.")
    return value


def _read_csv(path: Path, _split: str, options: ReadOptions) -> RecordSource:
    descriptions = min(path.parent.glob("*class-descriptions*.csv"), default=None)
    return read_open_images_csv(
        path,
        _required(descriptions, "a *class-descriptions*.csv beside it", "open-images-csv"),
        _required(options.images, "--images", "open-images-csv"),
        predicate_names=_names(options, "predicates"),
    )


FORMATS: dict[str, Reader] = {
    "parquet": lambda path, split, _: read_parquet(path, split),
    "coco-parquet": lambda path, split, options: read_coco_parquet(path, split, options.vocabulary),
    "vg150": lambda path, split, options: read_vg150(
        path, split, None if options.images is None else [options.images]
    ),
    "coco": lambda path, _, options: read_coco(path, options.images, index=options.with_index),
    "coco-rel": lambda path, split, options: read_coco_rel(
        path, split, options.images, index=options.with_index
    ),
    "coco-rel-annotations": lambda path, split, options: read_coco_rel_annotations(
        _file_of_split(path, split), options.images, index=options.with_index
    ),
    "open-images": lambda path, split, options: read_open_images(path, split, options.images),
    "open-images-csv": _read_csv,
    "psg": lambda path, split, options: read_psg(path, split, options.images, masks=options.masks),
    "visual-genome": lambda path, _, options: read_visual_genome(
        path,
        _required(_names(options, "labels"), "--vocabulary", "visual-genome"),
        _required(_names(options, "predicates"), "--vocabulary", "visual-genome"),
        options.images,
    ),
    "gqa": lambda path, _, options: read_gqa(
        path,
        _required(options.images, "--images", "gqa"),
        _names(options, "labels"),
        _names(options, "predicates"),
    ),
    "gqa200": lambda path, split, options: read_gqa200(path, split, options.images),
}


def open_dataset(
    path: str | Path,
    split: str = "train",
    format_name: str | None = None,
    options: ReadOptions | None = None,
) -> RecordSource:
    """Open a split of a data set in any known format.

    Args:
        path: A file, a folder or, for Parquet, a Hub id.
        split: As the format calls it.
        format_name: A key of `FORMATS`; recognised if None.
        options: What the format needs beside them.

    Raises:
        ValueError: If the format is not known or not recognised, or a file is wrong.
    """
    if format_name is None:
        format_name = detect_format(path, split).name
    if format_name not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format_name!r}.")
    return FORMATS[format_name](Path(path), split, options or ReadOptions())


def detect_format(path: str | Path, split: str = "train") -> DetectedFormat:
    """Recognise a format by the names of files and of their first entries.

    Raises:
        ValueError: If nothing fits.
    """
    path = Path(path)
    if path.is_file():
        return _detect_file(path)
    if path.is_dir():
        return _detect_folder(path, split)
    # What is neither may be on the Hub.
    columns = load_stream(path, split).column_names or []
    return _by_columns(columns, str(path))


def _detect_file(path: Path) -> DetectedFormat:
    if path.suffix == ".csv":
        return DetectedFormat("open-images-csv", f"{path.name} is CSV")
    names = set(top_level_names(path))
    # In this order: a file with relations has the keys of one without.
    for name, key in (
        ("coco-rel-annotations", "rel_annotations"),
        ("coco-rel-annotations", "rel_categories"),
        ("psg", "predicate_classes"),
        ("psg", "thing_classes"),
        ("gqa200", "img_info_all"),
        ("coco", "images"),
        ("coco", "annotations"),
    ):
        if key in names:
            return DetectedFormat(name, f"{path.name} has the entry `{key}`")
    if path.name.lower().endswith("scenegraphs.json"):
        return DetectedFormat("gqa", f"{path.name} is a dictionary of images")
    if "data" in names:
        return DetectedFormat("psg", f"{path.name} begins with the entry `data`")
    raise ValueError(
        f"The format of {path} is not recognised (first entries: "
        f"{', '.join(sorted(names)[:5]) or 'none'}); name it with `--from`."
    )


_FILES_OF_FORMATS = (
    ("coco-rel", "rel.json"),
    ("open-images", "annotations/categories_dict.json"),
    ("gqa200", "GQA_200_ID_Info.json"),
    ("psg", "psg.json"),
    ("vg150", "*.h5"),
    ("coco-rel-annotations", "{split}/_annotations.coco.json"),
    ("visual-genome", "scene_graphs.json"),
    ("visual-genome", "relationships.json"),
)


def _detect_folder(path: Path, split: str) -> DetectedFormat:
    for name, pattern in _FILES_OF_FORMATS:
        found = sorted(path.glob(pattern.format(split=split)))
        if found:
            return DetectedFormat(name, f"{path} has {found[0].relative_to(path)}")
    if any(path.rglob("*.parquet")):
        return _by_columns(load_stream(path, split).column_names or [], str(path))
    raise ValueError(f"The format of the folder {path} is not recognised; name it with `--from`.")


def _by_columns(columns: Sequence[str], source: str) -> DetectedFormat:
    if "file_name" in columns:
        return DetectedFormat("coco-parquet", f"{source} has a column `file_name`")
    return DetectedFormat("parquet", f"{source} has Parquet shards")


def _file_of_split(path: Path, split: str) -> Path:
    return path / split / "_annotations.coco.json" if path.is_dir() else path
