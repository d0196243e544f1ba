"""Scene graph metrics in the slowest, most obvious way: loops over everything."""

import numpy as np

from sgtr_hf.scene_graph import SceneGraph


def slow_iou(first, second, kind="exact"):
    between = 1 if kind in ("pixels", "inflated") else 0
    around = 1 if kind == "pixels" else 0
    width = min(first[2], second[2]) - max(first[0], second[0]) + between
    height = min(first[3], second[3]) - max(first[1], second[1]) + between
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + around) * (box[3] - box[1] + around) for box in (first, second)]
    union = areas[0] + areas[1] - shared
    return shared / union if union > 0 else 0.0


def slow_constrained_list(graph, protocol):
    """Rows (subject, object, predicate) in the order and number that a protocol lets count."""
    order = list(range(graph.num_relations))
    if protocol.rank_by_score:
        order.sort(key=lambda row: -float(graph.relation_scores[row]))
    rows, pairs = [], set()
    for row in order:
        subject, object_, predicate = graph.relations[row].tolist()
        if protocol.graph_constraint == "row" and graph.predicate_distributions is not None:
            predicate = int(np.argmax(graph.predicate_distributions[row]))
        if protocol.graph_constraint == "pair" and (subject, object_) in pairs:
            continue
        pairs.add((subject, object_))
        rows.append((subject, object_, predicate))
    return rows


def slow_free_list(graph, protocol, places):
    """Rows without graph constraint, from probabilities if there are any."""
    entries = []
    if graph.predicate_distributions is None:
        order = list(range(graph.num_relations))
        if protocol.rank_by_score:
            order.sort(key=lambda row: -float(graph.relation_scores[row]))
        entries = [tuple(graph.relations[row].tolist()) for row in order]
    else:
        scored = []
        for row, (subject, object_, _) in enumerate(graph.relations.tolist()):
            ends = float(graph.scores[subject]) * float(graph.scores[object_])
            for predicate, probability in enumerate(graph.predicate_distributions[row].tolist()):
                scored.append((ends * probability, (subject, object_, predicate)))
        scored.sort(key=lambda entry: -entry[0])
        entries = [entry for _, entry in scored]
    if protocol.drop_repeats:
        entries = list(dict.fromkeys(entries))
    return entries[:places]


def slow_ranks(rows, prediction, reference, protocol, *, any_predicate=False):
    """The first row that hits each annotated triplet; -1 without any."""
    ranks = []
    for subject, object_, predicate in reference.relations.tolist():
        found = -1
        for rank, (subject2, object2, predicate2) in enumerate(rows):
            if (predicate == predicate2 or any_predicate) and all(
                slow_is_alike(prediction, one, reference, two, protocol)
                for one, two in ((subject2, subject), (object2, object_))
            ):
                found = rank
                break
        ranks.append(found)
    return ranks


def slow_is_alike(prediction, one, reference, two, protocol):
    if prediction.labels[one] != reference.labels[two]:
        return False
    if protocol.overlap == "masks":
        first, second = prediction.masks[one], reference.masks[two]
        union = int((first | second).sum())
        return union > 0 and int((first & second).sum()) / union >= protocol.iou_threshold
    boxes = prediction.boxes_xyxy[one].tolist(), reference.boxes_xyxy[two].tolist()
    return slow_iou(*boxes, protocol.overlap) >= protocol.iou_threshold


def slow_recalls(ranks_of_images, references, predictions, k, protocol, num_predicates):
    """R, mR, micro R, and the recall of each annotated predicate."""
    shares, by_predicate, num_found, num_annotated = [], {}, 0, 0
    for ranks, reference, prediction in zip(ranks_of_images, references, predictions, strict=True):
        if not reference.num_relations:
            continue
        if protocol.skip_images_without_predictions and not prediction.num_relations:
            continue
        hits = [0 <= rank < k for rank in ranks]
        shares.append(sum(hits) / len(hits))
        num_found, num_annotated = num_found + sum(hits), num_annotated + len(hits)
        predicates = reference.relations[:, 2].tolist()
        for predicate in set(predicates):
            own = [hit for hit, other in zip(hits, predicates, strict=True) if other == predicate]
            by_predicate.setdefault(predicate, []).append(sum(own) / len(own))
    means = {predicate: sum(values) / len(values) for predicate, values in by_predicate.items()}
    count = num_predicates if protocol.average_all_predicates else len(means)
    return {
        "R": sum(shares) / len(shares),
        "mR": sum(means.values()) / count,
        "micro_R": num_found / num_annotated,
        "by_predicate": means,
    }


def random_reference(generator, num_entities, num_relations, num_labels, num_predicates):
    corners = generator.integers(0, 60, (num_entities, 2))
    sizes = generator.integers(4, 40, (num_entities, 2))
    relations = [
        (*generator.choice(num_entities, 2, replace=False), generator.integers(num_predicates))
        for _ in range(num_relations)
    ]
    return SceneGraph(
        boxes_xyxy=np.concatenate((corners, corners + sizes), axis=1),
        labels=generator.integers(0, num_labels, num_entities),
        scores=np.ones(num_entities),
        relations=np.array(relations, dtype=np.int64).reshape(-1, 3),
        relation_scores=np.ones(num_relations),
        image_size=(100, 100),
    )


def random_prediction(generator, reference, num_relations, num_predicates, *, distributions):
    """Entities near the annotated ones, rows that repeat pairs, and scores with ties."""
    boxes = np.concatenate([reference.boxes_xyxy] * 2).astype(np.float64)
    boxes[:, :2] += generator.integers(-3, 4, (len(boxes), 2))
    boxes[:, 2:] = np.maximum(boxes[:, :2] + 1, boxes[:, 2:])
    labels = np.concatenate([reference.labels] * 2)
    labels[generator.random(len(labels)) < 0.15] = 0
    relations = np.zeros((num_relations, 3), dtype=np.int64)
    for row in relations:
        if reference.num_relations and generator.random() < 0.6:
            row[:] = reference.relations[generator.integers(reference.num_relations)]
            row[:2] += len(reference.labels) * generator.integers(0, 2, 2)
        else:
            row[:2] = generator.choice(len(labels), 2, replace=False)
        if generator.random() < 0.5:
            row[2] = generator.integers(num_predicates)
    shape = (num_relations, num_predicates)
    return SceneGraph(
        boxes_xyxy=boxes,
        labels=labels,
        # Eighths: products are exact, so that ties are ties in any order of multiplication.
        scores=generator.integers(1, 9, len(labels)) / 8,
        relations=relations,
        relation_scores=generator.integers(0, 9, num_relations) / 8,
        image_size=(100, 100),
        predicate_distributions=generator.integers(0, 9, shape) / 8 if distributions else None,
    )


def random_images(seed, *, distributions, num_images=12):
    """Images of all kinds, among them some without annotation and some without prediction."""
    generator = np.random.default_rng(seed)
    num_labels, num_predicates = (int(number) for number in generator.integers(2, 5, 2))
    predictions, references = [], []
    for _ in range(num_images):
        num_entities = int(generator.integers(2, 7))
        num_annotated = int(generator.integers(0, 8))
        reference = random_reference(
            generator, num_entities, num_annotated, num_labels, num_predicates
        )
        count = int(generator.integers(0, 25)) * int(generator.random() < 0.85)
        predictions.append(
            random_prediction(
                generator, reference, count, num_predicates, distributions=distributions
            )
        )
        references.append(reference)
    return predictions, references, num_predicates
