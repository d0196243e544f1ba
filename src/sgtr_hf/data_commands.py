"""The commands of `sgtr-hf` that work on data sets: convert, validate, stats.

Libraries that only these need are imported when they run, so that other commands start quickly.
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def convert(options: argparse.Namespace) -> int:
    """Convert splits of a data set into another format."""
    writers = load_data_module("dataset_writers").WRITERS
    if options.to not in writers:
        raise ValueError(f"`--to` must be one of {', '.join(writers)}, got {options.to!r}.")
    if options.to != "parquet" and options.no_embed:
        raise ValueError("`--no-embed` is for `--to parquet`; other formats write image files.")
    for split in options.split.split(","):
        _convert_split(options, split, writers[options.to])
    return 0


def _convert_split(options: argparse.Namespace, split: str, writer: Any) -> None:
    settings = {"embed_images": False} if options.no_embed else {}
    target_split = writer.split_name(split)
    # Whether a COCO file needs an index shows on the way; nothing has been kept then.
    for index in (options.index, True):
        report = load_data_module("record_source").DropReport()
        source = open_source(options, split, index=index)
        records = source.checked("drop" if options.drop else "raise", report, pictures=True)
        try:
            count = writer.write(
                source, show_progress(records, source), options.target, target_split, **settings
            )
            break
        except load_data_module("coco_grouping").UnorderedAnnotationsError as error:
            if index:
                raise
            print(f"{error} Starting again with an index.")
    print(f"{options.target}: {count} images of {target_split!r} as {options.to}; {report}.")
    for lost in writer.lost(source):
        print(f"{options.to} holds no {lost}; they were left out.")


def validate(options: argparse.Namespace) -> int:
    """Print every violation; return 1 if there is any that stays."""
    sources = load_data_module("record_source")
    source = open_source(options, options.split, index=options.index)
    report, messages = sources.DropReport(), _Messages(source.place)
    reading = sources.Reading(source.place, on_broken=messages.add_broken, left_out=report.left_out)

    def fixed() -> Iterator[dict[str, Any]]:
        for record in show_progress(source.make_records(reading), source):
            found = source.problems(record, pictures=not options.no_pictures)
            for problem in found:
                messages.add(problem.message)
            messages.images += 1
            kept = sources.drop_problems(record, found, report) if found else record
            if kept is not None:
                yield kept

    if options.fix is None:
        for _ in fixed():
            pass
        print(f"Split {options.split}: {messages.images} images, {messages.count} violations.")
        return int(messages.count > 0)
    writer = load_data_module("dataset_writers").WRITERS["parquet"]
    count = writer.write(source, fixed(), options.fix, writer.split_name(options.split))
    for message in messages.broken:
        report.add("broken records", message)
    print(f"{options.fix}: {count} images, {messages.count} violations; {report}.")
    return 0


class _Messages:
    """Prints violations, and counts them.

    Args:
        place: The file they are in.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.count = self.images = 0
        self.broken: list[str] = []

    def add(self, message: str) -> None:
        _print_above_bar(f"{self.place}: {message}")
        self.count += 1

    def add_broken(self, message: str) -> None:
        """Print what already names its file."""
        _print_above_bar(message)
        self.count += 1
        self.images += 1
        self.broken.append(message)


def stats(options: argparse.Namespace) -> int:
    """Print what a data set holds, and draw it on request."""
    report = load_data_module("record_source").DropReport()
    source = open_source(options, options.split, index=options.index)
    records = source.checked("drop" if options.drop else "raise", report)
    statistics = load_data_module("dataset_statistics").count_records(
        source, show_progress(records, source)
    )
    print(statistics)
    if report.counts or report.left_out:
        print(report)
    if options.draw is not None:
        statistics.draw(options.draw)
    return 0


def add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of the commands."""
    parser = commands.add_parser("convert", help="convert a data set into another format")
    parser.set_defaults(run=convert)
    add_source_options(parser, several_splits=True)
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    parser.add_argument("--to", default="parquet", metavar="FORMAT", help="its format")
    parser.add_argument("--drop", action="store_true", help="leave out what is wrong, and count it")
    parser.add_argument(
        "--no-embed", action="store_true", help="write paths of pictures, not the pictures"
    )
    parser = commands.add_parser("validate", help="list what is wrong in a data set")
    parser.set_defaults(run=validate)
    add_source_options(parser)
    parser.add_argument("--fix", type=Path, help="write a Parquet copy without what is wrong")
    parser.add_argument(
        "--no-pictures", action="store_true", help="check the annotations without the pictures"
    )
    parser = commands.add_parser("stats", help="count what a data set holds")
    parser.set_defaults(run=stats)
    add_source_options(parser)
    parser.add_argument("--draw", type=Path, help="image file of the plots")
    parser.add_argument("--drop", action="store_true", help="leave out what is wrong, and count it")


def add_source_options(
    parser: argparse.ArgumentParser,
    *,
    several_splits: bool = False,
    name: str = "SOURCE",
    split: str = "train",
) -> None:
    """Add what says where annotated images are, and how to read them.

    Args:
        parser: Of a command.
        several_splits: Whether `--split` may name more than one.
        name: Of the argument in the help.
        split: Default of `--split`.
    """
    parser.add_argument("source", metavar=name, help="file, folder or Hub id")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="its format, if not recognised"
    )
    if several_splits:
        parser.add_argument("--split", default=split, help="one, or several as in train,val,test")
    else:
        parser.add_argument("--split", default=split, help="val and validation are one")
    parser.add_argument(
        "--images",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="folder of the images; for VG150 also a zip file, and more than once",
    )
    parser.add_argument(
        "--vocabulary", type=Path, help="JSON of names, for formats with free names"
    )
    parser.add_argument(
        "--index", action="store_true", help="for COCO files that are not in the order of images"
    )
    parser.add_argument("--masks", action="store_true", help="read masks, where there are any")
    parser.add_argument(
        "--predicate-offset", type=int, help="number of the first predicate of a rel.json"
    )
    parser.add_argument(
        "--all-images", action="store_true", help="also images of VG150 without relations"
    )


def load_data_module(module: str) -> ModuleType:
    """Import a module of `data` when it is needed.

    Raises:
        ImportError: With the remedy, if one of its libraries is not installed.
    """
    try:
        # Commands show one bar, of images.
        importlib.import_module("datasets").disable_progress_bars()
        return importlib.import_module(f".data.{module}", __package__)
    except ImportError as error:
        raise ImportError(
            f'Data sets need {error.name}, which is not installed: `pip install "sgtr-hf[train]"`.'
        ) from error


def open_source(options: argparse.Namespace, split: str, *, index: bool) -> Any:
    """Open a split of the data set that `add_source_options` asked for, and say its format."""
    formats = load_data_module("dataset_formats")
    name = options.source_format
    if name is None:
        name, reason = load_data_module("format_detection").detect_format(options.source, split)
        print(f"format {name}: {reason}")
    read_options = formats.ReadOptions(
        images=options.images,
        vocabulary=options.vocabulary,
        with_index=index,
        masks=options.masks,
        predicate_offset=options.predicate_offset,
        without_relations=options.all_images,
        format_name=name,
    )
    return formats.open_dataset(options.source, split, read_options)


def show_progress(records: Any, source: Any) -> Iterator[Any]:
    """Yield records under a progress bar."""
    from tqdm import tqdm

    yield from tqdm(records, unit="image", total=source.count)


def _print_above_bar(line: str) -> None:
    """Print a line where a progress bar may be."""
    from tqdm import tqdm

    tqdm.write(line)
