"""Counts what a data set holds: sizes, entities, and the long tail of predicates."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..predicate_groups import group_by_frequency
from .record_source import Record, RecordSource


# Areas in pixels below which COCO calls an entity small, or medium.
_AREA_LIMITS = {"small": 32**2, "medium": 96**2, "large": float("inf")}
_GROUP_COLORS = {"head": "tab:red", "body": "tab:orange", "tail": "tab:blue"}


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
    areas: Counter[str] = field(default_factory=Counter)
    oddities: Counter[str] = field(default_factory=Counter)
    triplets: set[tuple[int, int, int]] = field(default_factory=set)
    """Distinct labels of subject and object, and predicates."""

    def add(self, record: Record) -> None:
        """Count a record."""
        entities, relations = record["objects"], record["relations"]
        self.images += 1
        self.labels.update(entity["label"] for entity in entities)
        self.predicates.update(relation["predicate"] for relation in relations)
        self.entities_per_image[len(entities)] += 1
        self.relations_per_image[len(relations)] += 1
        self.sizes[record["width"], record["height"]] += 1
        self.areas.update(_size_class(entity["bbox"]) for entity in entities)
        rows = [(row["subject"], row["object"], row["predicate"]) for row in relations]
        self.triplets.update(
            (entities[subject]["label"], entities[object_]["label"], predicate)
            for subject, object_, predicate in rows
        )
        self._add_oddities(rows, len(entities))

    def _add_oddities(self, rows: Sequence[tuple[int, int, int]], num_entities: int) -> None:
        pairs = Counter((subject, object_) for subject, object_, _ in set(rows))
        related = {end for pair in pairs for end in pair}
        self.oddities += Counter(
            {
                "relations that come twice": len(rows) - len(set(rows)),
                "pairs with several predicates": sum(count > 1 for count in pairs.values()),
                "relations of an entity with itself": sum(row[0] == row[1] for row in rows),
                "entities without a relation": num_entities - len(related),
                "images without a relation": int(not rows),
            }
        )

    def groups(self) -> dict[str, list[int]]:
        """Split the predicates into head, body and tail by their share of all relations."""
        numbers = range(len(self.source.predicate_names))
        return group_by_frequency([self.predicates[number] for number in numbers])

    def __str__(self) -> str:
        """Write the counts as text."""
        entities, relations = self.labels.total(), self.predicates.total()
        images = max(self.images, 1)
        areas = (
            f"{self.areas[name]} {name} ({self.areas[name] / max(entities, 1):.1%})"
            for name in _AREA_LIMITS
        )
        lines = [
            f"{self.images} images, {entities} entities ({entities / images:.1f} an image), "
            f"{relations} relations ({relations / images:.1f} an image)",
            _describe_sizes(self.sizes),
            f"entities an image: {_quantiles(self.entities_per_image)}",
            f"relations an image: {_quantiles(self.relations_per_image)}",
            f"entities by area: {', '.join(areas)}",
            f"{len(self.triplets)} distinct triplets of classes and predicate",
            *(f"{count} {name}" for name, count in self.oddities.items()),
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
        """Draw the long tails of predicates and classes, boxes an image, and image sizes."""
        figure = Figure(figsize=(15, 9), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        places = figure.subplots(2, 3, width_ratios=(3, 1, 1))
        self._draw_predicates(places[0, 0])
        self._draw_classes(places[1, 0])
        _draw_counter(places[0, 1], self.entities_per_image, "boxes an image")
        _draw_counter(places[1, 1], self.relations_per_image, "relations an image")
        widths, heights = zip(*self.sizes, strict=True) if self.sizes else ((), ())
        places[0, 2].scatter(widths, heights, s=[6 + count**0.5 for count in self.sizes.values()])
        places[0, 2].set(title="image sizes (pixels)", xlabel="width", ylabel="height")
        names = list(_AREA_LIMITS)
        places[1, 2].bar(names, [self.areas[name] for name in names])
        places[1, 2].set(title="boxes by area", xlabel="below 32$^2$, 96$^2$ pixels, above")
        figure.savefig(path)

    def _draw_predicates(self, axes: Axes) -> None:
        position, names = 0, []
        for group, predicates in self.groups().items():
            shown = [self.predicates[number] for number in predicates]
            axes.bar(
                range(position, position + len(shown)),
                shown,
                color=_GROUP_COLORS[group],
                label=f"{group} ({len(shown)})",
            )
            position += len(shown)
            names += [self.source.predicate_names[number] for number in predicates]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set(title="relations by predicate")
        if self.predicates:
            axes.set(yscale="log", ylim=(0.8, None))
            axes.legend()

    def _draw_classes(self, axes: Axes) -> None:
        ranked = _ranked(self.labels, len(self.source.entity_names))
        axes.bar(range(len(ranked)), [self.labels[number] for number in ranked])
        # More names than this cannot be read.
        step = max(len(ranked) // 75, 1)
        names = [self.source.entity_names[number] for number in ranked[::step]]
        axes.set_xticks(range(0, len(ranked), step), names, rotation=90, fontsize=7)
        axes.set(title="boxes by class" + (f", every {step}th named" if step > 1 else ""))
        if self.labels:
            axes.set(yscale="log", ylim=(0.8, None))


def count_records(source: RecordSource, records: Iterable[Record]) -> DatasetStatistics:
    """Count all records of a source."""
    statistics = DatasetStatistics(source)
    for record in records:
        statistics.add(record)
    return statistics


def _ranked(counts: Counter[int], number: int) -> list[int]:
    """Numbers from 0, the most frequent first."""
    return sorted(range(number), key=lambda index: (-counts[index], index))


def _size_class(box: Sequence[float]) -> str:
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    return next(name for name, limit in _AREA_LIMITS.items() if area < limit)


def _describe_sizes(sizes: Counter[tuple[int, int]]) -> str:
    if not sizes:
        return "no image size"
    (width, height), most = sizes.most_common(1)[0]
    widths, heights = zip(*sizes, strict=True)
    return (
        f"{len(sizes)} image sizes, {min(widths)} to {max(widths)} wide and {min(heights)} to "
        f"{max(heights)} high, most often {width} x {height} ({most})"
    )


def _quantiles(counter: Counter[int]) -> str:
    values = np.repeat(list(counter), list(counter.values())) if counter else np.zeros(1)
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return (
        f"median {middle:.0f}, 5 % below {low:.0f}, 5 % above {high:.0f}, most {values.max():.0f}"
    )


def _draw_counter(axes: Axes, counter: Counter[int], title: str) -> None:
    axes.bar(list(counter), list(counter.values()), width=1.0)
    axes.set(title=title, ylabel="images")
