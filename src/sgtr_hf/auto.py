"""Makes the package known to the Auto classes and to `pipeline` of transformers."""

from collections import OrderedDict
from importlib import resources
from typing import Any

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils.import_utils import is_torchvision_available

from .configuration.configuration_dino_vit import DinoVitConfig
from .configuration.configuration_sgtr import SgtrConfig
from .configuration.configuration_sgtr_detr import SgtrDetrConfig
from .image_processing.image_processing_dino_vit import DinoVitImageProcessorPil
from .image_processing.image_processing_sgtr import SgtrImageProcessorPil
from .modeling.modeling_dino_pretraining import DinoVitForPreTraining
from .modeling.modeling_dino_vit import (
    DinoVitBackbone,
    DinoVitForImageClassification,
    DinoVitModel,
)
from .modeling.modeling_sgtr import SgtrForSceneGraphGeneration, SgtrModel
from .modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection, SgtrDetrModel
from .pipelines.scene_graph_pipeline import SceneGraphPipeline


if is_torchvision_available():
    from .image_processing.image_processing_dino_vit import DinoVitImageProcessor
    from .image_processing.image_processing_sgtr import SgtrImageProcessor

TASK = "scene-graph"
# The checkpoint that ships: trained on tabletop scenes, see its card.
DEFAULT_CHECKPOINT = str(resources.files("sgtr_hf") / "assets" / "sgtr-tabletop")


class AutoModelForSceneGraphGeneration(_BaseAutoModelClass):
    """Loads any model that generates scene graphs by its configuration."""

    _model_mapping = _LazyAutoMapping(CONFIG_MAPPING_NAMES, OrderedDict())


class LocalPipelines(dict[str, Any]):
    """`custom_pipelines` of a published model, for users who have this package.

    `pipeline` asks such a configuration first (transformers 5.23, `pipelines/__init__.py`): a task
    that is in it needs `trust_remote_code=True`, even if it is registered. This dictionary names
    its tasks, so that `pipeline(model=...)` finds the task, and is saved like any other, but
    denies having them, so that the registered pipeline is taken. Published code comes without
    this file, so without the package the dictionary is a plain one.
    """

    def __contains__(self, task: object) -> bool:
        """Deny every task."""
        return False


def _custom_pipelines(config: SgtrConfig) -> LocalPipelines:
    return LocalPipelines(config.__dict__.get("custom_pipelines", {}))


def _set_custom_pipelines(config: SgtrConfig, tasks: dict[str, Any]) -> None:
    config.__dict__["custom_pipelines"] = tasks


def register() -> None:
    """Register configurations, models, image processors and the pipeline; safe to repeat."""
    image_processors = {"pil": SgtrImageProcessorPil}
    vit_image_processors = {"pil": DinoVitImageProcessorPil}
    if is_torchvision_available():
        image_processors["torchvision"] = SgtrImageProcessor
        vit_image_processors["torchvision"] = DinoVitImageProcessor
    AutoConfig.register(DinoVitConfig.model_type, DinoVitConfig, exist_ok=True)
    AutoModel.register(DinoVitConfig, DinoVitModel, exist_ok=True)
    AutoModelForImageClassification.register(
        DinoVitConfig, DinoVitForImageClassification, exist_ok=True
    )
    AutoBackbone.register(DinoVitConfig, DinoVitBackbone, exist_ok=True)
    AutoModelForPreTraining.register(DinoVitConfig, DinoVitForPreTraining, exist_ok=True)
    AutoImageProcessor.register(
        DinoVitConfig, image_processor_classes=vit_image_processors, exist_ok=True
    )
    for config, base, head in (
        (SgtrDetrConfig, SgtrDetrModel, SgtrDetrForObjectDetection),
        (SgtrConfig, SgtrModel, SgtrForSceneGraphGeneration),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        # Also for scene graphs: published repositories can only name Auto classes of transformers.
        AutoModelForObjectDetection.register(config, head, exist_ok=True)
        AutoImageProcessor.register(config, image_processor_classes=image_processors, exist_ok=True)
    AutoModelForSceneGraphGeneration.register(
        SgtrConfig, SgtrForSceneGraphGeneration, exist_ok=True
    )
    # What transformers reads of a loaded configuration; `__dict__` is what it saves.
    SgtrConfig.custom_pipelines = property(_custom_pipelines, _set_custom_pipelines)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=SceneGraphPipeline,
            pt_model=AutoModelForSceneGraphGeneration,
            default={"model": (DEFAULT_CHECKPOINT, "main")},
            type="image",
        )
