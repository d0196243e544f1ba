"""What every reader returns: vocabularies, and records one after the other."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .record_checks import Problem, find_picture_problem, find_problems
from .schema import scene_graph_features


logger = logging.getLogger(__name__)

# A record of `schema.scene_graph_features`, its image as {"path": ...} or {"bytes": ...}.
Record = dict[str, Any]
Entry = TypeVar("Entry")
OnError = Literal["raise", "drop"]
# Of each report, the first few messages are kept.
_NUM_EXAMPLES = 5


@dataclass
class DropReport:
    """What did not become part of the records.

    Args:
        counts: Parts that `on_error="drop"` left out, by reason.
        left_out: Parts that the format's benchmark leaves out as well, by reason.
        examples: First few messages about dropped parts.
    """

    counts: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, message: str) -> None:
        """Count a dropped part."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < _NUM_EXAMPLES:
            self.examples.append(message)

    def __str__(self) -> str:
        """Say what was dropped, and what was left out."""
        text = f"dropped: {_listed(self.counts)}" if self.counts else "nothing was dropped"
        if self.left_out:
            text += f"; left out, as the format's benchmark does: {_listed(self.left_out)}"
        return text


@dataclass
class Reading:
    """One pass over a file, as a reader sees it.

    Args:
        place: The file, for messages.
        on_broken: Takes the message about an entry of which no record can be made; an error is
            raised if None.
        left_out: Counts what the reader leaves out on purpose, by reason.
        num_good: Records that were made so far.
    """

    place: str
    on_broken: Callable[[str], None] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    num_good: int = 0

    def records(
        self,
        entries: Iterable[Entry],
        build: Callable[[Entry], Record],
        name: Callable[[Entry], Any],
    ) -> Iterator[Record]:
        """Make a record of each entry of a file.

        Args:
            entries: Of the file, in its order.
            build: Makes the record of an entry.
            name: Gives the name of an entry's image, for messages.

        Raises:
            ValueError: With file, image, field, and the number of good records before it.
        """
        number = -1
        for number, entry in enumerate(self._entries(entries)):
            try:
                record = build(entry)
            except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
                message = f"{self.place}: {_describe(entry, name, number)} {_explain(error)}."
                if self.on_broken is None:
                    raise ValueError(f"{message} {self._said_good()}") from error
                self.on_broken(message)
                continue
            self.num_good += 1
            yield record
        logger.debug("%s: %d records of %d entries.", self.place, self.num_good, number + 1)

    def _entries(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Yield entries; what is wrong with the file as a whole ends the reading in any case."""
        try:
            yield from entries
        except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
            message = f"{self.place}: the next entry {_explain(error)}."
            raise ValueError(f"{message} {self._said_good()}") from error
        except ValueError as error:
            # Of the same kind: an order that needs an index can be helped.
            error.args = (f"{error} {self._said_good()}",)
            raise

    def _said_good(self) -> str:
        return f"{self.num_good} good records were read before."


class Unresolved(int):
    """-1 in place of an index, for a name or number of the file that stands for nothing.

    The check of the record reports it with its original value.
    """

    original: Any

    def __new__(cls, original: Any) -> "Unresolved":
        """Make one of what the file says."""
        value = super().__new__(cls, -1)
        value.original = original
        return value

    def __repr__(self) -> str:
        return f"{self.original!r}, which stands for nothing"

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return repr(self)


@dataclass(frozen=True)
class RecordSource:
    """A split of annotated images in any format.

    Args:
        entity_names: Classes of entities, from 0, without background.
        predicate_names: Predicates, from 0, without background.
        make_records: Starts reading; each call reads from the beginning.
        place: The file or folder, for messages.
        attribute_names: Names of attributes, where entities have any.
        has_masks: Whether entities have masks.
        count: Number of images, where it is known without reading.
    """

    entity_names: Sequence[str]
    predicate_names: Sequence[str]
    make_records: Callable[[Reading], Iterator[Record]]
    place: str
    attribute_names: Sequence[str] = ()
    has_masks: bool = False
    count: int | None = None

    def __iter__(self) -> Iterator[Record]:
        """Read the records from the beginning, as they are."""
        return self.make_records(Reading(self.place))

    def features(self) -> Any:
        """Return the `datasets.Features` of the records."""
        return scene_graph_features(
            self.entity_names, self.predicate_names, self.attribute_names, masks=self.has_masks
        )

    def problems(self, record: Record, *, pictures: bool = False) -> list[Problem]:
        """List the parts of a record that cannot be meant; with `pictures`, decode its picture."""
        sizes = (len(self.entity_names), len(self.predicate_names), len(self.attribute_names))
        problems = find_problems(record, *sizes)
        if pictures and (problem := find_picture_problem(record)) is not None:
            problems.append(problem)
        return problems

    def checked(
        self,
        on_error: OnError = "raise",
        report: DropReport | None = None,
        *,
        pictures: bool = False,
    ) -> Iterator[Record]:
        """Read the records and check each.

        Args:
            on_error: "raise" stops at the first part that cannot be meant; "drop" leaves the part
                out, with the relations that point to it, and counts it.
            report: Counts what was dropped, and what the format leaves out.
            pictures: Decode the pictures too, and compare their sizes with the record's.

        Raises:
            ValueError: With file, image, field and value, and the number of good records before.
        """
        report = DropReport() if report is None else report
        reading = Reading(self.place, left_out=report.left_out)
        if on_error == "drop":
            reading.on_broken = lambda message: report.add("broken records", message)
        for number, record in enumerate(self.make_records(reading)):
            problems = self.problems(record, pictures=pictures)
            if problems and on_error == "raise":
                raise ValueError(
                    f"{self.place}: {problems[0].message} {number} good records were read before."
                )
            kept = drop_problems(record, problems, report) if problems else record
            if kept is not None:
                yield kept


def drop_problems(record: Record, problems: Sequence[Problem], report: DropReport) -> Record | None:
    """Leave out what is wrong, with the relations of entities that go, and count all of it.

    Returns:
        The record, or None if all of it is wrong.
    """
    wrong: dict[str, set[Any]] = {"objects": set(), "relations": set(), "attributes": set()}
    for problem in problems:
        if problem.part == "image":
            report.add(f"images with a wrong {problem.field}", problem.message)
            return None
        report.add(f"{problem.part} with a wrong {problem.field}", problem.message)
        is_attribute = problem.part == "attributes"
        wrong[problem.part].add((problem.row, problem.position) if is_attribute else problem.row)
    kept = [index for index in range(len(record["objects"])) if index not in wrong["objects"]]
    objects = [_drop_attributes(record["objects"][row], row, wrong["attributes"]) for row in kept]
    new_index = {old: new for new, old in enumerate(kept)}
    relations = []
    for index, relation in enumerate(record["relations"]):
        if index in wrong["relations"]:
            continue
        if {relation["subject"], relation["object"]} & wrong["objects"]:
            report.add(
                "relations of dropped objects",
                f"Image {record['image_id']}: `relations[{index}]` goes with its object.",
            )
            continue
        ends = {name: new_index[relation[name]] for name in ("subject", "object")}
        relations.append(relation | ends)
    return record | {"objects": objects, "relations": relations}


def _drop_attributes(
    entity: dict[str, Any], row: int, wrong: set[tuple[int, int]]
) -> dict[str, Any]:
    if not wrong or not entity.get("attributes"):
        return entity
    attributes = enumerate(entity["attributes"])
    kept = [number for position, number in attributes if (row, position) not in wrong]
    return entity | {"attributes": kept}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items())


def _describe(entry: Entry, name: Callable[[Entry], Any], number: int) -> str:
    """Name an entry by its number, counted from 0, and by its image if it says which."""
    try:
        return f"entry {number} (image {name(entry)})"
    except (LookupError, TypeError, AttributeError):
        return f"entry {number}"


def _explain(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"lacks `{error.args[0]}`"
    return f"cannot be read: {str(error).rstrip('.')}"
