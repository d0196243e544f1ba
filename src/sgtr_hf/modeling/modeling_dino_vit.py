"""The vision transformer (Dosovitskiy et al. 2021) in the form of DINO (Caron et al. 2021)."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_dino_vit import DinoVitConfig
from .attention_recording import record_attention
from .backbone_freezing import FreezablePreTrainedModel
from .transformer_layers import EncoderLayer


class ConvolutionalStem(nn.Sequential):
    """Embeds patches that overlap, by convolutions of stride 2 whose channels double.

    Args:
        config: Gives patch size, a power of 2, and width.

    Source:
        Xiao et al. 2021, with group norms of one group in place of batch norms: running statistics
        would differ between the crops of a self-distillation and between its two networks.
    """

    def __init__(self, config: DinoVitConfig) -> None:
        layers: list[nn.Module] = []
        num_steps = config.patch_size.bit_length() - 1
        channels = config.num_channels
        for step in range(num_steps):
            width = config.d_model // 2 ** (num_steps - 1 - step)
            layers += [
                nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(1, width),
                nn.GELU(),
            ]
            channels = width
        super().__init__(*layers, nn.Conv2d(channels, config.d_model, 1))


# Of calls that read earlier layers too, whatever the caller wants returned.
_ALL_LAYERS = {"output_hidden_states": True, "return_dict": True}


class PatchEmbedding(nn.Module):
    """Cuts an image into patches, embeds them, and gives each its place."""

    def __init__(self, config: DinoVitConfig) -> None:
        super().__init__()
        self.config = config
        size, width = config.patch_size, config.d_model
        self.projection: nn.Module = (
            ConvolutionalStem(config)
            if config.convolutional_stem
            else nn.Conv2d(config.num_channels, width, size, stride=size)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.grid_side = config.image_size // size
        # The first place is the class token's.
        self.position = nn.Parameter(torch.zeros(1, 1 + self.grid_side**2, width))
        self.registers: nn.Parameter | None = None
        if config.num_registers:
            self.registers = nn.Parameter(torch.zeros(1, config.num_registers, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images.

        Args:
            pixel_values: (B, C, H, W) normalised images of any size.

        Returns:
            (B, 1 + R + h * w, d_model): class token, registers, and the patches row by row.

        Raises:
            ValueError: If an image is smaller than a patch.
        """
        if min(pixel_values.shape[-2:]) < self.config.patch_size:
            raise ValueError(
                f"`pixel_values` must be at least one patch ({self.config.patch_size} pixels) a "
                f"side, got {tuple(pixel_values.shape)}."
            )
        if self.config.convolutional_stem:
            # A convolution with a margin would make a patch of what is left over.
            height, width = (
                side - side % self.config.patch_size for side in pixel_values.shape[-2:]
            )
            pixel_values = pixel_values[..., :height, :width]
        patches = self.projection(pixel_values)
        position = self.interpolate_position(*patches.shape[-2:])
        patches = patches.flatten(2).transpose(1, 2) + position[:, 1:]
        extra = self.class_token + position[:, :1]
        if self.registers is not None:
            extra = torch.cat((extra, self.registers), dim=1)
        tokens = torch.cat((extra.expand(len(patches), -1, -1), patches), dim=1)
        return self.dropout(tokens)

    def interpolate_position(self, height: int, width: int) -> Tensor:
        """Return position embeddings (1, 1 + height * width, d_model) of a grid of patches."""
        side = self.grid_side
        if (height, width) == (side, side):
            return self.position
        offset = self.config.interpolation_offset
        grid = self.position[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        target: dict[str, Any] = {"size": (height, width)}
        if offset:
            # The scale, not the size, decides where the samples lie; the size only rounds it.
            target = {"scale_factor": ((height + offset) / side, (width + offset) / side)}
        resized = nn.functional.interpolate(grid, mode="bicubic", **target)
        return torch.cat((self.position[:, :1], resized.flatten(2).transpose(1, 2)), dim=1)


class DinoVitPreTrainedModel(FreezablePreTrainedModel):
    """What the classes share with transformers: names, backends, initial weights."""

    config: DinoVitConfig
    config_class = DinoVitConfig
    base_model_prefix = "model"
    _no_split_modules = ["EncoderLayer", "PatchEmbedding"]  # noqa: RUF012 - transformers' contract
    # The student and the heads of a `DinoVitForPreTraining`, whose teacher every class can load.
    _keys_to_ignore_on_load_unexpected = [r"^student\.", r"^head\.", r"^center$"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, PatchEmbedding):
            for token in module.parameters(recurse=False):
                init.trunc_normal_(token, std=std)


@dataclass
class DinoVitOutput(BaseModelOutputWithPooling):
    """Tokens of an image.

    Args:
        last_hidden_state: (B, 1 + R + h * w, d_model) normalised tokens of the last layer: class,
            registers, patches row by row.
        pooler_output: (B, d_model) its class token.
        hidden_states: On request, the stem's and each layer's tokens, not normalised.
        attentions: On request, (B, heads, tokens, tokens) of each layer.
    """


class DinoVitModel(DinoVitPreTrainedModel):
    """Images of any size become tokens."""

    def __init__(self, config: DinoVitConfig) -> None:
        super().__init__(config)
        self.embedding = PatchEmbedding(config)
        # Without tensors, which have no values where models are made without memory.
        last = max(config.num_hidden_layers - 1, 1)
        rates = [config.drop_path * number / last for number in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(EncoderLayer(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return what makes tokens of patches."""
        return self.embedding.projection

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> DinoVitOutput:
        """Turn images into tokens.

        Args:
            pixel_values: (B, C, H, W) normalised images; sides need not be multiples of a patch,
                what is left over on the right and at the bottom is not seen.
            output_hidden_states: Also return the tokens of the stem and of every layer; as the
                configuration says if None, and so is the next.
            output_attentions: Also return attention weights; needs eager attention.
            **kwargs: For the attention backend.

        Raises:
            ValueError: If an image is smaller than a patch, or weights are asked of a backend
                that has none.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        recording: AbstractContextManager[dict[str, Tensor]] = nullcontext({})
        if output_attentions:
            recording = record_attention(self)
        with recording as recorded:
            states = [self.embedding(pixel_values)]
            for layer in self.layers:
                hidden_states = layer(states[-1], **kwargs)
                states = [*states, hidden_states] if output_hidden_states else [hidden_states]
        tokens = self.norm(states[-1])
        return DinoVitOutput(
            last_hidden_state=tokens,
            pooler_output=tokens[:, 0],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(recorded.values()) if output_attentions else None,
        )

    def last_layers(self, pixel_values: Tensor, count: int, **kwargs: Any) -> Tensor:
        """Return the normalised tokens (count, B, tokens, d_model) of the last layers."""
        output = self(pixel_values, **(kwargs | _ALL_LAYERS))
        return self.last_tokens(output, count)

    def last_tokens(self, output: DinoVitOutput, count: int) -> Tensor:
        """Read the same off an output that has all hidden states."""
        return self.norm(torch.stack(output.hidden_states[-count:]))


class DinoVitForImageClassification(DinoVitPreTrainedModel):
    """`DinoVitModel` and a linear classifier."""

    def __init__(self, config: DinoVitConfig) -> None:
        super().__init__(config)
        self.model = DinoVitModel(config)
        num_vectors = config.num_classification_layers + config.classify_patch_mean
        self.classifier = nn.Linear(num_vectors * config.d_model, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: (B, C, H, W) normalised images.
            labels: (B,) classes; the loss is their cross entropy, unless `problem_type` of the
                configuration says "multi_label_classification" or "regression", with (B, C).
            **kwargs: For `DinoVitModel` and the attention backend.
        """
        wants_layers = kwargs.get("output_hidden_states")
        if wants_layers is None:
            wants_layers = self.config.output_hidden_states
        output = self.model(pixel_values, **(kwargs | _ALL_LAYERS))
        logits = self.classifier(self._read(output))
        return ImageClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=output.hidden_states if wants_layers else None,
            attentions=output.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type is None:
            return nn.functional.cross_entropy(logits, labels)
        return self.loss_function(labels, logits, self.config)

    def features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Return what the classifier reads, (B, num_vectors * d_model)."""
        return self._read(self.model(pixel_values, **(kwargs | _ALL_LAYERS)))

    def _read(self, output: DinoVitOutput) -> Tensor:
        tokens = self.model.last_tokens(output, self.config.num_classification_layers)
        features = tokens[:, :, 0].transpose(0, 1).flatten(1)
        if not self.config.classify_patch_mean:
            return features
        patches = tokens[-1, :, 1 + self.config.num_registers :].mean(1)
        if self.config.num_classification_layers > 1:
            return torch.cat((features, patches), dim=1)
        # Class and patch features alternate, one number each: DINO's released weights want that.
        return torch.stack((features, patches), dim=-1).flatten(1)


class DinoVitBackbone(BackboneMixin, DinoVitPreTrainedModel):
    """Tokens as feature maps, for detectors."""

    def __init__(self, config: DinoVitConfig) -> None:
        super().__init__(config)
        self.num_features = [config.d_model] * (config.num_hidden_layers + 1)
        self.model = DinoVitModel(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """Return normalised patch tokens of `out_features` as maps (B, d_model, h, w).

        Args:
            pixel_values: (B, C, H, W) normalised images.
            **kwargs: For the attention backend.
        """
        output = self.model(pixel_values, **(kwargs | _ALL_LAYERS))
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        first_patch = 1 + self.config.num_registers
        maps = tuple(
            self.model.norm(output.hidden_states[self.stage_names.index(name)])[:, first_patch:]
            .transpose(1, 2)
            .unflatten(-1, (height, width))
            for name in self.out_features
        )
        return BackboneOutput(feature_maps=maps)
