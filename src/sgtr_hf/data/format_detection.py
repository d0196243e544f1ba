"""Tells the formats of data sets apart, and says by what."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .json_streaming import has_name, top_level_names
from .parquet_reader import load_stream


class DetectedFormat(NamedTuple):
    """A format, and what it was recognised by."""

    name: str
    reason: str


_FORMATS_OF_SUFFIXES = {".csv": "open-images-csv", ".h5": "vg150", ".hdf5": "vg150"}
# Names in files of a format. In this order: a file with relations has the names of one without.
_NAMES_OF_FORMATS = (
    ("coco-rel-annotations", "rel_annotations"),
    ("coco-rel-annotations", "rel_categories"),
    ("psg", "predicate_classes"),
    ("gqa200", "img_info_all"),
)
# Files of a format, by their paths in its folder.
_FILES_OF_FORMATS = (
    ("coco-rel", "rel.json"),
    ("open-images", "annotations/categories_dict.json"),
    ("gqa200", "GQA_200_ID_Info.json"),
    ("psg", "psg.json"),
    ("vg150", "*.h5"),
    ("gqa", "*_sceneGraphs.json"),
    ("open-images-csv", "*-annotations-vrd.csv"),
    ("visual-genome", "scene_graphs.json"),
    ("visual-genome", "relationships.json"),
)
_SPLIT_FOLDER_FILE = "_annotations.coco.json"
# Of a data set with COCO's own folders: annotations, and the folder of the images.
_COCO_LAYOUT = ("annotations/instances_{split}2017.json", "{split}2017")
_ALIASES = {"validation": ("validation", "val", "valid"), "val": ("val", "validation", "valid")}


def detect_format(path: str | Path, split: str = "train") -> DetectedFormat:
    """Recognise a format by the names of files and of their entries.

    Raises:
        ValueError: If nothing fits.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_folder(path, split)
    if path.is_file() and path.suffix != ".parquet":
        return _detect_file(path)
    # What is neither is a shard, or may be on the Hub.
    return _by_columns(load_stream(path, split).column_names or [], str(path))


def coco_file(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Find the JSON file of a split, and the folder of its images, in a folder of COCO files."""
    for name in _ALIASES.get(split, (split,)):
        file, images = (folder / place.format(split=name) for place in _COCO_LAYOUT)
        if file.is_file():
            return file, images
        file = folder / name / _SPLIT_FOLDER_FILE
        if file.is_file():
            return file, file.parent
    return None


def _detect_file(path: Path) -> DetectedFormat:
    by_suffix = _FORMATS_OF_SUFFIXES.get(path.suffix)
    if by_suffix is not None:
        return DetectedFormat(by_suffix, f"{path.name} ends in {path.suffix}")
    # Names may stand at the very end of a large file.
    for name, key in _NAMES_OF_FORMATS:
        if has_name(path, key):
            return DetectedFormat(name, f"{path.name} has the entry `{key}`")
    names = top_level_names(path)
    if {"images", "annotations"} & set(names):
        return DetectedFormat("coco", f"{path.name} has `images`, and no relations")
    if path.name.lower().endswith("scenegraphs.json"):
        return DetectedFormat("gqa", f"{path.name} is a dictionary of images")
    raise ValueError(
        f"The format of {path} is not recognised (first entries: "
        f"{', '.join(sorted(names)[:5]) or 'none'}); name it with `--from`."
    )


def _detect_folder(path: Path, split: str) -> DetectedFormat:
    for name, pattern in _FILES_OF_FORMATS:
        found = sorted(path.glob(pattern))
        if found:
            return DetectedFormat(name, f"{path} has {found[0].relative_to(path)}")
    coco = coco_file(path, split)
    if coco is not None:
        found_format = _detect_file(coco[0])
        return DetectedFormat(
            found_format.name,
            f"{path} has {coco[0].relative_to(path)}: {found_format.reason}",
        )
    if any(path.rglob("*.parquet")):
        return _by_columns(load_stream(path, split).column_names or [], str(path))
    if not any(path.iterdir()):
        raise ValueError(f"The folder {path} is empty; name one with annotations.")
    raise ValueError(
        f"The format of the folder {path} is not recognised: it holds no file that a format is "
        "known by, such as Parquet files with `objects` and `relations`. `sgtr-hf convert --from "
        "FORMAT` makes Parquet of other files."
    )


def _by_columns(columns: Sequence[str], source: str) -> DetectedFormat:
    if "file_name" in columns:
        return DetectedFormat("coco-parquet", f"{source} has a column `file_name`")
    if {"objects", "relations"} <= set(columns):
        return DetectedFormat("parquet", f"{source} has the columns of the record in Parquet")
    raise ValueError(
        f"The Parquet shards of {source} have the columns {', '.join(columns)}, which no known "
        "format has."
    )
