"""Time and memory of the evaluation, beside a straightforward evaluator on the same data.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--images 26446]
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --command [--folder FOLDER]

100 predicted and 10 annotated triplets an image, 80 detections, 150 classes, 50 predicates, one
thread. The straightforward evaluator matches as the published ones do: one annotated triplet after
the other against all predictions, once for each setting, and a union over predictions for each K.
It sees a part of the images; both give the same figures. Images are made on the way and not kept,
and their making is not timed.

`--command` writes the same images as a file of predictions and as Parquet shards without pictures,
and runs `sgtr-hf evaluate` on them, reading included. Files that are in the folder already are used
again.

Memory is the largest growth of the resident memory of a process of its own over what it had after
its imports. Linux tells it.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars

import sgtr_hf.cli
from peak_memory import PeakMemory
from sgtr_hf.data.dataset_formats import open_dataset
from sgtr_hf.data.dataset_writers import write_parquet
from sgtr_hf.data.prediction_file import PredictionFile, PredictionWriter
from sgtr_hf.data.record_source import Record, RecordSource
from sgtr_hf.metrics.evaluation_protocols import PROTOCOLS
from sgtr_hf.metrics.recall import Measured, SceneGraphRecall, without_constraint
from sgtr_hf.metrics.training_triplets import TrainingTriplets, labelled_triplets
from sgtr_hf.scene_graph import SceneGraph


CLASSES, PREDICATES = 150, 50
ENTITIES, ANNOTATED, PREDICTED = 80, 10, 100
TOP_K = (20, 50, 100)
# Of the detections, those of a wrong class; of the predicted pairs, those that are related.
WRONG_SHARE, RELATED_SHARE = 0.3, 0.2
IOU_THRESHOLD = 0.5
TOLERANCE = 1e-9
PROTOCOL = PROTOCOLS["egtr"]
BATCH = 16
Pair = tuple[SceneGraph, SceneGraph]


def make_images(count: int, *, distributions: bool) -> Iterator[Pair]:
    """Make predictions near the annotations of random scenes."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        reference = make_reference(generator)
        yield make_prediction(generator, reference, distributions=distributions), reference


def make_reference(generator: np.random.Generator) -> SceneGraph:
    """Make 12 entities with 10 relations."""
    corners = generator.random((12, 2)) * 400
    boxes = np.concatenate((corners, corners + 20 + generator.random((12, 2)) * 200), axis=1)
    # Frequent and rare classes and predicates, as in Visual Genome.
    labels = (generator.random(12) ** 3 * CLASSES).astype(np.int64)
    ends = np.array([generator.choice(12, 2, replace=False) for _ in range(ANNOTATED)])
    predicates = (generator.random(ANNOTATED) ** 3 * PREDICATES).astype(np.int64)
    ones = np.ones(12)
    relations = np.column_stack((ends, predicates))
    return SceneGraph(boxes, labels, ones, relations, np.ones(ANNOTATED), (640, 640))


def make_prediction(
    generator: np.random.Generator, reference: SceneGraph, *, distributions: bool
) -> SceneGraph:
    """Make detections near the entities, and relations of 100 pairs of them."""
    sources = generator.integers(0, reference.num_entities, ENTITIES)
    boxes = reference.boxes_xyxy[sources] + generator.normal(0, 6, (ENTITIES, 4))
    boxes[:, 2:] = np.maximum(boxes[:, :2] + 1, boxes[:, 2:])
    is_wrong = generator.random(ENTITIES) < WRONG_SHARE
    labels = np.where(is_wrong, generator.integers(0, CLASSES, ENTITIES), reference.labels[sources])
    # 0 to 80 times 80, and back, so that no pair comes twice.
    pairs = generator.permutation(ENTITIES * ENTITIES)
    subjects, objects = np.divmod(pairs, ENTITIES)
    related = np.zeros((reference.num_entities, reference.num_entities), dtype=np.int64) - 1
    related[tuple(reference.relations[:, :2].T)] = reference.relations[:, 2]
    truth = related[sources[subjects], sources[objects]]
    is_early = (truth >= 0) & (generator.random(len(truth)) < RELATED_SHARE)
    chosen = np.argsort(~is_early, kind="stable")[:PREDICTED]
    chosen = generator.permutation(chosen)
    table = generator.random((PREDICTED, PREDICATES), dtype=np.float32) ** 8
    is_known = truth[chosen] >= 0
    table[is_known, truth[chosen][is_known]] += generator.random(int(is_known.sum()))
    predicates = table.argmax(axis=1)
    relations = np.column_stack((subjects[chosen], objects[chosen], predicates))
    return SceneGraph(
        boxes,
        labels,
        generator.random(ENTITIES),
        relations,
        np.sort(generator.random(PREDICTED))[::-1],
        reference.image_size,
        predicate_distributions=table if distributions else None,
    )


class StraightforwardEvaluator:
    """R, mR and zR as the published evaluators compute them."""

    def __init__(self, seen: set[tuple[int, ...]], *, no_constraint: bool) -> None:
        self.seen, self.no_constraint = seen, no_constraint
        self.shares: dict[str, list[float]] = {}

    def add(self, prediction: SceneGraph, reference: SceneGraph) -> None:
        """Match the predictions of an image, with and without graph constraint."""
        self._add("", prediction, reference)
        if self.no_constraint:
            self._add("ng-", without_constraint(prediction), reference)

    def recall(self, name: str) -> float:
        """Return a mean over images."""
        return float(np.mean(self.shares[name]))

    def _add(self, prefix: str, prediction: SceneGraph, reference: SceneGraph) -> None:
        hits_of_prediction = match_one_by_one(prediction, reference)
        triplets = list(map(tuple, labelled_triplets(reference).tolist()))
        unseen = {index for index, triplet in enumerate(triplets) if triplet not in self.seen}
        for k in TOP_K:
            found: set[int] = set()
            for hits in hits_of_prediction[:k]:
                found |= set(hits)
            self._append(f"{prefix}R@{k}", len(found) / len(triplets))
            if unseen:
                self._append(f"{prefix}zR@{k}", len(found & unseen) / len(unseen))
            for predicate in {triplet[2] for triplet in triplets}:
                own = {index for index, triplet in enumerate(triplets) if triplet[2] == predicate}
                self._append(f"{prefix}R@{k} of {predicate}", len(found & own) / len(own))

    def _append(self, name: str, share: float) -> None:
        self.shares.setdefault(name, []).append(share)


def match_one_by_one(prediction: SceneGraph, reference: SceneGraph) -> list[list[int]]:
    """Return the annotated triplets that each predicted one hits."""
    said, wanted = labelled_triplets(prediction), labelled_triplets(reference)
    boxes, right = (
        graph.boxes_xyxy.astype(np.float64)[graph.relations[:, :2]]
        for graph in (prediction, reference)
    )
    hits: list[list[int]] = [[] for _ in said]
    for number, triplet in enumerate(wanted):
        same = np.flatnonzero((said == triplet).all(axis=1))
        overlaps = [
            overlap_with_last_pixel(right[number, role], boxes[same, role]) for role in (0, 1)
        ]
        for row in same[(overlaps[0] >= IOU_THRESHOLD) & (overlaps[1] >= IOU_THRESHOLD)]:
            hits[row].append(number)
    return hits


def overlap_with_last_pixel(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the intersection over union of a box with others."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.maximum(high - low + 1, 0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(axis=1)
    return shared / ((box[2:] - box[:2] + 1).prod() + areas - shared)


def time_of(images: Iterator[Pair], add: Callable[[list[Pair]], None]) -> tuple[float, int]:
    """Return the seconds spent in `add`, and the number of images, making them not counted."""
    seconds, count = 0.0, 0
    while batch := list(itertools.islice(images, BATCH)):
        started = time.perf_counter()
        add(batch)
        seconds += time.perf_counter() - started
        count += len(batch)
    return seconds, count


def in_own_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, whose memory nothing else has touched."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def seen_triplets() -> set[tuple[int, ...]]:
    """Return what a training of 200 other images would have seen."""
    return {
        tuple(row)
        for _, reference in make_images(200, distributions=False)
        for row in labelled_triplets(reference).tolist()
    }


def make_metric(*, no_constraint: bool) -> SceneGraphRecall:
    """Make the metric that is measured."""
    return SceneGraphRecall(
        TOP_K,
        PROTOCOL,
        PREDICATES,
        seen_triplets=TrainingTriplets(np.array(sorted(seen_triplets()))),
        measured=Measured(no_constraint=no_constraint),
    )


def measure(count: int, no_constraint: bool) -> tuple[float, float, int, float]:
    """Return seconds, MB, images and R@50 of the evaluation."""
    metric = make_metric(no_constraint=no_constraint)
    images, memory = make_images(count, distributions=no_constraint), PeakMemory()
    seconds, count = time_of(images, lambda pairs: metric.update(*zip(*pairs, strict=True)))
    started = time.perf_counter()
    report = metric.compute()
    seconds += time.perf_counter() - started
    return seconds, memory.growth(), count, report["R@50"]


def measure_both(options: argparse.Namespace, *, no_constraint: bool) -> None:
    """Time both evaluators and print a row."""
    seconds, memory, count, recall = in_own_process(measure, options.images, no_constraint)
    slow = StraightforwardEvaluator(seen_triplets(), no_constraint=no_constraint)
    part = make_images(min(options.reference_images, options.images), distributions=no_constraint)
    slow_seconds, slow_count = time_of(part, lambda pairs: [slow.add(*pair) for pair in pairs])
    check(slow, slow_count, no_constraint=no_constraint)
    own, other = 1e3 * seconds / count, 1e3 * slow_seconds / slow_count
    what = "R, mR, zR" + (", without constraint too" if no_constraint else "")
    print(
        f"| {what} | {count} | {own:.3f} | {other:.3f} | {other / own:.1f} | {seconds:.1f} | "
        f"{memory:.0f} | {recall:.4f} |"
    )


def check(slow: StraightforwardEvaluator, count: int, *, no_constraint: bool) -> None:
    """Stop unless both evaluators say the same of the same images."""
    metric = make_metric(no_constraint=no_constraint)
    for prediction, reference in make_images(count, distributions=no_constraint):
        metric.update([prediction], [reference])
    report = metric.compute()
    for name in slow.shares:
        if " of " not in name and abs(report[name] - slow.recall(name)) > TOLERANCE:
            raise SystemExit(f"{name}: {report[name]} is not {slow.recall(name)}")


def make_records(count: int, *, distributions: bool) -> Iterator[Record]:
    """Make the annotations as records."""
    for number, (_, graph) in enumerate(make_images(count, distributions=distributions)):
        entities = zip(graph.boxes_xyxy.tolist(), graph.labels.tolist(), strict=True)
        yield {
            # Nobody opens it.
            "image": {"path": None, "bytes": b"a picture"},
            "image_id": str(number),
            "width": graph.image_size[1],
            "height": graph.image_size[0],
            "objects": [
                {"id": row, "bbox": box, "label": label}
                for row, (box, label) in enumerate(entities)
            ],
            "relations": [
                dict(zip(("subject", "object", "predicate"), row, strict=True))
                for row in graph.relations.tolist()
            ],
        }


def write_files(folder: Path, count: int, *, distributions: bool) -> tuple[Path, Path]:
    """Write predictions and annotations unless they are there, and return where."""
    folder = folder / f"{count}-{'with' if distributions else 'without'}-distributions"
    predictions, references = folder / "predictions.parquet", folder / "references"
    folder.mkdir(parents=True, exist_ok=True)
    names = [[str(number) for number in range(size)] for size in (CLASSES, PREDICATES)]
    if not predictions.is_file():
        id2names = [dict(enumerate(one)) for one in names]
        with PredictionWriter(predictions, *id2names, distributions=distributions) as writer:
            images = make_images(count, distributions=distributions)
            for number, (prediction, _) in enumerate(images):
                writer.write(str(number), prediction)
    if not any(references.glob("*.parquet")):
        make = functools.partial(make_records, count, distributions=distributions)
        source = RecordSource(*names, lambda _: make(), "random scenes")
        write_parquet(source, make(), references, "test", embed_images=False)
    return predictions, references


def measure_command(predictions: Path, references: Path) -> tuple[float, float, float]:
    """Return seconds, MB and R@50 of `sgtr-hf evaluate`."""
    output = predictions.with_name("report.json")
    arguments = ["evaluate", str(predictions), str(references), "--protocol", PROTOCOL.name]
    # What is imported when it is first used, shall not count.
    next(iter(PredictionFile(predictions)))
    next(iter(open_dataset(references, "test")))
    memory, started = PeakMemory(), time.perf_counter()
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = sgtr_hf.cli.main([*arguments, "--output", str(output)])
    seconds = time.perf_counter() - started
    if code:
        raise SystemExit(said.getvalue())
    return seconds, memory.growth(), json.loads(output.read_text())["recall"]["R@50"]


def measure_file(folder: Path, count: int, *, distributions: bool) -> None:
    """Run the command on a file and print a row."""
    paths = write_files(folder, count, distributions=distributions)
    size = paths[0].stat().st_size / 2**20
    seconds, memory, recall = in_own_process(measure_command, *paths)
    print(
        f"| {'with' if distributions else 'without'} distributions | {count} | {size:.0f} | "
        f"{1e3 * seconds / count:.3f} | {seconds:.1f} | {memory:.0f} | {recall:.4f} |"
    )


def main() -> None:
    """Measure with and without predicate distributions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=26446, help="test images of VG150")
    parser.add_argument("--reference-images", type=int, default=512)
    parser.add_argument("--command", action="store_true", help="measure sgtr-hf evaluate")
    parser.add_argument("--folder", type=Path, help="of the files for --command; temporary if none")
    options = parser.parse_args()
    disable_progress_bars()
    if not options.command:
        print("| figures | images | ms an image | straightforward | ratio | s in all | MB | R@50 |")
        print("|---|---|---|---|---|---|---|---|")
        for no_constraint in (False, True):
            measure_both(options, no_constraint=no_constraint)
        return
    print("| file of predictions | images | MB | ms an image | s in all | MB of memory | R@50 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for distributions in (False, True):
            folder = options.folder or Path(temporary)
            measure_file(folder, options.images, distributions=distributions)


if __name__ == "__main__":
    main()
