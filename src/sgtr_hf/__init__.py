"""End-to-end scene graph generation on the Hugging Face stack.

Importing the package registers its models with the Auto classes of transformers and its pipeline
as `pipeline("scene-graph")`.
"""

from . import data, metrics
from ._version import __version__
from .auto import AutoModelForSceneGraphGeneration, register
from .configuration.configuration_dino_vit import DinoVitConfig
from .configuration.configuration_sgtr import SgtrConfig
from .configuration.configuration_sgtr_detr import SgtrDetrConfig
from .image_processing.image_processing_dino_vit import (
    DinoVitImageProcessor,
    DinoVitImageProcessorPil,
)
from .image_processing.image_processing_sgtr import SgtrImageProcessor, SgtrImageProcessorPil
from .modeling.modeling_dino_pretraining import DinoVitForPreTraining
from .modeling.modeling_dino_vit import (
    DinoVitBackbone,
    DinoVitForImageClassification,
    DinoVitModel,
)
from .modeling.modeling_sgtr import SgtrForSceneGraphGeneration, SgtrModel
from .modeling.modeling_sgtr_detr import SgtrDetrForObjectDetection, SgtrDetrModel
from .pipelines.scene_graph_pipeline import SceneGraphPipeline
from .scene_graph import SceneGraph


register()

__all__ = [
    "AutoModelForSceneGraphGeneration",
    "DinoVitBackbone",
    "DinoVitConfig",
    "DinoVitForImageClassification",
    "DinoVitForPreTraining",
    "DinoVitImageProcessor",
    "DinoVitImageProcessorPil",
    "DinoVitModel",
    "SceneGraph",
    "SceneGraphPipeline",
    "SgtrConfig",
    "SgtrDetrConfig",
    "SgtrDetrForObjectDetection",
    "SgtrDetrModel",
    "SgtrForSceneGraphGeneration",
    "SgtrImageProcessor",
    "SgtrImageProcessorPil",
    "SgtrModel",
    "__version__",
    "data",
    "metrics",
]
