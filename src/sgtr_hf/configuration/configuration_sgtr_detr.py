"""Configuration of the detector."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .checked_config import (
    CheckedConfig,
    check_above,
    check_at_least,
    check_shares,
    model_type_of,
    require,
)
from .configuration_dino_vit import DinoVitConfig
from .size_limits import check_sizes


@strict
class SgtrDetrConfig(CheckedConfig):
    """Settings of `SgtrDetrModel` and `SgtrDetrForObjectDetection`.

    The defaults are DETR-R50 (Carion et al. 2020). Weights and costs are plain factors; a
    threshold or probability lies in [0, 1].

    Args:
        backbone_config: Any `AutoBackbone` configuration; ResNet-50 when None. Every feature map
            it returns is one feature level of the encoder.
        frozen_backbone_stages: Leading parts of the backbone that do not train, counted as in
            its `stage_names`: 0 none, 1 the stem, 2 the stem and the first stage (DETR's), ...
            -1 the whole backbone.
        freeze_batch_norm: Keep the statistics and the affine part of the backbone's batch norms
            as they were loaded (all DETR descendants do; small batches spoil them).
        normalize_input_projection: Follow the 1x1 projection of each feature level by a group norm
            (Deformable DETR); levels of different scale need it.
        d_model: Width of the transformer. Must be divisible by 4 and by `num_attention_heads`.
        encoder_layers: Encoder layers.
        decoder_layers: Decoder layers; each is a prediction level.
        num_attention_heads: Attention heads, in encoder and decoder.
        feed_forward_dim: Width of the hidden layer of the feed-forward blocks.
        dropout: Dropout of attention weights, of residual branches and inside feed-forward blocks.
        activation_function: Activation of the feed-forward blocks.
        norm_first: Pre-norm layers instead of the paper's post-norm.
        layer_norm_eps: Added to the variance in layer norms.
        query_type: "learned" is the paper's; "anchors" are 4-D boxes refined level by level
            (DAB-DETR, Liu et al. 2022), which converge on small data.
        num_queries: Entity queries: the most entities an image can have.
        position_temperature: Temperature of the sine embeddings: 10000 in DETR, 20 in DAB-DETR.
        select_queries: Start the anchors and the content of the queries from the likeliest cells
            of the encoded image (two-stage Deformable DETR, Zhu et al. 2021) instead of learned
            ones. Needs `query_type="anchors"`.
        num_denoising_groups: Groups of noised annotations that train the decoder besides the
            queries (DN-DETR, Li et al. 2022). Needs `query_type="anchors"`.
        denoising_label_noise: Share of denoising queries that get a random class.
        denoising_box_noise: Largest shift of a denoising box, as a share of half its size (centre)
            and of its size (width and height).
        classification: "softmax" with a no-object class (DETR), or "focal" with a sigmoid a class
            (Deformable DETR).
        focal_alpha: Weight of the positive class in the focal loss.
        focal_gamma: Exponent of the focal loss.
        eos_coefficient: Weight of the no-object class in the cross entropy.
        class_cost_weight: Weight of the class probability in the matching.
        box_cost_weight: Weight of the L1 distance of boxes in the matching.
        giou_cost_weight: Weight of the generalised IoU in the matching.
        class_loss_weight: Weight of the classification loss.
        box_loss_weight: Weight of the L1 loss of boxes.
        giou_loss_weight: Weight of the generalised IoU loss.
        auxiliary_loss: Also train the predictions of all earlier decoder levels.
        initializer_range: Standard deviation of new query embeddings; 1 in DETR.
        legacy_box_offset: Amount added to x2 and y2 whenever a box becomes (x1, y1, x2, y2).
            0.001 in the released SGTR (`structures/boxes.py:403`), an oversight there; else 0.
        legacy_unweighted_auxiliary_losses: Give every loss of an auxiliary level weight 1, as the
            released SGTR does by a misspelt key (`onestg_encdec_vrd.py:283`).
    """

    model_type = "sgtr_detr"
    sub_configs_defaults = {  # noqa: RUF012 - the contract of transformers
        "backbone_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="resnet",
            init_kwargs={"out_features": ["stage4"]},
        )
    }
    attribute_map = {"hidden_size": "d_model", "num_hidden_layers": "encoder_layers"}  # noqa: RUF012

    backbone_config: dict[str, Any] | PreTrainedConfig | None = None
    frozen_backbone_stages: int = 2
    freeze_batch_norm: bool = True
    normalize_input_projection: bool = False
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_attention_heads: int = 8
    feed_forward_dim: int = 2048
    dropout: float | int = 0.1
    activation_function: str = "relu"
    norm_first: bool = False
    layer_norm_eps: float = 1e-5
    query_type: Literal["learned", "anchors"] = "learned"
    num_queries: int = 100
    position_temperature: float | int = 10000.0
    select_queries: bool = False
    num_denoising_groups: int = 0
    denoising_label_noise: float | int = 0.2
    denoising_box_noise: float | int = 0.4
    classification: Literal["softmax", "focal"] = "softmax"
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    eos_coefficient: float | int = 0.1
    class_cost_weight: float | int = 1.0
    box_cost_weight: float | int = 5.0
    giou_cost_weight: float | int = 2.0
    class_loss_weight: float | int = 1.0
    box_loss_weight: float | int = 5.0
    giou_loss_weight: float | int = 2.0
    auxiliary_loss: bool = True
    initializer_range: float | int = 1.0
    legacy_box_offset: float | int = 0.0
    legacy_unweighted_auxiliary_losses: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the label names in both directions."""
        backbone, kind = self.backbone_config, model_type_of(self.backbone_config)
        if isinstance(backbone, dict) and kind == DinoVitConfig.model_type:
            # Ours is not registered where the model was loaded as remote code.
            self.backbone_config = DinoVitConfig.from_dict(backbone)
        elif isinstance(backbone, dict):
            is_known = isinstance(kind, str) and kind in CONFIG_MAPPING
            expected = 'a configuration whose "model_type" transformers knows, such as "resnet"'
            require(is_known, "backbone_config", backbone, expected)
        super().__post_init__(**kwargs)
        self.label2id = {name: index for index, name in self.id2label.items()}

    def validate_sizes(self) -> None:
        """Reject sizes that no transformer can have."""
        check_sizes(self, ("d_model", "decoder_layers", "num_attention_heads", "num_queries"), 1)
        check_sizes(self, ("encoder_layers", "feed_forward_dim", "num_denoising_groups"), 0)
        require(
            self.d_model % 4 == 0 and self.d_model % self.num_attention_heads == 0,
            "d_model",
            self.d_model,
            f"divisible by 4 and by `num_attention_heads` ({self.num_attention_heads})",
        )
        # Heads of anchor queries share out pairs of a sine and a cosine.
        require(
            self.query_type != "anchors" or self.d_model // self.num_attention_heads % 2 == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"such that a head of anchor queries has an even share of `d_model` ({self.d_model})",
        )
        require(
            self.frozen_backbone_stages >= -1,
            "frozen_backbone_stages",
            self.frozen_backbone_stages,
            "-1 (all), 0 (none) or a number of stages",
        )

    def validate_weights(self) -> None:
        """Reject negative weights and probabilities outside [0, 1]."""
        weights = self.names_ending_with("_cost_weight", "_loss_weight")
        others = ("focal_gamma", "eos_coefficient", "legacy_box_offset")
        check_at_least(self, (*weights, *others), 0)
        shares = ("dropout", "denoising_label_noise", "denoising_box_noise", "focal_alpha")
        check_shares(self, shares)
        check_above(self, ("position_temperature",), 0)

    def validate_query_type(self) -> None:
        """Reject denoising without anchors: it would have no effect."""
        require(
            self.num_denoising_groups == 0 or self.query_type == "anchors",
            "num_denoising_groups",
            self.num_denoising_groups,
            '0 unless `query_type` is "anchors"',
        )
        require(
            not self.select_queries or self.query_type == "anchors",
            "select_queries",
            self.select_queries,
            'False unless `query_type` is "anchors"',
        )
