"""The rule that annotates relations of a tabletop scene.

Every relation follows from geometry and can be seen in the picture; nothing is drawn at random,
for a model cannot learn a coin. Each pair has at most one relation, and the direction of a pair
depends on where things are, never on the order of a list.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


PREDICATE_NAMES = (
    "on",
    "next to",
    "inside",
    "left of",
    "right of",
    "in front of",
    "behind",
    "under",
    "supporting",
    "leaning on",
)
# Lengths in decimetres, angles in degrees.
TOUCHING_GAP = 0.16
NEIGHBOUR_GAP = 0.9
LEANING_TILT = (14.0, 80.0)
# A footprint this much smaller than what rests on it makes its owner a support.
SUPPORTING_RATIO = 0.7
FLOOR = -1


@dataclass(frozen=True)
class PlacedObject:
    """Where one visible body ended up.

    Args:
        name: Its class.
        centre: (3,) centre of its bounding box.
        half_extents: (3,) of its axis-aligned bounding box.
        half_sides: (3,) in its own frame.
        rotation: (3, 3) own frame to world.
        inner_half_sides: (3,) room inside it, zeros if it cannot hold anything.
        support: Index of the object that carries most of its weight, FLOOR for the ground.
        tilt: Degrees between the vertical and the axis of its own that is nearest to it.
        pixel_area: Visible pixels.
    """

    name: str
    centre: NDArray[np.float64]
    half_extents: NDArray[np.float64]
    half_sides: NDArray[np.float64]
    rotation: NDArray[np.float64]
    inner_half_sides: NDArray[np.float64]
    support: int
    tilt: float
    pixel_area: int


class Contacts(NamedTuple):
    """How bodies touch, as (n, n) matrices."""

    gap: NDArray[np.float64]
    """Distance of the surfaces; infinite beyond NEIGHBOUR_GAP."""
    sideways: NDArray[np.float64]
    """Horizontal share of the force between two touching bodies, 0 if they do not touch."""


class CameraAxes(NamedTuple):
    """Horizontal directions as the viewer has them, unit vectors (3,)."""

    right: NDArray[np.float64]
    away: NDArray[np.float64]


def annotate(
    objects: list[PlacedObject], contacts: Contacts, camera: CameraAxes
) -> list[tuple[int, int, int]]:
    """List the relations as subject, object and predicate, each an index.

    Args:
        objects: The visible objects.
        contacts: Between them.
        camera: Directions of the view.
    """
    relations: dict[tuple[int, int], str] = {}
    holders = [_holder(objects, index) for index in range(len(objects))]
    # Physical relations are told from the higher things down, so the lower of two things that
    # lean on each other is the one that is leant on.
    for index in sorted(range(len(objects)), key=lambda index: -objects[index].centre[2]):
        found = _physical_relation(objects, holders, contacts, index)
        if found is not None and (found[1], found[0]) not in relations:
            relations.setdefault(found[:2], found[2])
    for first, second in _neighbours(objects, holders, contacts):
        if (first, second) in relations or (second, first) in relations:
            continue
        # The smaller thing in the picture is told by the larger one.
        areas = (objects[first].pixel_area, objects[second].pixel_area)
        subject, object_ = (first, second) if areas[0] <= areas[1] else (second, first)
        relations[subject, object_] = _direction(
            objects[subject], objects[object_], contacts.gap[first, second], camera
        )
    return [
        (subject, object_, PREDICATE_NAMES.index(predicate))
        for (subject, object_), predicate in sorted(relations.items())
    ]


def _physical_relation(
    objects: list[PlacedObject], holders: list[int], contacts: Contacts, index: int
) -> tuple[int, int, str] | None:
    """What holds an object: a container, a thing it leans on, a carrier, or a roof above it."""
    entity = objects[index]
    if entity.name == "table":
        # It stands on the floor, whatever pushes its legs.
        return None
    found: tuple[int, int, str] | None = None
    rest = int(contacts.sideways[index].argmax())
    is_tilted = LEANING_TILT[0] < entity.tilt < LEANING_TILT[1]
    if holders[index] != FLOOR:
        found = index, holders[index], "inside"
    elif is_tilted and contacts.sideways[index, rest] > 0 and rest != entity.support:
        found = index, rest, "leaning on"
    elif entity.support != FLOOR:
        is_narrow = _footprint(objects[entity.support]) < SUPPORTING_RATIO * _footprint(entity)
        found = (
            (entity.support, index, "supporting") if is_narrow else (index, entity.support, "on")
        )
    elif (roof := _roof(objects, index)) != FLOOR:
        found = index, roof, "under"
    return found


def _footprint(entity: PlacedObject) -> float:
    return float(np.prod(entity.half_extents[:2]))


def _holder(objects: list[PlacedObject], index: int) -> int:
    """The open box whose room holds the object's centre, or FLOOR."""
    if objects[index].name == "table":
        # The centre of a table is empty, and a box under it may be there.
        return FLOOR
    for other, container in enumerate(objects):
        if other == index or container.name != "box":
            continue
        offset = container.rotation.T @ (objects[index].centre - container.centre)
        is_upright = container.rotation[2, 2] > 0.9
        is_within = (np.abs(offset[:2]) < container.inner_half_sides[:2]).all()
        depth = offset[2] - min(objects[index].half_sides[2], 0.3)
        if (
            is_upright
            and is_within
            and -container.half_sides[2] < offset[2]
            and (depth < container.half_sides[2])
        ):
            return other
    return FLOOR


def _roof(objects: list[PlacedObject], index: int) -> int:
    """The table whose top lies over the object, or FLOOR."""
    entity = objects[index]
    for other, table in enumerate(objects):
        if table.name != "table" or other == index:
            continue
        offset = table.rotation.T @ (entity.centre - table.centre)
        is_below = entity.centre[2] + entity.half_extents[2] < 2 * table.half_sides[2]
        if is_below and (np.abs(offset[:2]) < table.half_sides[:2]).all():
            return other
    return FLOOR


def _neighbours(
    objects: list[PlacedObject], holders: list[int], contacts: Contacts
) -> list[tuple[int, int]]:
    """Each object with the nearest one on the same ground."""
    pairs = []
    for index, entity in enumerate(objects):
        if holders[index] != FLOOR or entity.name == "table":
            continue
        gaps = contacts.gap[index].copy()
        for other, candidate in enumerate(objects):
            is_beside = (
                other != index
                and candidate.support == entity.support
                and holders[other] == FLOOR
                and candidate.name != "table"
            )
            if not is_beside:
                gaps[other] = np.inf
        nearest = int(gaps.argmin())
        if gaps[nearest] < NEIGHBOUR_GAP:
            pairs.append((index, nearest))
    return pairs


def _direction(subject: PlacedObject, object_: PlacedObject, gap: float, camera: CameraAxes) -> str:
    offset = subject.centre - object_.centre
    right, away = float(offset @ camera.right), float(offset @ camera.away)
    if gap < TOUCHING_GAP:
        return "next to"
    if abs(right) >= abs(away):
        return "right of" if right > 0 else "left of"
    return "behind" if away > 0 else "in front of"
