"""Configuration of the vision transformer."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin

from .checked_config import CheckedConfig, check_above, check_shares
from .size_limits import check_sizes


@strict
class DinoVitConfig(BackboneConfigMixin, CheckedConfig):
    """Settings of `DinoVitModel` and the classes built on it.

    The defaults are the ViT-S/16 (Dosovitskiy et al. 2021) of DINO (Caron et al. 2021).

    Args:
        image_size: Side in pixels of the images that the position embeddings are made for; others
            work, the embeddings are interpolated.
        patch_size: Side of a patch in pixels.
        num_channels: Channels of an image.
        d_model: Width of the transformer; `hidden_size` is another name.
        num_hidden_layers: Layers.
        num_attention_heads: Attention heads.
        feed_forward_dim: Width of the hidden layer of the feed-forward blocks.
        activation_function: Activation of the feed-forward blocks.
        layer_norm_eps: Added to the variance in layer norms.
        dropout: Dropout of attention weights, residual branches and inside feed-forward blocks.
        drop_path: Stochastic depth of the last layer; it rises linearly from 0 at the first.
        num_registers: Extra tokens without a place (Darcet et al. 2024).
        interpolation_offset: Added to the number of patches a side before the position embeddings
            are interpolated. 0.1 in DINO, where it guards against rounding; it shifts the
            embeddings of other sizes a little, so checkpoints of DINO need it. 0 fits the grid.
        num_classification_layers: Last layers whose class tokens the classifier reads; 4 in
            DINO's linear evaluation of small models, 1 of base models.
        classify_patch_mean: Also show the classifier the mean patch token of the last layer.
        initializer_range: Standard deviation of new weights.
        convolutional_stem: Embed patches by 3 x 3 convolutions of stride 2 (Xiao et al. 2021)
            instead of one product a patch; helps small images. `patch_size` must be a power of 2.
        num_prototypes: Outputs of the heads of `DinoVitForPreTraining`.
        head_layers: Linear layers of a head before the prototypes.
        head_hidden_dim: Width between them.
        head_bottleneck_dim: Width that the prototypes see.
        fixed_prototype_length: Hold the student's prototypes at length 1, which is stabler; DINO's
            long trainings do not (`norm_last_layer`).
        student_temperature: Of the student's distributions.
        center_momentum: Share of the centre of the teacher's logits that stays at an update.
        out_features: Of `DinoVitBackbone`: "stem", "stage1", ... feature maps to return.
        out_indices: The same by number; -1 is the last layer.
    """

    model_type = "dino_vit"
    attribute_map = {"hidden_size": "d_model", "intermediate_size": "feed_forward_dim"}  # noqa: RUF012

    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    d_model: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    feed_forward_dim: int = 1536
    activation_function: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout: float | int = 0.0
    drop_path: float | int = 0.0
    num_registers: int = 0
    interpolation_offset: float | int = 0.1
    num_classification_layers: int = 1
    classify_patch_mean: bool = False
    initializer_range: float | int = 0.02
    convolutional_stem: bool = False
    num_prototypes: int = 65536
    head_layers: int = 3
    head_hidden_dim: int = 2048
    head_bottleneck_dim: int = 256
    fixed_prototype_length: bool = True
    student_temperature: float | int = 0.1
    center_momentum: float | int = 0.9
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    # Of every vision transformer; `transformer_layers.py` asks for it.
    norm_first = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Name the stages of the backbone."""
        # Before so many stages are named.
        check_sizes(self, ("num_hidden_layers",), 1)
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None),
            out_features=kwargs.pop("out_features", None),
        )
        super().__post_init__(**kwargs)

    def validate_sizes(self) -> None:
        """Reject sizes that no vision transformer can have."""
        at_least_one = (
            "image_size",
            "patch_size",
            "num_channels",
            "d_model",
            "num_hidden_layers",
            "num_attention_heads",
            "feed_forward_dim",
        )
        check_sizes(self, at_least_one, 1)
        check_sizes(self, ("num_registers",), 0)
        if self.image_size < self.patch_size:
            raise ValueError(
                f"`image_size` must be at least `patch_size` ({self.patch_size}), got "
                f"{self.image_size}."
            )
        if self.d_model % self.num_attention_heads:
            raise ValueError(
                f"`d_model` must be divisible by `num_attention_heads` "
                f"({self.num_attention_heads}), got {self.d_model}."
            )
        if not 1 <= self.num_classification_layers <= self.num_hidden_layers:
            raise ValueError(
                "`num_classification_layers` must be between 1 and `num_hidden_layers` "
                f"({self.num_hidden_layers}), got {self.num_classification_layers}."
            )

    def validate_interpolation(self) -> None:
        """Reject an offset that changes the number of positions."""
        if not 0 <= self.interpolation_offset < 1:
            raise ValueError(
                "`interpolation_offset` must be at least 0 and below 1, got "
                f"{self.interpolation_offset}."
            )

    def validate_stem(self) -> None:
        """Reject a convolutional stem that cannot halve its way down to patches."""
        size = self.patch_size
        if self.convolutional_stem and (size < 2 or size & (size - 1)):  # noqa: PLR2004
            raise ValueError(
                "`convolutional_stem` halves the image; `patch_size` must be a power of 2, at "
                f"least 2, got {size}."
            )
        if self.convolutional_stem and self.d_model % (size // 2):
            raise ValueError(
                f"`d_model` must be divisible by {size // 2} for `convolutional_stem`, whose "
                f"channels double to it, got {self.d_model}."
            )

    def validate_pretraining(self) -> None:
        """Reject heads and temperatures that cannot be."""
        names = ("num_prototypes", "head_layers", "head_hidden_dim", "head_bottleneck_dim")
        check_sizes(self, names, 1)
        check_above(self, ("student_temperature",), 0)
        check_shares(self, ("center_momentum",))

    def validate_probabilities(self) -> None:
        """Reject probabilities that would drop everything, or less than nothing."""
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
