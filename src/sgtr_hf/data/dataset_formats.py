"""The formats that can be read, by name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .coco_reader import read_coco, read_coco_rel, read_coco_rel_annotations
from .format_detection import coco_file, detect_format
from .gqa_reader import FILE_PATTERN, read_gqa, read_gqa200
from .json_streaming import read_json
from .open_images_reader import CSV_PATTERN, read_open_images, read_open_images_csv
from .parquet_reader import read_coco_parquet, read_parquet
from .psg_reader import read_psg
from .record_source import RecordSource
from .vg150_reader import read_vg150
from .visual_genome_reader import read_visual_genome


class ReadOptions(NamedTuple):
    """What a caller may say beside path and split.

    Args:
        images: Folder of the images, where the format does not say; for VG150 folders and zip
            files.
        vocabulary: JSON file of names: "labels", "predicates" and "attributes" for formats with
            free names, `categories` and `rel_categories` for Hub columns.
        with_index: For COCO files whose annotations are not in the order of their images.
        masks: Read masks, where the format has any.
        predicate_offset: Number of the first predicate of a `rel.json`, if not recognised.
        without_relations: Also images of VG150 that have entities alone.
        format_name: A key of `FORMATS`; recognised if None.
    """

    images: Sequence[Path] = ()
    vocabulary: Path | None = None
    with_index: bool = False
    masks: bool = False
    predicate_offset: int | None = None
    without_relations: bool = False
    format_name: str | None = None

    @property
    def image_folder(self) -> Path | None:
        """The one folder of images, for formats that have only one."""
        if len(self.images) > 1:
            raise ValueError(f"`images` must be one folder in this format, got {self.images}.")
        return self.images[0] if self.images else None


Reader = Callable[[Path, str, ReadOptions], RecordSource]


def _names(options: ReadOptions, field: str) -> list[str] | None:
    if options.vocabulary is None:
        return None
    entries: Mapping[str, Sequence[str]] = read_json(options.vocabulary)
    if field not in entries:
        raise ValueError(f"The vocabulary {options.vocabulary} has no `{field}`.")
    return list(entries[field])


def _attributes(options: ReadOptions) -> list[str]:
    """Attributes are read if the vocabulary names any."""
    entries = {} if options.vocabulary is None else read_json(options.vocabulary)
    return list(entries.get("attributes", ()))


def _required(value: Any, option: str, format_name: str) -> Any:
    if value is None:
        raise ValueError(f"The format `{format_name}` needs `{option}`.")
    return value


def _read_vg150(path: Path, split: str, options: ReadOptions) -> RecordSource:
    return read_vg150(
        path, split, options.images or None, without_relations=options.without_relations
    )


def _read_coco(path: Path, split: str, options: ReadOptions) -> RecordSource:
    found = coco_file(path, split) if path.is_dir() else None
    file, images = (path, None) if found is None else found
    return read_coco(file, options.image_folder or images, index=options.with_index)


def _read_coco_rel(path: Path, split: str, options: ReadOptions) -> RecordSource:
    return read_coco_rel(
        path,
        split,
        options.image_folder,
        index=options.with_index,
        predicate_offset=options.predicate_offset,
    )


def _read_coco_rel_annotations(path: Path, split: str, options: ReadOptions) -> RecordSource:
    file = path / split / "_annotations.coco.json" if path.is_dir() else path
    return read_coco_rel_annotations(file, options.image_folder, index=options.with_index)


def _read_csv(path: Path, split: str, options: ReadOptions) -> RecordSource:
    file = min(path.glob(CSV_PATTERN.format(split=split)), default=None) if path.is_dir() else path
    if file is None:
        raise ValueError(f"{path} has no file {CSV_PATTERN.format(split=split)}.")
    descriptions = min(file.parent.glob("*class-descriptions*.csv"), default=None)
    return read_open_images_csv(
        file,
        _required(descriptions, "a *class-descriptions*.csv beside it", "open-images-csv"),
        _required(options.image_folder, "images", "open-images-csv"),
        predicate_names=_names(options, "predicates"),
    )


def _read_psg(path: Path, split: str, options: ReadOptions) -> RecordSource:
    file = path / "psg.json" if path.is_dir() else path
    return read_psg(file, split, options.image_folder, masks=options.masks)


def _read_visual_genome(path: Path, _split: str, options: ReadOptions) -> RecordSource:
    return read_visual_genome(
        path,
        _required(_names(options, "labels"), "vocabulary", "visual-genome"),
        _required(_names(options, "predicates"), "vocabulary", "visual-genome"),
        options.image_folder,
        attribute_names=_attributes(options),
    )


def _read_gqa(path: Path, split: str, options: ReadOptions) -> RecordSource:
    return read_gqa(
        path / FILE_PATTERN.format(split=split) if path.is_dir() else path,
        _required(options.image_folder, "images", "gqa"),
        _names(options, "labels"),
        _names(options, "predicates"),
        attribute_names=_attributes(options),
    )


FORMATS: dict[str, Reader] = {
    "parquet": lambda path, split, _: read_parquet(path, split),
    "coco-parquet": lambda path, split, options: read_coco_parquet(path, split, options.vocabulary),
    "vg150": _read_vg150,
    "coco": _read_coco,
    "coco-rel": _read_coco_rel,
    "coco-rel-annotations": _read_coco_rel_annotations,
    "open-images": lambda path, split, options: read_open_images(path, split, options.image_folder),
    "open-images-csv": _read_csv,
    "psg": _read_psg,
    "visual-genome": _read_visual_genome,
    "gqa": _read_gqa,
    "gqa200": lambda path, split, options: read_gqa200(path, split, options.image_folder),
}
# What formats call the split that others call "validation".
_VALIDATION = {"coco-rel": "val", "coco-rel-annotations": "val", "open-images": "val", "gqa": "val"}


def split_name(split: str, format_name: str) -> str:
    """Return what a format calls a split: "validation" and "val" are one."""
    if split in ("validation", "val"):
        return _VALIDATION.get(format_name, "validation")
    return split


def open_dataset(
    path: str | Path, split: str = "train", options: ReadOptions | None = None
) -> RecordSource:
    """Open a split of a data set in any known format.

    Args:
        path: A file, a folder or, for Parquet, a Hub id.
        split: Its name; "validation" and "val" are one. Formats of one file a split ignore it.
        options: What the format needs beside them.

    Raises:
        ValueError: If the format is not known or not recognised, or a file is wrong.
    """
    options = options or ReadOptions()
    name = options.format_name or detect_format(path, split).name
    if name not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {name!r}.")
    return FORMATS[name](Path(path), split_name(split, name), options)
