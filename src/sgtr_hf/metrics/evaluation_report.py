"""Lays the report of an evaluation out: a table of text, plain JSON, a table of predicates."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


# Rows of the table, as far as a report has them.
_NAMES = {
    "R": "recall",
    "mR": "mean recall over predicates",
    "F": "harmonic mean of R and mR",
    "mR_all": "mean recall, all predicates",
    "mR_occurring": "mean recall, occurring predicates",
    "mR_head": "mean recall, head",
    "mR_body": "mean recall, body",
    "mR_tail": "mean recall, tail",
    "wR": "recall weighted by frequency",
    "micro_R": "recall over all triplets",
    "zR": "recall of unseen triplets",
    "rarity_R": "recall weighted by rarity",
    "pair_R": "recall of pairs, any predicate",
}
_WIDTH = max(map(len, _NAMES.values()))
_BLOCKS = {"": "under the graph constraint", "ng-": "without graph constraint"}


def format_recalls(report: Mapping[str, Any], top_k: Sequence[int]) -> str:
    """Lay out what `SceneGraphRecall.compute` returns, with the counts behind it."""
    lines = [*_settings(report), *_counts(report)]
    for prefix, title in _BLOCKS.items():
        rows = []
        for name, meaning in _NAMES.items():
            values = [report.get(f"{prefix}{name}@{k}") for k in top_k]
            if None not in values:
                cells = "".join(f"{_text(value):>8s}" for value in values)
                rows.append(f"{prefix + name:17s}{meaning:{_WIDTH}s}{cells}")
        if rows:
            columns = "".join(f"{f'@{k}':>8s}" for k in top_k)
            lines += ["", f"{title:{17 + _WIDTH}s}{columns}", *rows]
    if "precision" in report:
        lines += ["", *_precision(report["precision"])]
    return "\n".join(lines)


def format_open_images(report: Mapping[str, Any]) -> str:
    """Lay out what `OpenImagesScore.compute` returns."""
    names = ("micro_R@50", "wmAP_rel", "wmAP_phr", "score_wtd")
    figures = "  ".join(f"{name} {_text(report[name])}" for name in names)
    return f"Open Images, protocol {report['protocol']['name']}: {figures}"


def format_detection(report: Mapping[str, Any]) -> str:
    """Lay out what `DetectionAccuracy.compute` returns."""
    names = ("AP", "AP50", "AP75", "AR_100")
    return "detection: " + "  ".join(f"{name} {_text(report[name])}" for name in names)


def plain(value: Any) -> Any:
    """Return a report for JSON, which knows no NaN: None instead."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_predicate_table(report: Mapping[str, Any], path: Path) -> None:
    """Write a row for each annotated predicate as CSV: its group, count and recalls."""
    columns: Mapping[str, Mapping[str, Any]] = report["per_predicate"]
    group_of = {name: group for group, names in report["groups"].items() for name in names}
    counts = columns["num_annotated"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["predicate", "group", *columns])
        for name in sorted(counts, key=lambda name: (-counts[name], name)):
            values = [columns[column][name] for column in columns]
            writer.writerow([name, group_of.get(name, ""), *values])


def _settings(report: Mapping[str, Any]) -> list[str]:
    protocol = report["protocol"]
    overlap = {
        "exact": "real overlap",
        "pixels": "overlap with the last pixel",
        "inflated": "inflated overlap",
        "masks": "overlap of masks",
    }[protocol["overlap"]]
    constraint = {
        "pair": "one predicate a pair",
        "row": "one predicate a row",
        "none": "rows as they are",
    }[protocol["graph_constraint"]]
    return [
        f"protocol {protocol['name']} ({overlap} of at least {protocol['iou_threshold']}, "
        f"{constraint}), mode {report['mode']}; decimals, 1 is 100 %"
    ]


def _counts(report: Mapping[str, Any]) -> list[str]:
    skips = report["protocol"]["skip_images_without_predictions"]
    fate = "left out" if skips else "counted as 0"
    averaged = "all" if report["protocol"]["average_all_predicates"] else "the occurring ones"
    return [
        f"images: {report['num_images']} averaged over; "
        f"{report['num_images_without_relations']} without annotated relations, left out; "
        f"{report['num_images_without_predictions']} without predictions, {fate}",
        f"triplets: {report['num_relations']} annotated ({report['num_repeated_annotations']} "
        f"repeat another), {report['num_predictions']} predicted "
        f"({report['num_repeated_predictions']} repeat another)",
        f"predicates: {report['num_predicates_annotated']} occur; mR averages over {averaged} "
        f"({report['num_predicates']})",
    ]


def _precision(report: Mapping[str, Any]) -> list[str]:
    return [
        f"at score {report['threshold']:.3g}: precision {_text(report['precision'])}, recall "
        f"{_text(report['recall'])}, F1 {_text(report['F1'])}; best F1 {_text(report['best_F1'])} "
        f"at {_text(report['best_threshold'])}",
        f"average precision of triplets {_text(report['AP'])}; expected calibration error "
        f"{_text(report['calibration']['ECE'])}",
    ]


def _text(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
