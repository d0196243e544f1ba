"""Builds what a recipe describes: data, image processor and model."""

from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedModel

from ..configuration.configuration_sgtr import SgtrConfig
from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from ..data.training_dataset import Augmentation, SceneGraphDataset, load_split, make_swaps
from ..image_processing.image_processing_sgtr import SgtrImageProcessor
from ..modeling.modeling_sgtr import SgtrForSceneGraphGeneration
from ..modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection
from .backbone_weights import load_efficientnet_lite0_weights
from .recipe import DataSettings, Recipe


class Splits(NamedTuple):
    """Images to train on and to evaluate on."""

    train: SceneGraphDataset
    validation: SceneGraphDataset


def make_splits(settings: DataSettings, seed: int) -> Splits:
    """Load both splits; training images are augmented."""
    train = SceneGraphDataset(load_split(settings.path, "train"))
    augmentation = Augmentation(
        settings.flip_probability,
        make_swaps(settings.flip_swaps, train.id2predicate),
        settings.brightness,
    )
    return Splits(
        SceneGraphDataset(train.split, augmentation, seed),
        SceneGraphDataset(load_split(settings.path, "validation")),
    )


def make_image_processor(recipe: Recipe) -> SgtrImageProcessor:
    """The recipe's image processor, which is saved beside the model."""
    return SgtrImageProcessor(**recipe.image_processor)


def make_model(
    recipe: Recipe, id2label: dict[int, str], id2predicate: dict[int, str]
) -> PreTrainedModel:
    """Build the recipe's model with the class names of the data.

    Raises:
        ValueError: If the detector has other classes, or a field of the model is wrong.
    """
    if recipe.task == "detection":
        config = SgtrDetrConfig(id2label=id2label, **_resolve_backbone(recipe.model))
        detector = SgtrDetrForObjectDetection(config)
        _load_backbone_weights(recipe, detector)
        return detector
    if recipe.detector is None:
        detector_fields = dict(recipe.model.get("detector_config") or {})
        detector_config = SgtrDetrConfig(id2label=id2label, **_resolve_backbone(detector_fields))
        model = _make_scene_graph_model(recipe, detector_config, id2predicate)
        _load_backbone_weights(recipe, model.model.detector)
        return model
    pretrained = SgtrDetrForObjectDetection.from_pretrained(recipe.detector)
    if dict(pretrained.config.id2label) != id2label:
        raise ValueError(
            f"`detector` {recipe.detector} knows the classes {pretrained.config.id2label}, the "
            f"data has {id2label}; train a detector on this data first."
        )
    model = _make_scene_graph_model(recipe, pretrained.config, id2predicate)
    model.model.detector.load_state_dict(pretrained.state_dict())
    return model


def _make_scene_graph_model(
    recipe: Recipe, detector_config: SgtrDetrConfig, id2predicate: dict[int, str]
) -> SgtrForSceneGraphGeneration:
    fields = {name: value for name, value in recipe.model.items() if name != "detector_config"}
    config = SgtrConfig(detector_config=detector_config, id2predicate=id2predicate, **fields)
    return SgtrForSceneGraphGeneration(config)


def _resolve_backbone(fields: dict[str, Any]) -> dict[str, Any]:
    """Make the configuration object of a backbone given as a mapping."""
    backbone = fields.get("backbone_config")
    if not isinstance(backbone, dict):
        return fields
    entries = dict(backbone)
    model_type = entries.pop("model_type", None)
    if model_type is None:
        raise ValueError(
            "`model.backbone_config` must name its `model_type`, as in timm_backbone or resnet."
        )
    return fields | {"backbone_config": AutoConfig.for_model(model_type, **entries)}


def _load_backbone_weights(recipe: Recipe, detector: SgtrDetrForObjectDetection) -> None:
    if recipe.backbone_weights == "efficientnet_lite0":
        load_efficientnet_lite0_weights(detector.model.backbone)
