"""Settings of a recipe that would have no effect are errors: they say what a run does not do."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any


def reject_unused(
    section: str, settings: Any, names: Iterable[str], remedy: str = "remove it"
) -> None:
    """Reject settings that a task does not read.

    Args:
        section: Where in the recipe they are; "" for its top.
        settings: A dataclass.
        names: Its fields without effect; they may have their defaults.
        remedy: What to do instead.

    Raises:
        ValueError: If one is not at its default.
    """
    for name in _changed(settings, names):
        raise ValueError(
            f"`{_full(section, name)}` has no use for this task, got "
            f"{getattr(settings, name)!r}; {remedy}."
        )


def reject_idle(section: str, settings: Any, dependents: Mapping[str, Iterable[str]]) -> None:
    """Reject settings that say more about something that is off.

    Args:
        section: Where in the recipe they are; "" for its top.
        settings: A dataclass.
        dependents: By the field that is off at its default: those without effect then.

    Raises:
        ValueError: If one is not at its default while the field it depends on is.
    """
    for switch, names in dependents.items():
        if _changed(settings, [switch]):
            continue
        for name in _changed(settings, names):
            raise ValueError(
                f"`{_full(section, name)}` is {getattr(settings, name)!r}, but has no use without "
                f"`{_full(section, switch)}`, which is {getattr(settings, switch)!r}: set that "
                "too, or remove it."
            )


def _changed(settings: Any, names: Iterable[str]) -> list[str]:
    """Names of the fields that are not at their defaults."""
    fields = {entry.name: entry for entry in dataclasses.fields(settings)}
    return [name for name in names if getattr(settings, name) != _default(fields[name])]


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is dataclasses.MISSING:
        return entry.default
    return entry.default_factory()


def _full(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name
