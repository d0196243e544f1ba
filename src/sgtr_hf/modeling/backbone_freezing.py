"""Freezing of backbone stages and batch norms, for any backbone of transformers or timm."""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedConfig, PreTrainedModel


class FreezablePreTrainedModel(PreTrainedModel):
    """The base of all models: keeps frozen what is configured so, and reads safetensors alone.

    It also checks the configuration, and hands attention backends on to those that have them.

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

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        # Fields that were set after the configuration was made, as `from_pretrained` does with
        # its overrides, have been checked for their types only.
        if isinstance(config, PreTrainedConfig):
            config.validate()
        super().__init__(config, *args, **kwargs)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], allow_all_kernels: bool = False
    ) -> None:
        """Set the attention backend; as in transformers, which documents the arguments.

        A backbone that does not support it gets what it does support, instead of an error.
        """
        # The classes of a backbone share its configuration, and what they support.
        classes = {
            id(module.config): type(module)
            for module in self.modules()
            if isinstance(module, PreTrainedModel)
        }
        spelt_out = _spell_out(attn_implementation, self.config, classes)
        super().set_attn_implementation(spelt_out, allow_all_kernels)

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


def supported_attention(model_class: type[PreTrainedModel], asked: str) -> str:
    """Name the attention backend that a model can have instead of one it does not support.

    Unknown names stay as they are: the error of transformers says which there are.
    """
    is_supported = {
        "flash": model_class._supports_flash_attn,
        "flex_attention": model_class._supports_flex_attn,
        "sdpa": model_class._supports_sdpa,
    }
    if all(supported for kind, supported in is_supported.items() if kind in asked):
        return asked
    return "sdpa" if model_class._supports_sdpa else "eager"


def _spell_out(
    asked: str | Mapping[str, Any],
    config: PreTrainedConfig,
    classes: Mapping[int, type[PreTrainedModel]],
) -> dict[str, Any]:
    """Name the backend of a configuration and of all inside it; what is not asked for stays.

    Args:
        asked: A backend for all, or for each as in the result.
        config: Of a model.
        classes: Class of the model with the configuration of that `id`.

    Returns:
        The backend of the configuration itself under "", and such dictionaries of others.
    """
    if isinstance(asked, str):
        asked = dict.fromkeys(("", *config.sub_configs), asked)
    own = asked.get("", config._attn_implementation)
    if isinstance(own, str) and id(config) in classes:
        own = supported_attention(classes[id(config)], own)
    inner = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": own} | {
        name: _spell_out(asked.get(name, {}), sub_config, classes)
        for name, sub_config in inner.items()
        if sub_config is not None
    }


def freeze_backbone(backbone: PreTrainedModel, num_stages: int) -> None:
    """Stop the training of the leading stages, and of nothing else.

    Args:
        backbone: An `AutoBackbone`.
        num_stages: Entries of `backbone.stage_names`, the stem first where it is named; 0 freezes
            nothing, -1 everything.

    Raises:
        ValueError: If there are fewer stages, or the backbone's parameters are not in stages.
    """
    for module in _leading_modules(backbone, num_stages):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)


def hold_batch_norm(backbone: PreTrainedModel, num_stages: int) -> None:
    """Keep statistics and affine parameters of batch norms as they are.

    The running statistics then serve in training too, like DETR's frozen batch norm.

    Args:
        backbone: An `AutoBackbone`.
        num_stages: Leading stages whose norms are held; as in `freeze_backbone`.
    """
    for module in _leading_modules(backbone, num_stages):
        if isinstance(module, _BatchNorm):
            module.eval()
            module.requires_grad_(False)


def _leading_modules(backbone: PreTrainedModel, num_stages: int) -> list[nn.Module]:
    """Modules up to the end of a stage, in the order in which they were registered."""
    modules = list(backbone.modules())
    if num_stages == -1:
        return modules
    if num_stages == 0:
        return []
    stage_names = list(backbone.stage_names)
    if num_stages > len(stage_names):
        raise ValueError(
            f"`frozen_backbone_stages` is {num_stages}, but this backbone has "
            f"{len(stage_names)} stages ({', '.join(stage_names)}); use -1 to freeze them all."
        )
    is_timm = hasattr(backbone, "_backbone")
    end = (_timm_stage_end if is_timm else _stage_end)(backbone, num_stages)
    if end == 0:
        raise ValueError(
            f"`frozen_backbone_stages` is {num_stages}, but the stages of "
            f"{type(backbone).__name__} are not known by name; only 0 (none) and -1 (all) work."
        )
    return modules[:end]


def _timm_stage_end(backbone: PreTrainedModel, num_stages: int) -> int:
    """Count the modules up to the end of a stage of a model of timm; 0 if it is not found."""
    stage = backbone._backbone.feature_info.info[num_stages - 1]["module"]
    # Depending on the model timm leaves it as it is, flattens a level of it or wraps it.
    names = (stage, stage.replace(".", "_", 1), f"model.{stage}", f"body.{stage}")
    return max(_end_of(backbone, f"_backbone.{name}") for name in names)


def _stage_end(backbone: PreTrainedModel, num_stages: int) -> int:
    """Count the modules up to the end of a stage of any other model; 0 if it is not found."""
    has_stem = backbone.stage_names[0] == "stem"
    count = len(backbone.stage_names) - has_stem
    for index, (name, module) in enumerate(backbone.named_modules()):
        is_list = name.split(".")[-1] in ("stages", "layers", "layer", "blocks")
        if not is_list or len(list(module.children())) != count:
            continue
        if num_stages > has_stem:
            return _end_of(backbone, f"{name}.{num_stages - 1 - has_stem}")
        before = list(backbone.modules())[:index]
        if any(True for part in before for _ in part.parameters(recurse=False)):
            return index
        # The stem is the beginning of the first stage, as in DINOv3's ConvNeXt.
        first_stage = next(module.children())
        beginning = next((part for part, _ in first_stage.named_children()), "")
        return _end_of(backbone, f"{name}.0.{beginning}")
    return 0


def _end_of(backbone: nn.Module, name: str) -> int:
    """Count the modules up to the last one inside the named one; 0 if there is none."""
    names = (f"{other}." for other, _ in backbone.named_modules())
    return max((i for i, other in enumerate(names, 1) if other.startswith(f"{name}.")), default=0)
