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
    """Convert a split of a data set into another format."""
    writers, sources = _load("dataset_writers"), _load("record_source")
    if options.to not in writers.WRITERS:
        raise ValueError(f"`--to` must be one of {', '.join(writers.WRITERS)}, got {options.to!r}.")
    if options.to != "parquet" and options.no_embed:
        raise ValueError("`--no-embed` is for `--to parquet`; other formats write image files.")
    settings = {"embed_images": False} if options.no_embed else {}
    # Whether a COCO file needs an index shows on the way; nothing has been kept then.
    for index in (options.index, True):
        report = sources.DropReport()
        source = _open(options, index=index)
        records = _progress(source.checked("drop" if options.drop else "raise", report))
        try:
            write = writers.WRITERS[options.to]
            count = write(source, records, options.target, options.split, **settings)
            break
        except _load("coco_reader").UnorderedAnnotationsError as error:
            if index:
                raise
            print(f"{error} Starting again with an index.")
    print(f"{options.target}: {count} images of {options.split!r} as {options.to}; {report}.")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Print every violation; return 1 if there is any that stays."""
    sources = _load("record_source")
    source = _open(options, index=options.index)
    sizes = (len(source.entity_names), len(source.predicate_names))
    report, problems = sources.DropReport(), 0

    def fixed() -> Iterator[dict[str, Any]]:
        nonlocal problems
        for record in _progress(source):
            found = sources.find_problems(record, *sizes)
            problems += len(found)
            for problem in found:
                print(problem.message)
            yield sources.drop_problems(record, found, report) if found else record

    if options.fix is None:
        count = sum(1 for _ in fixed())
        print(f"{count} images, {problems} violations.")
        return int(problems > 0)
    write = _load("dataset_writers").write_parquet
    count = write(source, fixed(), options.fix, options.split)
    print(f"{options.fix}: {count} images, {problems} violations; {report}.")
    return 0


def stats(options: argparse.Namespace) -> int:
    """Print what a data set holds, and draw it on request."""
    source = _open(options, index=options.index)
    statistics = _load("dataset_statistics").count_records(source, _progress(source))
    print(statistics)
    if options.draw is not None:
        statistics.draw(options.draw)
    return 0


def add_data_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parsers of the commands."""
    parser = commands.add_parser("convert", help="convert a data set into another format")
    parser.set_defaults(run=convert)
    _add_source(parser)
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    parser.add_argument("--to", default="parquet", metavar="FORMAT", help="its format")
    parser.add_argument("--drop", action="store_true", help="leave out what is wrong, and count it")
    parser.add_argument(
        "--no-embed", action="store_true", help="write paths of pictures, not the pictures"
    )
    parser = commands.add_parser("validate", help="list what is wrong in a data set")
    parser.set_defaults(run=validate)
    _add_source(parser)
    parser.add_argument("--fix", type=Path, help="write a Parquet copy without what is wrong")
    parser = commands.add_parser("stats", help="count what a data set holds")
    parser.set_defaults(run=stats)
    _add_source(parser)
    parser.add_argument("--draw", type=Path, help="image file of the plots")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="file, folder or Hub id")
    parser.add_argument(
        "--from", dest="source_format", metavar="FORMAT", help="its format, if not recognised"
    )
    parser.add_argument("--split", default="train", help="as the format calls it")
    parser.add_argument("--images", type=Path, help="folder of the images")
    parser.add_argument(
        "--vocabulary", type=Path, help="JSON of names, for formats with free names"
    )
    parser.add_argument(
        "--index", action="store_true", help="for COCO files that are not in the order of images"
    )
    parser.add_argument("--masks", action="store_true", help="read masks, where there are any")


def _load(module: str) -> ModuleType:
    try:
        return importlib.import_module(f".data.{module}", __package__)
    except ImportError as error:
        raise ImportError(
            f'Data sets need {error.name}, which is not installed: `pip install "sgtr-hf[train]"`.'
        ) from error


def _open(options: argparse.Namespace, *, index: bool) -> Any:
    formats = _load("dataset_formats")
    name = options.source_format
    if name is None:
        name, reason = formats.detect_format(options.source, options.split)
        print(f"format {name}: {reason}")
    read_options = formats.ReadOptions(options.images, options.vocabulary, index, options.masks)
    return formats.open_dataset(options.source, options.split, name, read_options)


def _progress(records: Any) -> Iterator[dict[str, Any]]:
    from tqdm import tqdm

    yield from tqdm(records, unit="image")
