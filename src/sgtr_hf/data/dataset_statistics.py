"""Counts what a data set holds: sizes, entities, and the long tail of predicates."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .record_source import Record, RecordSource


# Head, body and tail are the predicates that make up the first half of all relations, the next
# part up to this share, and the rest; papers fix such groups by hand for VG150 and Open Images.
HEAD_SHARE, BODY_SHARE = 0.5, 0.9


@dataclass
class DatasetStatistics:
    """Counts over records; `add` them one after the other.

    Args:
        source: Gives the names.
    """

    source: RecordSource
    images: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    predicates: Counter[int] = field(default_factory=Counter)
    entities_per_image: Counter[int] = field(default_factory=Counter)
    relations_per_image: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        """Count a record."""
        self.images += 1
        self.labels.update(entity["label"] for entity in record["objects"])
        self.predicates.update(relation["predicate"] for relation in record["relations"])
        self.entities_per_image[len(record["objects"])] += 1
        self.relations_per_image[len(record["relations"])] += 1
        self.sizes[record["width"], record["height"]] += 1

    def groups(self) -> dict[str, list[int]]:
        """Split the predicates into head, body and tail by their share of all relations."""
        total = max(self.predicates.total(), 1)
        groups: dict[str, list[int]] = {"head": [], "body": [], "tail": []}
        share = 0.0
        ranked = sorted(
            range(len(self.source.predicate_names)),
            key=lambda number: (-self.predicates[number], number),
        )
        for predicate in ranked:
            name = "head" if share < HEAD_SHARE else "body" if share < BODY_SHARE else "tail"
            groups[name if self.predicates[predicate] else "tail"].append(predicate)
            share += self.predicates[predicate] / total
        return groups

    def __str__(self) -> str:
        """Write the counts as text."""
        entities, relations = self.labels.total(), self.predicates.total()
        images = max(self.images, 1)
        (width, height), most = self.sizes.most_common(1)[0] if self.sizes else ((0, 0), 0)
        lines = [
            f"{self.images} images, {entities} entities ({entities / images:.1f} an image), "
            f"{relations} relations ({relations / images:.1f} an image)",
            f"{len(self.sizes)} image sizes, most often {width} x {height} ({most})",
            f"entities an image: {_quantiles(self.entities_per_image)}",
            f"relations an image: {_quantiles(self.relations_per_image)}",
        ]
        for name, predicates in self.groups().items():
            named = (
                f"{self.source.predicate_names[number]} "
                f"{self.predicates[number] / max(relations, 1):.1%}"
                for number in predicates
            )
            lines.append(f"{name} ({len(predicates)}): {', '.join(named)}")
        unused = [
            name for number, name in enumerate(self.source.entity_names) if not self.labels[number]
        ]
        if unused:
            lines.append(f"classes without an entity ({len(unused)}): {', '.join(unused[:10])}")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Draw the long tail of predicates, entities an image and image sizes."""
        figure = Figure(figsize=(14, 4.5), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        tail, counts, sizes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
        colors = {"head": "tab:red", "body": "tab:orange", "tail": "tab:blue"}
        position = 0
        for name, predicates in self.groups().items():
            shown = [self.predicates[number] for number in predicates]
            tail.bar(range(position, position + len(shown)), shown, color=colors[name], label=name)
            position += len(shown)
        names = [
            self.source.predicate_names[number]
            for group in self.groups().values()
            for number in group
        ]
        tail.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        tail.set(title="relations by predicate", yscale="log")
        tail.legend()
        _draw_counter(counts, self.entities_per_image, "entities an image")
        widths, heights = zip(*self.sizes, strict=True) if self.sizes else ((), ())
        sizes.scatter(widths, heights, s=[4 + count**0.5 for count in self.sizes.values()])
        sizes.set(title="image sizes", xlabel="width", ylabel="height")
        figure.savefig(path)


def count_records(source: RecordSource, records: Iterable[Record]) -> DatasetStatistics:
    """Count all records of a source."""
    statistics = DatasetStatistics(source)
    for record in records:
        statistics.add(record)
    return statistics


def _quantiles(counter: Counter[int]) -> str:
    values = np.repeat(list(counter), list(counter.values())) if counter else np.zeros(1)
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return f"median {middle:.0f}, 5 % below {low:.0f}, 5 % above {high:.0f}, most {values.max()}"


def _draw_counter(axes: object, counter: Counter[int], title: str) -> None:
    axes.bar(list(counter), list(counter.values()))  # type: ignore[attr-defined]
    axes.set(title=title, ylabel="images")  # type: ignore[attr-defined]
