"""Time and memory of the evaluation, beside a straightforward evaluator on the same data.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--images 26446]

100 predicted and 10 annotated triplets an image, 80 detections, 150 classes, 50 predicates, one
thread. The straightforward evaluator matches as the published ones do: one annotated triplet after
the other against all predictions, once for each setting, and a union over predictions for each K.
It sees a part of the images; both give the same figures. Memory is that of the process beyond what
it had when the first image came; images are made on the way and not kept, and their making is not
timed.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator

import numpy as np

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
    waiting: list[Pair] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == BATCH:
            started = time.perf_counter()
            add(waiting)
            seconds += time.perf_counter() - started
            count += len(waiting)
            waiting = []
    return seconds, count


def measure(options: argparse.Namespace, *, no_constraint: bool) -> None:
    """Time both evaluators and print a row."""
    seen = {
        tuple(row)
        for _, reference in make_images(200, distributions=False)
        for row in labelled_triplets(reference).tolist()
    }
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metric = SceneGraphRecall(
        TOP_K,
        PROTOCOL,
        PREDICATES,
        seen_triplets=TrainingTriplets(np.array(sorted(seen))),
        measured=Measured(no_constraint=no_constraint),
    )
    images = make_images(options.images, distributions=no_constraint)
    seconds, count = time_of(images, lambda pairs: metric.update(*zip(*pairs, strict=True)))
    started = time.perf_counter()
    report = metric.compute()
    seconds += time.perf_counter() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    slow = StraightforwardEvaluator(seen, no_constraint=no_constraint)
    part = make_images(min(options.reference_images, options.images), distributions=no_constraint)
    slow_seconds, slow_count = time_of(part, lambda pairs: [slow.add(*pair) for pair in pairs])
    check(seen, slow, slow_count, no_constraint=no_constraint)
    own, other = 1e3 * seconds / count, 1e3 * slow_seconds / slow_count
    what = "R, mR, zR" + (", without constraint too" if no_constraint else "")
    print(
        f"| {what} | {count} | {own:.3f} | {other:.3f} | {other / own:.1f} | {seconds:.1f} | "
        f"{memory:.0f} | {report['R@50']:.4f} |"
    )


def check(
    seen: set[tuple[int, ...]],
    slow: StraightforwardEvaluator,
    count: int,
    *,
    no_constraint: bool,
) -> None:
    """Stop unless both evaluators say the same of the same images."""
    metric = SceneGraphRecall(
        TOP_K, PROTOCOL, PREDICATES, seen_triplets=TrainingTriplets(np.array(sorted(seen)))
    )
    for prediction, reference in make_images(count, distributions=no_constraint):
        metric.update([prediction], [reference])
    report = metric.compute()
    for name in slow.shares:
        if " of " not in name and abs(report[name] - slow.recall(name)) > TOLERANCE:
            raise SystemExit(f"{name}: {report[name]} is not {slow.recall(name)}")


def main() -> None:
    """Measure with and without predicate distributions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=26446, help="test images of VG150")
    parser.add_argument("--reference-images", type=int, default=512)
    options = parser.parse_args()
    print("| figures | images | ms an image | straightforward | ratio | s in all | MB | R@50 |")
    print("|---|---|---|---|---|---|---|---|")
    for no_constraint in (False, True):
        measure(options, no_constraint=no_constraint)


if __name__ == "__main__":
    main()
