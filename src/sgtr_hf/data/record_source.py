"""What every reader returns: vocabularies, and records one after the other."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .schema import scene_graph_features


logger = logging.getLogger(__name__)

# A record of `schema.scene_graph_features`, its image as {"path": ...} or {"bytes": ...}.
Record = dict[str, Any]
OnError = Literal["raise", "drop"]
# Names of reasons that a report lists one by one.
_REPORTED = 5


@dataclass
class DropReport:
    """What `on_error="drop"` left out, by reason.

    Args:
        counts: Number of dropped parts by reason.
        examples: First few messages.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, message: str) -> None:
        """Count a dropped part."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < _REPORTED:
            self.examples.append(message)

    def __str__(self) -> str:
        """Say what was dropped."""
        if not self.counts:
            return "nothing was dropped"
        parts = ", ".join(f"{count} {reason}" for reason, count in self.counts.items())
        return f"dropped: {parts}"


@dataclass(frozen=True)
class RecordSource:
    """A split of annotated images in any format.

    Args:
        entity_names: Classes of entities, from 0, without background.
        predicate_names: Predicates, from 0, without background.
        make_records: Starts reading; each call reads from the beginning.
        attribute_names: Names of attributes, where entities have any.
        has_masks: Whether entities have masks.
        count: Number of images, where it is known without reading.
    """

    entity_names: Sequence[str]
    predicate_names: Sequence[str]
    make_records: Callable[[], Iterator[Record]]
    attribute_names: Sequence[str] = ()
    has_masks: bool = False
    count: int | None = None

    def __iter__(self) -> Iterator[Record]:
        """Read the records from the beginning, as they are."""
        return self.make_records()

    def features(self) -> Any:
        """Return the `datasets.Features` of the records."""
        return scene_graph_features(
            self.entity_names, self.predicate_names, self.attribute_names, masks=self.has_masks
        )

    def checked(
        self, on_error: OnError = "raise", report: DropReport | None = None
    ) -> Iterator[Record]:
        """Read the records and check each.

        Args:
            on_error: "raise" stops at the first part that cannot be meant; "drop" leaves the part
                out, with the relations that point to it, and counts it.
            report: Counts what was dropped.

        Raises:
            ValueError: With image, field and value, and the number of good records before it.
        """
        report = DropReport() if report is None else report
        for number, record in enumerate(self):
            problems = find_problems(record, len(self.entity_names), len(self.predicate_names))
            if problems and on_error == "raise":
                raise ValueError(f"{problems[0].message} {number} good records were read before.")
            yield drop_problems(record, problems, report) if problems else record


@dataclass(frozen=True)
class Problem:
    """A part of a record that cannot be meant.

    Args:
        part: "objects" or "relations".
        index: Its row.
        field: What is wrong with it.
        message: Image, field, value and remedy.
    """

    part: Literal["objects", "relations"]
    index: int
    field: str
    message: str


def find_problems(record: Record, num_labels: int, num_predicates: int) -> list[Problem]:
    """List labels and indices out of range, and boxes that have no area inside their image."""
    problems = []
    image = record["image_id"]
    for index, entity in enumerate(record["objects"]):
        if not 0 <= entity["label"] < num_labels:
            message = (
                f"Image {image}: `objects[{index}].label` must be from 0 to {num_labels - 1}, got "
                f"{entity['label']}."
            )
            problems.append(Problem("objects", index, "label", message))
        elif not _has_area(entity["bbox"], record["width"], record["height"]):
            message = (
                f"Image {image}: `objects[{index}].bbox` must be x1, y1, x2, y2 with an area "
                f"inside the image of {record['width']} x {record['height']} pixels, got "
                f"{list(entity['bbox'])}."
            )
            problems.append(Problem("objects", index, "bbox", message))
    limits = {
        "subject": len(record["objects"]),
        "object": len(record["objects"]),
        "predicate": num_predicates,
    }
    for index, relation in enumerate(record["relations"]):
        for name, limit in limits.items():
            if not 0 <= relation[name] < limit:
                message = (
                    f"Image {image}: `relations[{index}].{name}` must be from 0 to {limit - 1}, "
                    f"got {relation[name]}."
                )
                problems.append(Problem("relations", index, name, message))
                break
    return problems


def drop_problems(record: Record, problems: Sequence[Problem], report: DropReport) -> Record:
    """Leave out what is wrong, with the relations of entities that go, and count all of it."""
    bad_objects = {problem.index for problem in problems if problem.part == "objects"}
    bad_relations = {problem.index for problem in problems if problem.part == "relations"}
    for problem in problems:
        report.add(f"{problem.part} with a wrong {problem.field}", problem.message)
    new_index: dict[int, int] = {}
    for index in range(len(record["objects"])):
        if index not in bad_objects:
            new_index[index] = len(new_index)
    relations = []
    for index, relation in enumerate(record["relations"]):
        if index in bad_relations:
            continue
        if relation["subject"] in bad_objects or relation["object"] in bad_objects:
            report.add(
                "relations of dropped objects",
                f"Image {record['image_id']}: `relations[{index}]` goes with its object.",
            )
            continue
        ends = {name: new_index[relation[name]] for name in ("subject", "object")}
        relations.append(relation | ends)
    objects = [row for index, row in enumerate(record["objects"]) if index not in bad_objects]
    return record | {"objects": objects, "relations": relations}


def _has_area(box: Sequence[float], image_width: int, image_height: int) -> bool:
    x1, y1, x2, y2 = box
    # Written so that a number that is not a number fails too.
    return min(x2, image_width) - max(x1, 0) > 0 and min(y2, image_height) - max(y1, 0) > 0
