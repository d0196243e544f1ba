"""The one record of an annotated image, as `datasets` features."""

from collections.abc import Sequence
from typing import Any, TypedDict

import datasets


class ObjectRecord(TypedDict):
    """One entity."""

    id: int
    bbox: list[float]
    """x1, y1, x2, y2 in pixels of the image."""
    label: int


class RelationRecord(TypedDict):
    """One relation; subject and object index the record's objects."""

    subject: int
    object: int
    predicate: int


def scene_graph_features(
    entity_names: Sequence[str],
    predicate_names: Sequence[str],
    attribute_names: Sequence[str] = (),
    *,
    masks: bool = False,
) -> datasets.Features:
    """Describe the record with its vocabularies.

    Args:
        entity_names: Classes of entities, from 0, without background.
        predicate_names: Predicates, from 0, without background.
        attribute_names: Attributes, from 0; without any, entities have no such field.
        masks: Whether entities have a mask, an image of the whole picture's size.
    """
    entity: dict[str, Any] = {
        "id": datasets.Value("int64"),
        "bbox": datasets.List(datasets.Value("float32"), length=4),
        "label": datasets.ClassLabel(names=list(entity_names)),
    }
    if attribute_names:
        entity["attributes"] = datasets.List(datasets.ClassLabel(names=list(attribute_names)))
    if masks:
        entity["mask"] = datasets.Image()
    relation = {
        "subject": datasets.Value("int32"),
        "object": datasets.Value("int32"),
        "predicate": datasets.ClassLabel(names=list(predicate_names)),
    }
    return datasets.Features(
        {
            "image": datasets.Image(),
            "image_id": datasets.Value("string"),
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
            "objects": datasets.List(entity),
            "relations": datasets.List(relation),
        }
    )


def vocabularies(features: datasets.Features) -> tuple[dict[int, str], dict[int, str]]:
    """Read the names of entity classes and predicates, from 0, off the features of a data set.

    Raises:
        ValueError: If the features are not those of `scene_graph_features`.
    """
    names = []
    for column, field in (("objects", "label"), ("relations", "predicate")):
        feature: Any = features.get(column)
        entries = getattr(feature, "feature", None)
        label = entries.get(field) if isinstance(entries, dict) else None
        if not isinstance(label, datasets.ClassLabel):
            raise ValueError(
                f"`{column}.{field}` must be a ClassLabel, got {feature!r}; write the data with "
                "`sgtr_hf.data.schema.scene_graph_features`."
            )
        names.append(dict(enumerate(label.names)))
    return names[0], names[1]
