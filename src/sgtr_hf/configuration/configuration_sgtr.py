"""Configuration of the scene graph model."""

from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_sgtr_detr import SgtrDetrConfig


@strict
class SgtrConfig(PreTrainedConfig):
    """Settings of `SgtrModel` and `SgtrForSceneGraphGeneration`.

    The defaults are SGTR (Li et al. 2022) as released for Visual Genome, without its quirks;
    those are the `legacy_*` fields. Entity classes are the detector's: `config.id2label`.

    Args:
        detector_config: The entity node generator, a `SgtrDetrConfig`.
        id2predicate: Names of the predicates, from 0, without background.
        freeze_detector: Run the detector without gradients, in evaluation mode; only the
            predicate part trains.
        predicate_encoder_layers: Encoder layers on top of the detector's memory.
        predicate_decoder_layers: Levels of the structural decoder.
        num_predicate_queries: Predicate queries.
        num_attention_heads: Attention heads of the predicate part.
        feed_forward_dim: Hidden width of its feed-forward blocks.
        dropout: Its dropout.
        activation_function: Activation of its feed-forward blocks.
        norm_first: Pre-norm layers, as released.
        layer_norm_eps: Added to the variance in layer norms.
        dynamic_queries: Compose the queries from the entity nodes of the image; else they start
            from zeros.
        entity_box_embedding: Add a learned map of the sine embedding of their boxes to the entity
            nodes (ours). The vectors of a detector with anchors say how to refine a box, not where
            it is; those of the original know it themselves.
        predicate_classification: "focal" is a sigmoid a predicate (Visual Genome), "softmax" has a
            background class in front (Open Images).
        assembling_top_k: Entities kept a role and query at inference, paired rank with rank.
        training_assembling_top_k: The same while matching in training.
        assembling_exponent: Exponent of the confidence and of the class similarity.
        assembling_distance_scale: Length in pixels that one image side stands for when the
            distance of centres is measured, so that the result does not depend on the input size
            (ours).
        legacy_pixel_distance: Measure that distance in pixels of the resized image instead
            (`rel_detr_inference.py`).
        predicate_cost_weight: Matching weight of the predicate probability.
        relation_vector_cost_weight: Matching weight of the L1 distance of centres.
        entity_class_cost_weight: Matching weight of the assembled entities' classes.
        entity_box_cost_weight: Matching weight of the assembled entities' L1 box distance.
        entity_giou_cost_weight: Matching weight of the assembled entities' generalised IoU.
        assembling_cost_weight: Matching weight of the assembling scores.
        matching_base: Base b of the costs b**-p that turn a probability p into a cost.
        predicate_loss_weight: Weight of the predicate classification.
        relation_vector_loss_weight: Weight of the L1 loss of centres.
        indicator_box_loss_weight: Weight of the indicators' L1 box loss.
        indicator_giou_loss_weight: Weight of the indicators' generalised IoU loss.
        indicator_class_loss_weight: Weight of the indicators' classification.
        auxiliary_relation_loss_weight: Factor on all relation losses of the earlier levels.
        predicate_background_weight: Weight of background in the softmax classification.
        focal_alpha: Positive weight of the focal predicate loss.
        focal_gamma: Exponent of the focal predicate loss.
        auxiliary_loss: Also train the earlier levels of the structural decoder.
        initializer_range: Standard deviation of new query embeddings.
        legacy_triplet_matching: Match assembled rows instead of queries, with softmax over
            sigmoid logits, a range of 4096 rows, and the original's resolution of conflicts, which
            reads the wrong row of the cost matrix (`rel_detr_losses.py:573`).
        legacy_focal_normalization: Average the focal loss over predicates, multiply it by the
            number of queries, normalise it by this process alone, and leave it out of
            `auxiliary_relation_loss_weight` (`rel_detr_losses.py:857`).
    """

    model_type = "sgtr"
    sub_configs_defaults = {  # noqa: RUF012 - the contract of transformers
        "detector_config": SubConfigSpec(config_class=SgtrDetrConfig)
    }

    detector_config: dict[str, Any] | PreTrainedConfig | None = None
    id2predicate: dict[int, str] | dict[str, str] | None = None
    freeze_detector: bool = False
    predicate_encoder_layers: int = 3
    predicate_decoder_layers: int = 6
    num_predicate_queries: int = 180
    num_attention_heads: int = 8
    feed_forward_dim: int = 2048
    dropout: float | int = 0.1
    activation_function: str = "relu"
    norm_first: bool = True
    layer_norm_eps: float = 1e-5
    dynamic_queries: bool = True
    entity_box_embedding: bool = True
    predicate_classification: Literal["focal", "softmax"] = "focal"
    assembling_top_k: int = 3
    training_assembling_top_k: int = 25
    assembling_exponent: float | int = 0.6
    assembling_distance_scale: float | int = 512.0
    legacy_pixel_distance: bool = False
    predicate_cost_weight: float | int = 1.0
    relation_vector_cost_weight: float | int = 0.6
    entity_class_cost_weight: float | int = 0.5
    entity_box_cost_weight: float | int = 0.6
    entity_giou_cost_weight: float | int = 1.0
    assembling_cost_weight: float | int = 0.01
    matching_base: float | int = 32.0
    predicate_loss_weight: float | int = 1.0
    relation_vector_loss_weight: float | int = 1.0
    indicator_box_loss_weight: float | int = 0.5
    indicator_giou_loss_weight: float | int = 0.5
    indicator_class_loss_weight: float | int = 0.3
    auxiliary_relation_loss_weight: float | int = 0.5
    predicate_background_weight: float | int = 0.08
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    auxiliary_loss: bool = True
    initializer_range: float | int = 1.0
    legacy_triplet_matching: bool = False
    legacy_focal_normalization: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Give predicates integer keys, and share the entity names with the detector."""
        if self.id2predicate is None:
            self.id2predicate = {0: "PREDICATE_0", 1: "PREDICATE_1"}
        self.id2predicate = {int(key): name for key, name in self.id2predicate.items()}
        names_are_given = self.id2label is not None or kwargs.get("num_labels") is not None
        super().__post_init__(**kwargs)
        source, target = (self, self.detector) if names_are_given else (self.detector, self)
        target.id2label = dict(source.id2label)
        for config in (source, target):
            config.label2id = {name: index for index, name in config.id2label.items()}

    @property
    def detector(self) -> SgtrDetrConfig:
        """The detector's configuration, which is an object once this one is made."""
        return cast(SgtrDetrConfig, self.detector_config)

    @property
    def d_model(self) -> int:
        """Width, which is the detector's."""
        return self.detector.d_model

    @property
    def num_predicates(self) -> int:
        """Number of predicates, background not counted."""
        return len(self.id2predicate or {})

    @property
    def predicate2id(self) -> dict[str, int]:
        """Predicate names to indices."""
        return {str(name): int(index) for index, name in (self.id2predicate or {}).items()}

    def validate_predicates(self) -> None:
        """Reject predicate indices with gaps."""
        indices = sorted(int(key) for key in self.id2predicate or {})
        if indices != list(range(len(indices))):
            raise ValueError(f"`id2predicate` must count from 0 without gaps, got keys {indices}.")

    def validate_sizes(self) -> None:
        """Reject sizes that no transformer can have."""
        for name in (
            "predicate_decoder_layers",
            "num_predicate_queries",
            "num_attention_heads",
            "assembling_top_k",
            "training_assembling_top_k",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("predicate_encoder_layers", "feed_forward_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)}.")

    def validate_weights(self) -> None:
        """Reject negative weights and probabilities outside [0, 1]."""
        for name, value in vars(self).items():
            if name.endswith(("_cost_weight", "_loss_weight", "_background_weight")) and value < 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        for name in ("dropout", "focal_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
