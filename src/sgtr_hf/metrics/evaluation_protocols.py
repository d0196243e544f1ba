"""Named ways of evaluating scene graphs, and what they disagree about."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args


GraphConstraint: TypeAlias = Literal["pair", "row", "none"]
Overlap: TypeAlias = Literal["exact", "pixels", "inflated", "masks"]
Mode: TypeAlias = Literal["sgdet", "sgcls", "predcls"]

MODES: tuple[Mode, ...] = get_args(Mode)


def check_iou_threshold(iou_threshold: float) -> None:
    """Raise ValueError unless the threshold is in (0, 1]; at 0 boxes far apart would agree."""
    if not 0.0 < iou_threshold <= 1.0:
        raise ValueError(f"`iou_threshold` must be in (0, 1], got {iou_threshold}.")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless a value is one of those known."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


@dataclass(frozen=True)
class RecallProtocol:
    """What evaluators of scene graphs disagree about; the defaults are those of `strict`.

    Args:
        name: For reports.
        iou_threshold: Least overlap of subjects and of objects, inclusive, (0, 1].
        overlap: "exact" takes boxes as they are; "pixels" counts the last pixel as part of a box,
            one more in every width and height; "inflated" does so for intersections alone, which
            lets the overlap exceed 1; "masks" compares masks instead of boxes.
        graph_constraint: "pair" keeps the first relation of an ordered pair of entities; "row"
            keeps every relation and lets it say its likeliest predicate, where it knows the
            probabilities of all; "none" keeps every relation as it is.
        rank_by_score: Sort relations by score, equal ones in the order of the list; else the order
            of the list counts.
        drop_repeats: Let a predicate of a pair occur once among the predictions without constraint.
        skip_images_without_predictions: Leave such images out instead of counting them as 0, which
            raises the mean.
        average_all_predicates: Count predicates that are never annotated as 0 in the mean recall
            instead of leaving them out; needs to know how many predicates there are.

    Raises:
        ValueError: If a value is not one of these.
    """

    name: str = "custom"
    iou_threshold: float = 0.5
    overlap: Overlap = "exact"
    graph_constraint: GraphConstraint = "pair"
    rank_by_score: bool = True
    drop_repeats: bool = True
    skip_images_without_predictions: bool = False
    average_all_predicates: bool = False

    def __post_init__(self) -> None:
        check_iou_threshold(self.iou_threshold)
        check_choice("overlap", self.overlap, get_args(Overlap))
        check_choice("graph_constraint", self.graph_constraint, get_args(GraphConstraint))


STRICT = RecallProtocol("strict")
# KaihuaTang/Scene-Graph-Benchmark.pytorch, `sgg_eval.py` and `vg_eval.py`: images without
# predictions return before anything is counted; all lists have one row a pair by construction.
SCENE_GRAPH_BENCHMARK = RecallProtocol(
    "scene_graph_benchmark",
    overlap="pixels",
    graph_constraint="row",
    rank_by_score=False,
    drop_repeats=False,
    skip_images_without_predictions=True,
    average_all_predicates=True,
)
# naver-ai/egtr, `sg_eval.py`: the same without the skipping.
EGTR = RecallProtocol(
    "egtr",
    overlap="pixels",
    graph_constraint="row",
    rank_by_score=False,
    drop_repeats=False,
    average_all_predicates=True,
)
# Scarecrow0/SGTR, `vg_sgg_eval_tools.py:230`: the benchmark's evaluator, but each row says what the
# post-processing gave it, and pairs repeat with other predicates.
AS_EMITTED = RecallProtocol(
    "as_emitted",
    overlap="pixels",
    graph_constraint="none",
    rank_by_score=False,
    drop_repeats=False,
    skip_images_without_predictions=True,
    average_all_predicates=True,
)
PROTOCOLS: Mapping[str, RecallProtocol] = MappingProxyType(
    {protocol.name: protocol for protocol in (STRICT, SCENE_GRAPH_BENCHMARK, EGTR, AS_EMITTED)}
)


def resolve_protocol(protocol: str | RecallProtocol) -> RecallProtocol:
    """Return a protocol by its name, or the one given.

    Raises:
        ValueError: If there is none of this name.
    """
    if isinstance(protocol, RecallProtocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"`protocol` must be one of {', '.join(PROTOCOLS)} or a RecallProtocol, got "
            f"{protocol!r}."
        )
    return PROTOCOLS[protocol]
