"""Batch norms folded into the convolutions before them, for inference.

A batch norm in evaluation mode scales and shifts each channel, which the weights of a convolution
can do on the way: a small convolutional backbone takes a third less time without them.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights


# Where a scene graph model has its backbone.
_BACKBONE_PATH = ("model", "detector", "model", "backbone")
# Change of a feature, as a share of the largest, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
# Of half precision.
_COARSE_TOLERANCE = 0.1


class _Pair(NamedTuple):
    """A convolution and the batch norm that stands behind it in the same parent."""

    convolution: nn.Conv2d
    norm: _BatchNorm

    def tensors(self) -> tuple[Tensor | None, ...]:
        """What folding reads."""
        convolution, norm = self
        statistics = (norm.running_mean, norm.running_var)
        return (convolution.weight, convolution.bias, norm.weight, norm.bias, *statistics)


class FoldedInference:
    """Calls a scene graph model with the batch norms of its backbone folded.

    The model stays as it is, to be trained, moved or saved: folded are copies of its convolutions,
    made again whenever the backbone has changed. A backbone that does not run its modules in the
    order in which it lists them would give other features; that is found out on the pictures at
    hand, and such a backbone runs as it is.
    """

    def __init__(self) -> None:
        # What the backbone was when it was folded, and the result. One attribute: threads may
        # share a pipeline.
        self._last: tuple[list[Any], nn.Module | None] = ([], None)

    @torch.no_grad()
    def __call__(self, model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Call a model.

        Args:
            model: An `SgtrForSceneGraphGeneration`; without its backbone, or in training mode, it
                is called as it is.
            pixel_values: (B, 3, H, W) normalised images.
            **kwargs: What else the model takes.
        """
        backbone = _at_path(model, _BACKBONE_PATH)
        if backbone is None or model.training:
            return model(pixel_values, **kwargs)
        state, folded = self._last
        current = _state_of(backbone)
        if current != state:
            folded = _fold(backbone, pixel_values)
            self._last = (current, folded)
        if folded is not None:
            model = _replaced(model, _BACKBONE_PATH, folded)
        return model(pixel_values, **kwargs)


def _at_path(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    found: nn.Module | None = module
    for name in names:
        found = None if found is None else found._modules.get(name)
    return found


def _replaced(module: nn.Module, names: tuple[str, ...], replacement: nn.Module) -> nn.Module:
    """Copy a module that shares everything with the original but the module at a path."""
    if not names:
        return replacement
    clone = copy.copy(module)
    child = _replaced(getattr(module, names[0]), names[1:], replacement)
    clone._modules = {**module._modules, names[0]: child}
    return clone


def _find_pairs(backbone: nn.Module) -> list[_Pair]:
    """Pairs that can be folded, in the order of the modules."""
    pairs = []
    for parent in backbone.modules():
        before: nn.Module | None = None
        for module in parent._modules.values():
            if isinstance(before, nn.Conv2d) and isinstance(module, _BatchNorm):
                pair = _Pair(before, module)
                if _can_fold(pair):
                    pairs.append(pair)
            before = module
    return pairs


def _can_fold(pair: _Pair) -> bool:
    """Refuse norms that still learn, modules changed by hooks, and weights held elsewhere."""
    convolution, norm = pair
    if norm.training or norm.running_mean is None:
        return False
    for module in pair:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    if convolution.weight.shape[:1] != norm.running_mean.shape:
        return False
    return not any(
        tensor.device.type == "meta" or tensor.is_inference()
        for tensor in pair.tensors()
        if tensor is not None
    )


def _state_of(backbone: nn.Module) -> list[Any]:
    """Differs when a module was replaced or switched, or a tensor was moved or changed."""
    state: list[Any] = []
    for module in backbone.modules():
        state += (module, module.training)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                version = 0 if tensor.is_inference() else tensor._version
                state.append((tensor.data_ptr(), version))
    return state


def _fold(backbone: nn.Module, pixel_values: Tensor) -> nn.Module | None:
    """Copy a backbone with folded pairs; None if there are none, or the features are others."""
    pairs = _find_pairs(backbone)
    if not pairs:
        return None
    replacements: dict[nn.Module, nn.Module] = {}
    for pair in pairs:
        replacements[pair.convolution] = _folded_convolution(pair)
        # timm's batch norms apply the activation, too.
        replacements[pair.norm] = getattr(pair.norm, "act", nn.Identity())
    folded = _copy_tree(backbone, replacements)
    pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
    expected, found = (network(pixel_values).feature_maps for network in (backbone, folded))
    tolerance = _TOLERANCE.get(pixel_values.dtype, _COARSE_TOLERANCE)
    agree = all(
        bool((one - other).abs().max() <= tolerance * one.abs().max())
        for one, other in zip(expected, found, strict=True)
    )
    return folded if agree else None


def _folded_convolution(pair: _Pair) -> nn.Module:
    convolution, norm = pair
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.get_buffer("running_mean"),
        norm.get_buffer("running_var"),
        norm.eps,
        norm.weight,
        norm.bias,
    )
    folded = copy.copy(convolution)
    # Images arrive with channels last, and weights in another order would be put in it each time.
    arranged = weight.detach().contiguous(memory_format=torch.channels_last)
    folded._parameters = {
        "weight": nn.Parameter(arranged, requires_grad=False),
        "bias": nn.Parameter(bias.detach(), requires_grad=False),
    }
    return folded


def _copy_tree(module: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Copy the modules, not the tensors, of a tree with replacements."""
    if module in replacements:
        return replacements[module]
    clone = copy.copy(module)
    clone._modules = {
        name: None if child is None else _copy_tree(child, replacements)
        for name, child in module._modules.items()
    }
    return clone
