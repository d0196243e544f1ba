"""The command `sgtr-hf evaluate`: a file of predicted graphs against annotated images.

Libraries that only it needs are imported when it runs, so that other commands start quickly.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ._version import __version__
from .data_commands import add_source_options, load_data_module, open_source, show_progress
from .metrics.detection import DetectionAccuracy
from .metrics.evaluation_protocols import MODES, PROTOCOLS
from .metrics.evaluation_report import (
    format_detection,
    format_open_images,
    format_recalls,
    plain,
    write_predicate_table,
)
from .metrics.open_images import OPEN_IMAGES_PROTOCOLS, OpenImagesScore
from .metrics.recall import BATCH_IMAGES, Measured, SceneGraphRecall
from .metrics.training_triplets import TrainingTriplets, count_training_triplets
from .predicate_groups import PUBLISHED_GROUPS, Groups, group_by_frequency


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate predictions, print the figures, and write what was asked for."""
    _check_outputs(options)
    predictions = load_data_module("prediction_file").PredictionFile(options.predictions)
    # Whether a COCO file needs an index shows on the way; nothing has been kept then.
    for index in (options.index, True):
        try:
            report = _evaluate(options, predictions, index=index)
            break
        except load_data_module("coco_grouping").UnorderedAnnotationsError as error:
            if index:
                raise
            print(f"{error} Starting again with an index.")
    print(_text(report, options.top_k))
    _write(options, report)
    return 0


def add_evaluation_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser("evaluate", help="compare predicted graphs with annotated ones")
    parser.set_defaults(run=evaluate)
    parser.add_argument(
        "predictions", type=Path, metavar="PREDICTIONS", help="Parquet file, or folder of them"
    )
    add_source_options(parser, name="REFERENCES", split="test")
    parser.add_argument("--protocol", default="strict", choices=PROTOCOLS, help="who compares how")
    parser.add_argument("--mode", default="sgdet", choices=MODES, help="what the model was given")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[20, 50, 100], metavar="K", help="numbers looked at"
    )
    parser.add_argument("--match-masks", action="store_true", help="compare masks, as PSG does")
    parser.add_argument(
        "--match", default="image-id", choices=("image-id", "file-name"), help="what pairs images"
    )
    parser.add_argument(
        "--allow-unmatched", action="store_true", help="leave out predictions without annotation"
    )
    parser.add_argument("--drop", action="store_true", help="leave out what is wrong, and count it")
    parser.add_argument(
        "--train-split",
        metavar="SPLIT",
        help="split of REFERENCES that training saw; gives the recall of unseen triplets",
    )
    parser.add_argument(
        "--zero-shot", type=Path, metavar="FILE", help="published list of unseen triplets"
    )
    parser.add_argument(
        "--groups", choices=PUBLISHED_GROUPS, help="head, body and tail as published; by frequency"
    )
    parser.add_argument(
        "--f1-threshold", type=float, default=0.5, metavar="SCORE", help="least score for F1"
    )
    parser.add_argument("--open-images", action="store_true", help="add the Open Images scores")
    parser.add_argument("--detection", action="store_true", help="add the accuracy of detections")
    parser.add_argument("--output", type=Path, help="write the report as JSON")
    parser.add_argument("--csv", type=Path, help="write a table of predicates")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw what was found")


def _evaluate(options: argparse.Namespace, predictions: Any, *, index: bool) -> dict[str, Any]:
    source = open_source(options, options.split, index=index)
    _check_names(predictions, source, options.predictions)
    metrics = _make_metrics(options, source, _training_triplets(options, index=index))
    drops = load_data_module("record_source").DropReport()
    records = source.checked("drop" if options.drop else "raise", drops)
    pairing = load_data_module("record_graphs").Pairing(options.match, options.allow_unmatched)
    pairs = pairing.pairs(predictions, show_progress(records, source), source)
    while batch := list(itertools.islice(pairs, BATCH_IMAGES)):
        predicted, annotated = zip(*batch, strict=True)
        for metric in metrics.values():
            metric.update(predicted, annotated)
    return {
        "predictions": str(options.predictions),
        "references": str(options.source),
        "split": options.split,
        "version": __version__,
        "images": {
            "paired": pairing.num_pairs,
            "annotated_without_prediction": pairing.num_without_prediction,
            "predicted_without_annotation": pairing.num_without_annotation,
        },
        "dropped": str(drops),
        **{name: metric.compute() for name, metric in metrics.items()},
    }


def _make_metrics(
    options: argparse.Namespace, source: Any, training: TrainingTriplets | None
) -> dict[str, Any]:
    protocol = PROTOCOLS[options.protocol]
    if options.match_masks:
        protocol = replace(protocol, overlap="masks")
    id2predicate = dict(enumerate(source.predicate_names))
    metrics: dict[str, Any] = {
        "recall": SceneGraphRecall(
            options.top_k,
            protocol,
            len(id2predicate),
            id2predicate,
            training,
            _groups(options, len(id2predicate), training),
            Measured(options.mode, precision=True, threshold=options.f1_threshold),
        )
    }
    if options.open_images:
        metrics["open_images"] = OpenImagesScore(options.protocol, id2predicate)
    if options.detection:
        metrics["detection"] = DetectionAccuracy(dict(enumerate(source.entity_names)))
    return metrics


def _groups(
    options: argparse.Namespace, num_predicates: int, training: TrainingTriplets | None
) -> Groups | None:
    if options.groups is None:
        if training is None or not training.has_counts:
            return None
        return group_by_frequency(training.predicate_counts(num_predicates))
    groups = PUBLISHED_GROUPS[options.groups]
    expected = sum(map(len, groups.values()))
    if expected != num_predicates:
        raise ValueError(
            f"`--groups {options.groups}` is of {expected} predicates, the data has "
            f"{num_predicates}."
        )
    return groups


def _training_triplets(options: argparse.Namespace, *, index: bool) -> TrainingTriplets | None:
    """Count the triplets of the training split, and read a published list of unseen ones."""
    unseen = None
    if options.zero_shot is not None:
        unseen = load_data_module("zero_shot_file").read_zero_shot_triplets(options.zero_shot)
    if options.train_split is None:
        return None if unseen is None else TrainingTriplets(unseen[:0], unseen=unseen)
    source = open_source(options, options.train_split, index=index)
    graphs = load_data_module("record_graphs").RecordGraphs(source, masks=False)
    records = show_progress(source.checked("drop" if options.drop else "raise"), source)
    return count_training_triplets(map(graphs.graph, records), unseen)


def _check_names(predictions: Any, source: Any, path: Path) -> None:
    for what, own, others in (
        ("classes", predictions.entity_names, source.entity_names),
        ("predicates", predictions.predicate_names, source.predicate_names),
    ):
        if list(own) == list(others):
            continue
        if len(own) != len(others):
            raise ValueError(f"{path} knows {len(own)} {what}, {source.place} {len(others)}.")
        number, (one, other) = next(
            (number, names)
            for number, names in enumerate(zip(own, others, strict=True))
            if names[0] != names[1]
        )
        raise ValueError(
            f"Number {number} of the {what} is {one!r} in {path} but {other!r} in {source.place}; "
            "evaluate on data with the model's vocabulary."
        )


def _check_outputs(options: argparse.Namespace) -> None:
    """Complain before the work is done, not after."""
    for path in (options.output, options.csv):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"the folder {path.parent} of {path.name} does not exist.")
    if options.open_images and options.protocol not in OPEN_IMAGES_PROTOCOLS:
        raise ValueError(
            f"`--open-images` knows the protocols {', '.join(OPEN_IMAGES_PROTOCOLS)}, not "
            f"{options.protocol}."
        )
    if options.match_masks and not options.masks:
        options.masks = True


def _text(report: dict[str, Any], top_k: list[int]) -> str:
    images = report["images"]
    lines = [
        f"{images['paired']} images have both; {images['annotated_without_prediction']} annotated "
        f"ones are not in the predictions; {images['predicted_without_annotation']} predicted ones "
        f"are not annotated; of the annotations {report['dropped']}",
        format_recalls(report["recall"], top_k),
    ]
    if "open_images" in report:
        lines.append(format_open_images(report["open_images"]))
    if "detection" in report:
        lines.append(format_detection(report["detection"]))
    return "\n".join(lines)


def _write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    if options.output is not None:
        options.output.write_text(json.dumps(plain(report), indent=2, allow_nan=False) + "\n")
    if options.csv is not None:
        write_predicate_table(report["recall"], options.csv)
    if options.plots is not None:
        for path in _draw(report["recall"], options.plots, options.top_k):
            print(path)


def _draw(report: dict[str, Any], folder: Path, top_k: list[int]) -> Iterator[Path]:
    from .visualization.evaluation_plots import (
        draw_precision_recall,
        draw_predicate_recalls,
        draw_reliability_diagram,
    )

    folder.mkdir(parents=True, exist_ok=True)
    precision, columns = report["precision"], report["per_predicate"]
    name = f"R@{sorted(top_k)[len(top_k) // 2]}"
    draw_predicate_recalls(
        columns[name], columns["num_annotated"], report["groups"], name, folder / "predicates.png"
    )
    yield folder / "predicates.png"
    if precision["num_predictions"]:
        draw_precision_recall(precision, folder / "precision_recall.png")
        yield folder / "precision_recall.png"
    if sum(precision["calibration"]["bins"]["count"]):
        draw_reliability_diagram(precision, folder / "reliability.png")
        yield folder / "reliability.png"
