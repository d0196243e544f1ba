"""Builds what a recipe describes: data, image processor and model."""

import dataclasses
import typing
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..command_arguments import model_folder
from ..configuration.configuration_sgtr import SgtrConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from ..data.dataset_loading import load_image_stream, load_rows
from ..data.resampling import ResamplingSettings
from ..data.streaming_dataset import SceneGraphStream
from ..data.training_augmentation import Augmentation, make_swaps
from ..data.training_dataset import SceneGraphDataset
from ..image_processing.image_processing_sgtr import SgtrImageProcessor
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection
from .backbone_weights import load_backbone_weights, load_efficientnet_lite0_weights
from .recipe import DataSettings, Recipe


Config = typing.TypeVar("Config", bound=PreTrainedConfig)


class Splits(NamedTuple):
    """Images to train on and to evaluate on."""

    train: SceneGraphDataset | SceneGraphStream
    validation: SceneGraphDataset


def make_splits(settings: DataSettings, seed: int) -> Splits:
    """Open both splits and check their annotations; training images are augmented.

    Raises:
        ValueError: If a split is missing, an annotation cannot be meant, or the splits have
            different classes or predicates.
    """
    if settings.augmentation_seed is not None:
        seed = settings.augmentation_seed
    train = _training_images(settings, seed)
    train.on_error = settings.on_error
    validation = SceneGraphDataset(load_rows(settings.path, "validation"))
    for name in ("id2label", "id2predicate"):
        if getattr(train, name) != getattr(validation, name):
            raise ValueError(
                f"The splits of `data.path` {settings.path} must share their vocabularies; the "
                f"`{name}` of train and validation differ."
            )
    train.check()
    validation.check()
    train.augmentation = _augmentation(settings, train.id2predicate)
    if isinstance(train, SceneGraphDataset) and settings.repeat_threshold:
        resampling = ResamplingSettings(settings.repeat_threshold, settings.relation_drop_rate)
        train = SceneGraphDataset(
            train.split, train.augmentation, seed, resampling, settings.on_error
        )
    return Splits(train, validation)


def _training_images(settings: DataSettings, seed: int) -> SceneGraphDataset | SceneGraphStream:
    if settings.streaming:
        return load_image_stream(
            settings.path, "train", seed=seed, shuffle_buffer=settings.shuffle_buffer
        )
    return SceneGraphDataset(load_rows(settings.path, "train"), seed=seed)


def _augmentation(settings: DataSettings, id2predicate: dict[int, str]) -> Augmentation:
    # An empty list says that none change places; null, that they are to be found.
    swaps = settings.flip_swaps
    return Augmentation(
        flip_probability=settings.flip_probability,
        flip_swaps=None if swaps is None else make_swaps(swaps, id2predicate),
        brightness=settings.brightness,
        least_crop=settings.least_crop,
        crop_probability=settings.crop_probability,
        saturation=settings.saturation,
        hue=settings.hue,
        resize_sides=tuple(settings.resize_sides),
        resize_longest_side=settings.resize_longest_side,
    ).for_predicates(id2predicate)


def make_image_processor(recipe: Recipe) -> SgtrImageProcessor:
    """The recipe's image processor, which is saved beside the model.

    Raises:
        ValueError: If it has no such setting.
    """
    pretrained = recipe.pretrained_model or recipe.detector
    if not recipe.image_processor and pretrained is not None:
        return SgtrImageProcessor.from_pretrained(pretrained)
    known = typing.get_type_hints(SgtrImageProcessor.valid_kwargs)
    check_names("image_processor", recipe.image_processor, known)
    return SgtrImageProcessor(**recipe.image_processor)


def with_predicate_frequencies(
    recipe: Recipe, data: SceneGraphDataset | SceneGraphStream
) -> Recipe:
    """Count the predicates of the training split where the long tail asks for it."""
    if not any(recipe.model.get(name) for name in ("logit_adjustment", "predicate_reweighting")):
        return recipe
    predicates = np.concatenate([graph.relations[:, 2] for graph in data.references()])
    counts = np.bincount(predicates, minlength=len(data.id2predicate)).tolist()
    return dataclasses.replace(recipe, model={**recipe.model, "predicate_frequencies": counts})


def make_model(
    recipe: Recipe,
    id2label: dict[int, str],
    id2predicate: dict[int, str],
    scene_graph_class: type[SgtrForSceneGraphGeneration] = SgtrForSceneGraphGeneration,
) -> PreTrainedModel:
    """Build the recipe's model with the class names of the data.

    Args:
        recipe: Of the run.
        id2label: Names of classes.
        id2predicate: Names of predicates; of no use to a detector.
        scene_graph_class: Class of a scene graph model; another one of the same configuration can
            be trained with the same care, to compare with.

    Raises:
        ValueError: If a folder is no checkpoint, the detector has other classes, or a field of the
            model is wrong.
    """
    for entry in ("pretrained_model", "detector"):
        source = getattr(recipe, entry)
        if source is not None:
            model_folder(source, entry)
    if recipe.pretrained_model is not None:
        return _load_pretrained_model(
            recipe, recipe.pretrained_model, id2label, id2predicate, scene_graph_class
        )
    if recipe.task == "detection":
        config = _make_detector_config("model", recipe.model, id2label)
        detector = SgtrDetrForObjectDetection(config)
        _load_backbone_weights(recipe, detector)
        return detector
    if recipe.detector is None:
        fields = recipe.model.get("detector_config") or {}
        detector_config = _make_detector_config("model.detector_config", fields, id2label)
        model = scene_graph_class(_make_scene_graph_config(recipe, detector_config, id2predicate))
        _load_backbone_weights(recipe, model.model.detector)
        return model
    # Weights are trained in float32, whatever they were stored in.
    pretrained = SgtrDetrForObjectDetection.from_pretrained(recipe.detector, dtype=torch.float32)
    if pretrained.config.id2label != id2label:
        raise ValueError(
            f"`detector` {recipe.detector} knows the classes {pretrained.config.id2label}, the "
            f"data has {id2label}; train a detector on this data first."
        )
    model = scene_graph_class(_make_scene_graph_config(recipe, pretrained.config, id2predicate))
    model.model.detector.load_state_dict(pretrained.state_dict())
    return model


def _load_pretrained_model(
    recipe: Recipe,
    source: str,
    id2label: dict[int, str],
    id2predicate: dict[int, str],
    scene_graph_class: type[SgtrForSceneGraphGeneration],
) -> PreTrainedModel:
    """Load a trained model with the recipe's changes and the class names of the data."""
    kind: type[PreTrainedModel]
    if recipe.task == "detection":
        kind, given = SgtrDetrForObjectDetection, {"id2label": id2label}
    else:
        kind, given = scene_graph_class, {"id2label": id2label, "id2predicate": id2predicate}
    check_fields("model", recipe.model, kind.config_class, given=tuple(given))
    trained = kind.config_class.from_pretrained(source)
    changes = _resolve_backbone("model", recipe.model)
    if "detector_config" in changes:
        section = "model.detector_config"
        check_fields(section, changes["detector_config"], SgtrDetrConfig, given=("id2label",))
        detector = _resolve_backbone(section, changes["detector_config"])
        # What it does not name stays as it was trained.
        changes = changes | {"detector_config": trained.detector_config.to_dict() | detector}
    fields = trained.to_dict() | changes | given
    if getattr(trained, "id2predicate", id2predicate) != id2predicate:
        # Those of the data, if any: the trained model's are of other predicates.
        fields["predicate_frequencies"] = recipe.model.get("predicate_frequencies")
    config = make_config(kind.config_class, fields)
    model, report = kind.from_pretrained(
        source,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_mismatches(source, report["mismatched_keys"], (trained, config))
    return model


def _check_mismatches(
    source: str,
    mismatched: Collection[tuple[str, Any, Any]],
    configs: tuple[PreTrainedConfig, PreTrainedConfig],
) -> None:
    """Let only what depends on the number of classes or predicates begin anew.

    Args:
        source: What was loaded.
        mismatched: Name, shape in the file and shape in the model.
        configs: Of the file and of the model.
    """
    allowed = set()
    for names in ("id2label", "id2predicate"):
        found, wanted = (len(getattr(config, names, ())) for config in configs)
        # Softmax heads have one column more, for background.
        allowed |= {(found, wanted), (found + 1, wanted + 1)}
    for name, found_shape, wanted_shape in mismatched:
        sides = zip(found_shape, wanted_shape, strict=True)
        if not all(pair in allowed for pair in sides if pair[0] != pair[1]):
            raise ValueError(
                f"`pretrained_model` {source} has `{name}` of shape {tuple(found_shape)}, the "
                f"recipe's `model` {tuple(wanted_shape)}; leave out the entry that changes it."
            )


def _make_scene_graph_config(
    recipe: Recipe, detector_config: SgtrDetrConfig, id2predicate: dict[int, str]
) -> SgtrConfig:
    fields = {name: value for name, value in recipe.model.items() if name != "detector_config"}
    check_fields("model", fields, SgtrConfig, given=("id2label", "id2predicate"))
    fields |= {"detector_config": detector_config, "id2predicate": id2predicate}
    return make_config(SgtrConfig, fields)


def _make_detector_config(
    section: str, fields: dict[str, Any], id2label: dict[int, str]
) -> SgtrDetrConfig:
    check_fields(section, fields, SgtrDetrConfig, given=("id2label",))
    return make_config(SgtrDetrConfig, {**_resolve_backbone(section, fields), "id2label": id2label})


def make_config(kind: type[Config], fields: dict[str, Any]) -> Config:
    """Build a configuration; what it rejects is a `ValueError`."""
    try:
        return kind(**fields)
    except StrictDataclassError as error:
        # Not a ValueError, though it says the same.
        raise ValueError(f"`model` of the recipe: {error.__cause__ or error}") from error


def check_fields(
    section: str, fields: dict[str, Any], config: type[PreTrainedConfig], given: tuple[str, ...]
) -> None:
    """Reject what a configuration would keep without a word, and without an effect."""
    for name in given:
        if name in fields:
            raise ValueError(f"`{section}.{name}` comes from the data; remove it.")
    own = {field.name for field in dataclasses.fields(config)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    check_names(section, fields, own - inherited)


def check_names(section: str, entries: Collection[str], known: Collection[str]) -> None:
    """Reject entries that a section does not know."""
    unknown = sorted(set(entries) - set(known))
    if unknown:
        raise ValueError(
            f"The recipe has no entry `{section}.{unknown[0]}`; known are "
            f"{', '.join(sorted(known))}."
        )


def _resolve_backbone(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Make the configuration object of a backbone given as a mapping."""
    backbone = fields.get("backbone_config")
    if not isinstance(backbone, dict):
        return fields
    entries = dict(backbone)
    model_type = entries.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            f"`{section}.backbone_config` must name its `model_type`, as in timm_backbone or "
            "resnet."
        )
    resolved = AutoConfig.for_model(model_type, **entries)
    own = getattr(resolved, "__dataclass_fields__", {})
    # What timm takes depends on the model.
    if own and model_type != "timm_backbone":
        known = {*own, *resolved.attribute_map, "out_features", "out_indices"}
        check_names(f"{section}.backbone_config", entries, known)
    return fields | {"backbone_config": resolved}


def _load_backbone_weights(recipe: Recipe, detector: SgtrDetrForObjectDetection) -> None:
    if recipe.backbone_weights == "efficientnet_lite0":
        load_efficientnet_lite0_weights(detector.model.backbone)
    elif recipe.backbone_weights is not None:
        load_backbone_weights(detector.model.backbone, recipe.backbone_weights)
