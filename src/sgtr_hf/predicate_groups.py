"""Head, body and tail: predicates grouped by how often they are annotated."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType


GROUP_NAMES = ("head", "body", "tail")
# Head, body and tail are the predicates that make up the first half of all relations, the next
# part up to this share, and the rest.
HEAD_SHARE, BODY_SHARE = 0.5, 0.9

Groups = Mapping[str, Sequence[int]]

# Of the released SGTR, `LONGTAIL_PART_DICT` in its configurations; predicates count from 0 here.
_VG150_HEAD = (7, 19, 21, 28, 29, 30, 47)
_VG150_BODY = (
    *(0, 4, 5, 6, 8, 10, 15, 18, 20, 22, 24, 32, 34, 37, 39, 40, 42, 45, 46, 48, 49),
)  # fmt: skip
_OPEN_IMAGES_HEAD = (0, 1, 2, 7, 8, 16, 28)
_OPEN_IMAGES_BODY = (4, 9, 13, 18, 20, 21, 24, 26)


def _published(head: tuple[int, ...], body: tuple[int, ...], num_predicates: int) -> Groups:
    tail = tuple(sorted(set(range(num_predicates)) - {*head, *body}))
    return MappingProxyType(dict(zip(GROUP_NAMES, (head, body, tail), strict=True)))


PUBLISHED_GROUPS: Mapping[str, Groups] = MappingProxyType(
    {
        "vg150": _published(_VG150_HEAD, _VG150_BODY, 50),
        "open-images": _published(_OPEN_IMAGES_HEAD, _OPEN_IMAGES_BODY, 30),
    }
)


def group_by_frequency(counts: Sequence[int]) -> dict[str, list[int]]:
    """Split predicates into head, body and tail by their share of all relations.

    Args:
        counts: How often each predicate is annotated.

    Returns:
        Predicates of each group, most frequent first; those never annotated are in the tail.
    """
    total, before = sum(counts), 0
    groups: dict[str, list[int]] = {name: [] for name in GROUP_NAMES}
    for predicate in sorted(range(len(counts)), key=lambda number: (-counts[number], number)):
        is_head, is_body = before < HEAD_SHARE * total, before < BODY_SHARE * total
        name = "head" if is_head else "body" if is_body else "tail"
        groups[name if counts[predicate] else "tail"].append(predicate)
        before += counts[predicate]
    return groups
