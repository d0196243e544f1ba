"""From model outputs to detections and scene graphs, batched, with one copy to the host."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .boxes import box_cxcywh_to_xyxy, box_iou, generalized_box_iou, scale_boxes
from .scene_graph import SceneGraph


# Of the release (`rel_detr_inference.py`): entities linked a role and query; overlap above which
# subject and object are one thing; overlap above which two triplets say the same.
LINKS = 3
SAME_ENTITY_IOU = 0.95
DUPLICATE_IOU = 0.8
# Entities below this score are padding of given ones, not things.
RULED_OUT = 1e-9
# Entities without a relation are part of a graph from this score on.
ENTITY_THRESHOLD = 0.5

TargetSizes = Tensor | Sequence[tuple[int, int]] | None


class LegacyRules(NamedTuple):
    """What the released SGTR does differently; docs/fidelity.md says what each rule changes."""

    box_offset: float = 0.0
    """Added to x2 and y2 before boxes are scaled."""
    open_border: bool = False
    """Do not cut boxes off at the border of the image."""
    self_overlap: bool = False
    """Compare entities by the generalised IoU of corners read as centre and size."""
    duplicate_ranking: bool = False
    """Drop a duplicate only if a kept one has more after another factor of its entity scores."""
    single_predicate: bool = False
    """Take the best predicate of each query alone, as with the softmax head for Open Images."""


class _Entities(NamedTuple):
    """N entities with L classes each: row `rank` * N + `entity` is one with its class of a rank."""

    scores: Tensor
    """(B, L * N)."""
    labels: Tensor
    """(B, L * N)."""
    boxes: Tensor
    """(B, L * N, 4) corners in pixels."""

    def overlap(self, legacy: LegacyRules) -> Tensor:
        """(B, L * N, L * N) how much each entity covers each other."""
        if legacy.self_overlap:
            boxes = box_cxcywh_to_xyxy(self.boxes, legacy.box_offset)
            return generalized_box_iou(boxes[:, :, None], boxes[:, None])
        return box_iou(self.boxes[:, :, None], self.boxes[:, None])


class _Triplets(NamedTuple):
    """M candidates an image, best first."""

    subject: Tensor
    """(B, M) index of an entity."""
    object: Tensor
    """(B, M) index of an entity."""
    predicate: Tensor
    """(B, M)."""
    query: Tensor
    """(B, M) predicate query it came from."""
    score: Tensor
    """(B, M); -1 for those that cannot be."""


def detect_objects(
    probabilities: Tensor,
    pred_boxes: Tensor,
    threshold: float,
    target_sizes: TargetSizes,
    legacy: LegacyRules = LegacyRules(),  # noqa: B008 - immutable
    top_k: int | None = None,
) -> list[dict[str, Tensor]]:
    """Return detections whose score exceeds the threshold, best first.

    Args:
        probabilities: (B, N, C) of the real classes.
        pred_boxes: (B, N, 4) cxcywh relative to the image.
        threshold: Least score, in [0, 1].
        target_sizes: (B, 2) height and width; normalised boxes if None.
        legacy: Rules for boxes of the originals to follow.
        top_k: The likeliest pairs of query and class of an image count, so that a box may have
            several classes, as detectors with a sigmoid head are evaluated (Zhu et al. 2021); each
            query has its best class if None, as in DETR.

    Returns:
        For each image "scores" (E,), "labels" (E,) and "boxes" (E, 4) as x1, y1, x2, y2.

    Raises:
        ValueError: If outputs are not finite, or an argument is out of range.
        TypeError: If an argument is of the wrong type.
    """
    _check_probability("threshold", threshold)
    if top_k is not None:
        _check_count("top_k", top_k)
    sizes = _size_list(target_sizes, len(probabilities))
    entities = _read_entities(probabilities, pred_boxes, sizes, legacy)
    if top_k is None:
        scores, order = entities.scores.sort(dim=-1, descending=True, stable=True)
        labels = entities.labels.gather(1, order)
    else:
        num_classes = probabilities.shape[-1]
        pairs = probabilities.flatten(1)
        scores, order = pairs.topk(min(top_k, pairs.shape[1]), dim=-1)
        labels, order = order % num_classes, order // num_classes
    boxes = entities.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    num_found = (scores > threshold).sum(-1, keepdim=True)
    counts, _ = _to_host(num_found, _find_breaks(probabilities, pred_boxes))
    return [
        {
            "scores": scores[image, :count],
            "labels": labels[image, :count],
            "boxes": boxes[image, :count],
        }
        for image, count in enumerate(counts[:, 0].astype(int).tolist())
    ]


@torch.no_grad()
def find_scene_graphs(  # noqa: PLR0913 - an argument for each choice of the caller
    outputs: Any,
    target_sizes: TargetSizes,
    *,
    threshold: float = 0.0,
    top_k: int = 100,
    graph_constraint: bool = False,
    duplicate_threshold: float = DUPLICATE_IOU,
    labels_per_entity: int = 1,
    names: tuple[Mapping[int, str] | None, Mapping[int, str] | None] = (None, None),
    legacy: LegacyRules = LegacyRules(),  # noqa: B008 - immutable
) -> list[SceneGraph]:
    """Assemble triplets, rank them, drop what says the same twice, and return graphs.

    The score of a triplet is predicate x subject x object probability, as in SGTR (Li et al.
    2022); with unified assembling also times the probabilities that they belong together. A graph
    holds the entities of its relations and all others that are likely, with the detector's scores.

    Args:
        outputs: With `entity_probabilities` (and `triplet_class_probabilities`, where those are
            calibrated for the scores of triplets), `pred_boxes`, `predicate_probabilities`,
            `subject_scores` and `object_scores` of a scene graph model; with
            `subject_log_correspondence` and `object_log_correspondence` of unified assembling, the
            best pairs of each query count, instead of the best entities of both roles rank with
            rank; with `given_entities` (B, N), True for entities of the caller, these are in the
            graph whatever their scores.
        target_sizes: (B, 2) height and width of the pictures; boxes in [0, 1] if None.
        threshold: Least score of a relation, in [0, 1].
        top_k: Most relations a graph.
        graph_constraint: Keep only the best predicate of an ordered pair of entities.
        duplicate_threshold: Overlap of both boxes above which two triplets of the same classes and
            predicate say the same, in [0, 1]; 1 keeps all but those of the very same entities.
        labels_per_entity: An entity may be one node for each of so many of its likeliest classes,
            and the triplets of all compete. 1 gives a thing one name, as a reader wants it; 2 finds
            more of what is annotated, since recall does not mind the second name.
        names: Of classes and of predicates.
        legacy: Rules of the released SGTR to follow.

    Raises:
        ValueError: If outputs are not finite, or an argument is out of range.
        TypeError: If an argument is of the wrong type.
    """
    check_arguments(
        threshold=threshold,
        top_k=top_k,
        graph_constraint=graph_constraint,
        duplicate_threshold=duplicate_threshold,
        labels_per_entity=labels_per_entity,
    )
    probabilities = outputs["entity_probabilities"]
    num_labels = min(labels_per_entity, probabilities.shape[-1])
    sizes = _size_list(target_sizes, len(probabilities))
    detected = _read_entities(probabilities, outputs["pred_boxes"], sizes, legacy, num_labels)
    entities, rated = detected, probabilities
    if outputs.get("triplet_class_probabilities") is not None:
        rated = outputs["triplet_class_probabilities"]
        # Calibration keeps the order of an entity's classes.
        entities = detected._replace(scores=_likeliest(rated, num_labels)[0])
    overlap = entities.overlap(legacy)
    predicates = outputs["predicate_probabilities"]
    roles = (outputs["subject_scores"], outputs["object_scores"])
    if outputs.get("subject_log_correspondence") is not None:
        # Some of the candidates say the same twice.
        triplets = _assemble_unified(entities, overlap, predicates, roles, 4 * top_k)
    else:
        candidates = _choose_predicates(predicates, legacy)
        triplets = _assemble_by_rank(entities, overlap, candidates, roles)
    same_label = entities.labels[:, :, None] == entities.labels[:, None]
    is_alike = (overlap > duplicate_threshold) & same_label
    kept = _keep_first_of_duplicates(entities, is_alike, triplets, legacy)
    if graph_constraint:
        kept &= ~_is_any((_same_pair(entities, triplets) & kept[:, None]).tril(-1))
    kept &= triplets.score >= max(threshold, 0.0)
    # What stays comes first, still best first.
    order = (~kept).long().argsort(dim=-1, stable=True)[:, :top_k]
    chosen = _Triplets(*(field.gather(1, order) for field in triplets))
    image = torch.arange(len(order), device=order.device)[:, None]
    *arrays, _ = _to_host(
        *detected,
        _are_sure(detected, outputs.get("given_entities")),
        *chosen[:3],
        chosen.score,
        kept.gather(1, order),
        predicates[image, chosen.query],
        _find_breaks(rated, outputs["pred_boxes"], predicates),
    )
    return [
        _build_graph([array[image] for array in arrays], size, names)
        for image, size in enumerate(sizes or [(1, 1)] * len(probabilities))
    ]


def check_arguments(
    *,
    threshold: Any = 0.0,
    top_k: Any = 100,
    graph_constraint: Any = False,
    duplicate_threshold: Any = DUPLICATE_IOU,
    labels_per_entity: Any = 1,
) -> None:
    """Check arguments of `find_scene_graphs`, also for callers who do so before a model runs.

    Raises:
        ValueError: If one is out of range.
        TypeError: If one is of the wrong type.
    """
    _check_probability("threshold", threshold)
    _check_probability("duplicate_threshold", duplicate_threshold)
    _check_count("top_k", top_k)
    _check_count("labels_per_entity", labels_per_entity)
    if not isinstance(graph_constraint, (bool, np.bool_)):
        raise TypeError(f"`graph_constraint` must be True or False, got {graph_constraint!r}.")


def _read_entities(
    probabilities: Tensor,
    pred_boxes: Tensor,
    sizes: list[tuple[int, int]] | None,
    legacy: LegacyRules,
    num_labels: int = 1,
) -> _Entities:
    scores, labels = _likeliest(probabilities, num_labels)
    boxes = box_cxcywh_to_xyxy(pred_boxes.float(), legacy.box_offset)
    if not legacy.open_border:
        boxes = boxes.clamp(0, 1)
    if sizes is not None:
        boxes = scale_boxes(boxes, torch.as_tensor(np.asarray(sizes), device=boxes.device))
    return _Entities(scores, labels, boxes.repeat(1, num_labels, 1))


def _likeliest(probabilities: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """Scores and labels (B, L * N) of the L likeliest classes of each entity (B, N, C)."""
    if num_labels == 1:
        scores, labels = probabilities.float().max(dim=-1)
        return scores, labels
    scores, labels = probabilities.float().topk(num_labels)
    return scores.transpose(1, 2).flatten(1), labels.transpose(1, 2).flatten(1)


def _choose_predicates(predicates: Tensor, legacy: LegacyRules) -> tuple[Tensor, Tensor, Tensor]:
    """Return score, query and predicate, each (B, Q), of the likeliest candidates."""
    _, num_queries, num_predicates = predicates.shape
    if legacy.single_predicate:
        scores, best = predicates.float().max(dim=-1)
        return scores, torch.arange(num_queries, device=best.device).expand_as(best), best
    scores, cells = predicates.float().flatten(1).topk(num_queries)
    return scores, cells // num_predicates, cells % num_predicates


def _assemble_by_rank(
    entities: _Entities,
    overlap: Tensor,
    candidates: tuple[Tensor, Tensor, Tensor],
    assembling_scores: tuple[Tensor, Tensor],
) -> _Triplets:
    """Link the candidates to their best entities, rank with rank, best first."""
    num_entities = assembling_scores[0].shape[-1]
    links = min(LINKS, num_entities)
    linked = []
    for scores in assembling_scores:
        best = scores.topk(links, dim=-1).indices
        linked.append(best.gather(1, candidates[1][..., None].expand(-1, -1, links)).flatten(1))
    subject, object_ = _with_labels(entities, num_entities, linked[0], linked[1])
    repeats = subject.shape[1] // candidates[0].shape[1]
    score, query, predicate = (field.repeat_interleave(repeats, dim=1) for field in candidates)
    score = score * entities.scores.gather(1, subject) * entities.scores.gather(1, object_)
    score = torch.where(_is_impossible(entities, overlap, subject, object_), -1.0, score)
    score, order = score.sort(dim=-1, descending=True, stable=True)
    subject, object_, predicate, query = (
        field.gather(1, order) for field in (subject, object_, predicate, query)
    )
    return _Triplets(subject, object_, predicate, query, score)


def _assemble_unified(
    entities: _Entities,
    overlap: Tensor,
    predicates: Tensor,
    correspondence: tuple[Tensor, Tensor],
    count: int,
) -> _Triplets:
    """Make the best `count` triplets of all predicates with the best pairs of their query."""
    num_entities, num_predicates = correspondence[0].shape[-1], predicates.shape[2]
    num_links = min(LINKS, num_entities)
    (subject_links, subjects), (object_links, objects) = (
        role.float().topk(num_links) for role in correspondence
    )
    # (B, Q, K, K) -> (B, Q, K * K), of which the best K pairs of two entities stay.
    products = subject_links[..., :, None] * object_links[..., None, :]
    products = products.masked_fill(subjects[..., :, None] == objects[..., None, :], 0)
    links, cells = products.flatten(-2).topk(num_links)
    subject = subjects.gather(-1, cells // num_links).flatten(1)
    object_ = objects.gather(-1, cells % num_links).flatten(1)
    subject, object_ = _with_labels(entities, num_entities, subject, object_)
    factor = links.flatten(1).repeat_interleave(subject.shape[1] // links[0].numel(), dim=1)
    is_impossible = _is_impossible(entities, overlap, subject, object_) | (factor == 0)
    factor = factor * entities.scores.gather(1, subject) * entities.scores.gather(1, object_)
    # (B, M, P) -> (B, M * P), where each query has as many of the M.
    pairs_per_query = subject.shape[1] // predicates.shape[1]
    scores = factor[..., None] * predicates.float().repeat_interleave(pairs_per_query, dim=1)
    scores = scores.masked_fill(is_impossible[..., None], -1).flatten(1)
    score, best = scores.topk(min(count, scores.shape[1]))
    link = best // num_predicates
    return _Triplets(
        subject.gather(1, link),
        object_.gather(1, link),
        best % num_predicates,
        link // pairs_per_query,
        score,
    )


def _with_labels(
    entities: _Entities, num_entities: int, subject: Tensor, object_: Tensor
) -> tuple[Tensor, Tensor]:
    """Make of pairs of entities (B, M) those of all their classes: (B, M * L * L)."""
    ranks = torch.arange(entities.scores.shape[1] // num_entities, device=subject.device)
    if len(ranks) == 1:
        return subject, object_
    first, second = (num_entities * torch.cartesian_prod(ranks, ranks)).unbind(-1)
    return (subject[..., None] + first).flatten(1), (object_[..., None] + second).flatten(1)


def _is_impossible(
    entities: _Entities, overlap: Tensor, subject: Tensor, object_: Tensor
) -> Tensor:
    """(B, M), True where subject and object are one thing, or one of them is not there."""
    image = torch.arange(len(overlap), device=overlap.device)[:, None]
    least = torch.minimum(entities.scores.gather(1, subject), entities.scores.gather(1, object_))
    is_one_thing = (subject == object_) | (overlap[image, subject, object_] >= SAME_ENTITY_IOU)
    return is_one_thing | (least < RULED_OUT)


def _are_equal(field: Tensor) -> Tensor:
    """(B, M, M), True where two entries of (B, M) are equal."""
    return field[:, :, None] == field[:, None]


def _same_pair(entities: _Entities, triplets: _Triplets) -> Tensor:
    """(B, M, M), True where two triplets have the same subject and the same object."""
    return _are_equal(triplets.subject * entities.scores.shape[1] + triplets.object)


def _is_any(selected: Tensor) -> Tensor:
    """Whether one is True along the last dimension; `Tensor.any` is ten times slower on bools."""
    return selected.view(torch.uint8).amax(-1) > 0


def _between_triplets(table: Tensor, entities: Tensor) -> Tensor:
    """Read a symmetric table (B, N, N) at the entities (B, M) of triplets: (B, M, M)."""
    image = torch.arange(len(table), device=table.device)[:, None]
    # Whole rows twice, which is much faster than single entries.
    rows = table[image, entities].transpose(1, 2).contiguous()
    return rows[image, entities]


def _keep_first_of_duplicates(
    entities: _Entities, is_alike: Tensor, triplets: _Triplets, legacy: LegacyRules
) -> Tensor:
    """(B, M), False where a kept triplet before it says the same.

    Two say the same if the predicate is the same and either both entities are, or both are alike
    (B, N, N): their classes are the same and their boxes nearly. Deciding one after the other
    depends on the decisions before; all are decided at once instead, again and again until nothing
    changes, which gives the same.
    """
    possible = triplets.score >= 0
    is_clash = _between_triplets(is_alike, triplets.subject)
    is_clash &= _between_triplets(is_alike, triplets.object)
    is_clash |= _same_pair(entities, triplets)
    is_clash &= _are_equal(triplets.predicate)
    if legacy.duplicate_ranking:
        rank = triplets.score * entities.scores.gather(1, triplets.subject)
        rank = rank * entities.scores.gather(1, triplets.object)
        is_clash &= rank[:, None] > rank[:, :, None]
    # With those before alone, which are better.
    is_clash = is_clash.tril(-1)
    kept = possible
    for _ in range(kept.shape[1]):
        decided = possible & ~_is_any(is_clash & kept[:, None])
        if torch.equal(decided, kept):
            break
        kept = decided
    return kept


def _are_sure(entities: _Entities, given: Tensor | None) -> Tensor:
    """(B, L * N), True for entities that are in the graph without a relation too."""
    is_sure = entities.scores >= ENTITY_THRESHOLD
    if given is not None:
        # With their likeliest class.
        is_sure[:, : given.shape[1]] |= given.to(is_sure)
    return is_sure


def _find_breaks(*outputs: Tensor) -> Tensor:
    """(B, F), 0 for an output (B, ...) that is finite and NaN for others."""
    return torch.stack([(output.float() * 0).flatten(1).sum(1) for output in outputs], dim=1)


def _to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Copy (B, ...) tensors at once; float32 holds every index exactly."""
    joined = torch.cat([tensor.float().flatten(1) for tensor in tensors], dim=1)
    flat = joined.detach().cpu().numpy()
    if not np.isfinite(flat).all():
        raise ValueError(
            "The model's outputs hold NaN or infinity; its weights are broken (a diverged "
            "training, or a damaged file) or the picture held NaN."
        )
    ends = np.cumsum([tensor.shape[1:].numel() for tensor in tensors])
    parts = np.split(flat, ends[:-1], axis=1)
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _build_graph(
    arrays: list[np.ndarray],
    size: tuple[int, int],
    names: tuple[Mapping[int, str] | None, Mapping[int, str] | None],
) -> SceneGraph:
    """Number the entities of a graph by score, and its relations accordingly."""
    scores, labels, boxes, sure, *triplets, triplet_scores, kept, distributions = arrays
    rows = np.flatnonzero(kept)
    relations = np.stack(triplets, axis=1)[rows].astype(np.int64)
    used = np.union1d(relations[:, :2], np.flatnonzero(sure)).astype(np.int64)
    used = used[np.argsort(-scores[used], kind="stable")]
    position = np.zeros(len(scores), dtype=np.int64)
    position[used] = np.arange(len(used))
    relations[:, :2] = position[relations[:, :2]]
    return SceneGraph(
        boxes_xyxy=boxes[used],
        labels=labels[used].astype(np.int64),
        scores=scores[used],
        relations=relations,
        relation_scores=triplet_scores[rows],
        image_size=size,
        id2label=names[0],
        id2predicate=names[1],
        predicate_distributions=distributions[rows],
    )


def _size_list(target_sizes: TargetSizes, num_images: int) -> list[tuple[int, int]] | None:
    """Check sizes, and copy them to the host at once."""
    if target_sizes is None:
        return None
    rows = target_sizes.tolist() if isinstance(target_sizes, Tensor) else target_sizes
    try:
        sizes = np.asarray([[float(side) for side in row] for row in rows])
    except (TypeError, ValueError):
        sizes = np.empty(0)
    if sizes.shape != (num_images, 2) or not ((sizes >= 1) & (sizes < np.inf)).all():
        raise ValueError(
            "`target_sizes` must be one height and width an image, in pixels and at least 1, for "
            f"{num_images} images, got {rows!r:.200}."
        )
    return [(int(height), int(width)) for height, width in sizes]


def _check_probability(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    if not is_number or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number between 0 and 1, got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be between 0 and 1, got {value}.")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a whole number from 1, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
