"""Freezing of backbone stages and batch norms, for any backbone of transformers or timm."""

from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel


class FreezablePreTrainedModel(PreTrainedModel):
    """The base of all models: keeps frozen what is configured so, and reads safetensors alone.

    `from_pretrained` of transformers puts new parameters in place of those that the constructor
    froze, and these train (`core_model_loading.py` of 5.23); so the freezing is done again.

    Without safetensors in a folder it would read pickles, which nothing here writes: only
    `use_safetensors=False` allows them.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Layers go through the attention interface of transformers.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model; as in transformers, which documents the arguments.

        Raises:
            ValueError: If a file of weights is damaged.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            loaded = super().from_pretrained(*args, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"The weights of {args[0] if args else 'the model'} cannot be read: {error}. A "
                "file is damaged or cut off; copy or download it again."
            ) from error
        # With `output_loading_info` there is a second result.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, FreezablePreTrainedModel):
                module.freeze()
        return loaded

    def freeze(self) -> None:
        """Stop the training of what the configuration freezes; here nothing."""


def freeze_backbone(backbone: PreTrainedModel, num_stages: int) -> None:
    """Stop the training of the leading stages, and of nothing else.

    Args:
        backbone: An `AutoBackbone`.
        num_stages: Entries of `backbone.stage_names`, the stem first where it is named; 0 freezes
            nothing, -1 everything.

    Raises:
        ValueError: If there are fewer stages, or the backbone's parameters are not in stages.
    """
    stage_names = list(backbone.stage_names)
    if num_stages > len(stage_names):
        raise ValueError(
            f"`frozen_backbone_stages` is {num_stages}, but this backbone has "
            f"{len(stage_names)} stages ({', '.join(stage_names)}); use -1 to freeze them all."
        )
    if num_stages == -1:
        backbone.requires_grad_(False)
    elif num_stages > 0:
        for module in _leading_modules(backbone, num_stages):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def hold_batch_norm(backbone: nn.Module) -> None:
    """Keep statistics and affine parameters of all batch norms as they are.

    The running statistics then serve in training too, like DETR's frozen batch norm.
    """
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.requires_grad_(False)


def _leading_modules(backbone: PreTrainedModel, num_stages: int) -> list[nn.Module]:
    """Modules up to the end of a stage, in the order in which they were registered."""
    modules = list(backbone.named_modules())
    markers = _stage_markers(backbone, num_stages)
    ends = [
        index
        for index, (name, _) in enumerate(modules)
        if any(f".{marker}." in f".{name}." for marker in markers)
    ]
    if not ends:
        raise ValueError(
            f"`frozen_backbone_stages` is {num_stages}, but the stages of "
            f"{type(backbone).__name__} are not known by name; only 0 (none) and -1 (all) work."
        )
    return [module for _, module in modules[: ends[-1] + 1]]


def _stage_markers(backbone: PreTrainedModel, num_stages: int) -> tuple[str, ...]:
    """Names under which the last frozen stage may be registered."""
    timm_backbone = getattr(backbone, "_backbone", None)
    if timm_backbone is not None:
        return (f"_backbone.{timm_backbone.feature_info.info[num_stages - 1]['module']}",)
    if num_stages == 1:
        return ("embedder", "embeddings", "embedding")
    kinds = ("encoder.stages", "encoder.layers", "encoder.layer", "model.layers")
    return tuple(f"{kind}.{num_stages - 2}" for kind in kinds)
