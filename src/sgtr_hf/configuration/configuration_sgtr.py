"""Configuration of the scene graph model."""

from typing import Any, Literal, cast

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .checked_config import (
    CheckedConfig,
    check_above,
    check_at_least,
    check_numbering,
    check_shares,
    model_type_of,
    require,
)
from .configuration_sgtr_detr import SgtrDetrConfig
from .size_limits import check_sizes


@strict
class SgtrConfig(CheckedConfig):
    """Settings of `SgtrModel` and `SgtrForSceneGraphGeneration`.

    The defaults are SGTR (Li et al. 2022) as released for Visual Genome, without its quirks;
    those are the `legacy_*` fields. Entity classes are the detector's: `config.id2label`.
    `predicate_node_generator="spatial_aware"`, `graph_assembling="unified"` and
    `pair_queries=True` make it SGTR+ (a reimplementation: no original code exists).

    Args:
        detector_config: The entity node generator, a `SgtrDetrConfig`.
        id2predicate: Names of the predicates, from 0, without background.
        freeze_detector: Run the detector without gradients, in evaluation mode; only the
            predicate part trains.
        predicate_node_generator: "structural" (SGTR), or "spatial_aware" (SGTR+): queries have
            anchors for subject and object, which each level refines.
        graph_assembling: "rule_based" (SGTR), or "unified" (SGTR+): learned and differentiable.
        pair_queries: Start the queries from the pairs of entities that are most likely related
            (ours) instead of learned queries.
        pair_width: Width of the layer that scores all pairs (ours).
        triplet_exchange: Self-attention over the three vectors of a query after each level; else
            SGTR's sum into the predicate. Of the spatial-aware generator (ours).
        gaussian_attention: Bias the predicate's attention to the image by Gaussian maps around its
            anchors. Of the spatial-aware generator (from traces in the release).
        gaussian_spread: Squared distance, in sides of an anchor, at which such a map has fallen
            to 1 / e (0.6 in the release).
        num_triplet_denoising_groups: Groups of noised annotated pairs that train the decoder
            besides the queries (ours, after DN-DETR). Needs both `pair_queries` and the
            spatial-aware generator.
        triplet_denoising_label_noise: Share of their entities that get a random class.
        triplet_denoising_box_noise: Largest shift of their boxes, as for the detector.
        auxiliary_assignments: Queries that each relation is assigned to at the earlier levels,
            instead of one (ours, after one-to-many training of detectors).
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
        entity_class_embedding: Add a linear map of their class probabilities, too (ours).
        predicate_classification: "focal" is a sigmoid a predicate (Visual Genome), "softmax" has a
            background class in front (Open Images).
        training_assembling_top_k: Entities kept a role and query while matching in training, paired
            rank with rank.
        assembling_exponent: Exponent of the confidence and of the class similarity; 0 leaves both
            out.
        assembling_distance_scale: Length in pixels that one image side stands for when the
            distance of centres is measured, so that the result does not depend on the input size
            (ours). 0 leaves the distance out.
        legacy_pixel_distance: Measure that distance in pixels of the resized image instead
            (`rel_detr_inference.py`).
        assembling_box_scale: Factor on the city-block distance of boxes in unified assembling,
            against a similarity of about one (ours). 0 leaves the boxes out.
        score_temperature: Divides the predicate logits before they become probabilities; fitted
            on validation data so that the score of a triplet is the probability that it is right.
        score_offset: Added after that, likewise.
        class_score_scale: Factor on the class logits of detected entities in the scores of
            triplets; this and the next two are fitted likewise.
        class_score_rivalry: Factor on the logarithm of the sum of an entity's class probabilities,
            which is added; below 0 where several likely classes make each less likely.
        class_score_offset: Added after that.
        predicate_frequencies: How often each predicate is annotated in the training data, on any
            scale; needed by the next two.
        logit_adjustment: Strength tau: in training, tau times the log frequency is added to the
            logits (Menon et al. 2021), so that without it rare predicates come out higher.
        predicate_reweighting: Exponent beta: positives weigh (median frequency / frequency) to
            the beta in the predicate loss (ours).
        predicate_cost_weight: Matching weight of the predicate probability.
        relation_vector_cost_weight: Matching weight of the L1 distance of centres.
        entity_class_cost_weight: Matching weight of the assembled entities' classes.
        entity_box_cost_weight: Matching weight of the assembled entities' L1 box distance.
        entity_giou_cost_weight: Matching weight of the assembled entities' generalised IoU.
        assembling_cost_weight: Matching weight of the assembling scores.
        matching_base: Base b of the costs b**-p that turn a probability p into a cost, at least 1.
        predicate_loss_weight: Weight of the predicate classification.
        relation_vector_loss_weight: Weight of the L1 loss of centres.
        indicator_box_loss_weight: Weight of the indicators' L1 box loss.
        indicator_giou_loss_weight: Weight of the indicators' generalised IoU loss.
        indicator_class_loss_weight: Weight of the indicators' classification.
        assembled_box_loss_weight: Weight of the L1 loss of the boxes that unified assembling sums
            up.
        assembled_giou_loss_weight: Weight of their generalised IoU loss.
        assembled_class_loss_weight: Weight of their negative log-likelihood of the class.
        correspondence_loss_weight: Weight of the cross entropy between correspondence and the
            entities that the detector's matching found.
        relatedness_loss_weight: Weight of the focal loss of the scores of all pairs.
        auxiliary_relation_loss_weight: Factor on all relation losses of the earlier levels.
        predicate_background_weight: Weight of background in the softmax classification.
        focal_alpha: Positive weight of the focal predicate loss.
        focal_gamma: Exponent of the focal predicate loss.
        auxiliary_loss: Also train the earlier levels of the structural decoder.
        initializer_range: Standard deviation of new query embeddings.
        legacy_triplet_matching: Match assembled rows, the best 4096 of them, instead of queries;
            of relations that win rows of one query, one stays (`rel_detr_losses.py:119`).
        legacy_conflict_row: Choose the one by the costs in the row whose number is the query's,
            instead of those in the rows that won (`rel_detr_losses.py:573`).
        legacy_softmax_cost: Match with a softmax over the logits of a sigmoid head, instead of
            the sigmoid (`rel_detr_losses.py`).
        legacy_focal_normalization: Average the focal loss over predicates, multiply it by the
            number of queries, and count the relations of this process alone
            (`rel_detr_losses.py:857`).
        legacy_unweighted_auxiliary_predicates: Leave the focal loss of the earlier levels out of
            `auxiliary_relation_loss_weight` (`onestg_encdec_vrd.py:220`).
    """

    model_type = "sgtr"
    sub_configs_defaults = {  # noqa: RUF012 - the contract of transformers
        "detector_config": SubConfigSpec(config_class=SgtrDetrConfig)
    }

    detector_config: dict[str, Any] | PreTrainedConfig | None = None
    id2predicate: dict[int, str] | dict[str, str] | None = None
    freeze_detector: bool = False
    predicate_node_generator: Literal["structural", "spatial_aware"] = "structural"
    graph_assembling: Literal["rule_based", "unified"] = "rule_based"
    pair_queries: bool = False
    pair_width: int = 32
    triplet_exchange: bool = True
    gaussian_attention: bool = True
    gaussian_spread: float | int = 0.6
    num_triplet_denoising_groups: int = 0
    triplet_denoising_label_noise: float | int = 0.2
    triplet_denoising_box_noise: float | int = 0.4
    auxiliary_assignments: int = 1
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
    entity_class_embedding: bool = False
    predicate_classification: Literal["focal", "softmax"] = "focal"
    training_assembling_top_k: int = 25
    assembling_exponent: float | int = 0.6
    assembling_distance_scale: float | int = 512.0
    legacy_pixel_distance: bool = False
    assembling_box_scale: float | int = 10.0
    score_temperature: float | int = 1.0
    score_offset: float | int = 0.0
    class_score_scale: float | int = 1.0
    class_score_rivalry: float | int = 0.0
    class_score_offset: float | int = 0.0
    predicate_frequencies: list[float | int] | None = None
    logit_adjustment: float | int = 0.0
    predicate_reweighting: float | int = 0.0
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
    assembled_box_loss_weight: float | int = 0.5
    assembled_giou_loss_weight: float | int = 0.5
    assembled_class_loss_weight: float | int = 0.3
    correspondence_loss_weight: float | int = 0.5
    relatedness_loss_weight: float | int = 1.0
    auxiliary_relation_loss_weight: float | int = 0.5
    predicate_background_weight: float | int = 0.08
    focal_alpha: float | int = 0.25
    focal_gamma: float | int = 2.0
    auxiliary_loss: bool = True
    initializer_range: float | int = 1.0
    legacy_triplet_matching: bool = False
    legacy_conflict_row: bool = False
    legacy_softmax_cost: bool = False
    legacy_focal_normalization: bool = False
    legacy_unweighted_auxiliary_predicates: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Give predicates integer keys, and share the entity names with the detector."""
        # One loaded as remote code has a class of its own, so the type alone tells.
        kind, wanted = model_type_of(self.detector_config), SgtrDetrConfig.model_type
        require(kind in (None, wanted), "detector_config", kind, f'of model type "{wanted}"')
        if self.id2predicate is None:
            self.id2predicate = {0: "PREDICATE_0", 1: "PREDICATE_1"}
        self.validate_predicates()
        self.id2predicate = {int(key): name for key, name in self.id2predicate.items()}
        names_are_given = self.id2label is not None or kwargs.get("num_labels") is not None
        super().__post_init__(**kwargs)
        source, target = (self, self.detector) if names_are_given else (self.detector, self)
        target.id2label = dict(source.id2label)
        self._share_names()

    def __setattr__(self, name: str, value: Any) -> None:
        """Give the detector new classes, too, as `from_pretrained(..., id2label=...)` sets them."""
        super().__setattr__(name, value)
        # Names that come before any were numbered are those that transformers makes up.
        are_numbered = self.__dict__.get("label2id") and value is not None
        if (
            name == "id2label"
            and are_numbered
            and isinstance(self.detector_config, PreTrainedConfig)
        ):
            self.detector.id2label = dict(value)
            self._share_names()

    def _share_names(self) -> None:
        """Number the names of both configurations, which have the same."""
        for config in (self, self.detector):
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
        """Reject indices with gaps, and names that `predicate2id` could not tell apart."""
        predicates = self.id2predicate or {}
        check_numbering("id2predicate", predicates)
        names = list(predicates.values())
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, "id2predicate", repeated, "without names that repeat")

    def validate_sizes(self) -> None:
        """Reject sizes that no transformer can have."""
        at_least_one = (
            "predicate_decoder_layers",
            "num_predicate_queries",
            "num_attention_heads",
            "training_assembling_top_k",
            "pair_width",
            "auxiliary_assignments",
        )
        check_sizes(self, at_least_one, 1)
        at_least_none = (
            "predicate_encoder_layers",
            "feed_forward_dim",
            "num_triplet_denoising_groups",
        )
        check_sizes(self, at_least_none, 0)
        require(
            self.d_model % self.num_attention_heads == 0,
            "num_attention_heads",
            self.num_attention_heads,
            f"a divisor of the detector's `d_model` ({self.d_model})",
        )

    def validate_weights(self) -> None:
        """Reject negative weights and probabilities outside [0, 1]."""
        weights = self.names_ending_with("_cost_weight", "_loss_weight", "_background_weight")
        others = (
            "focal_gamma",
            "assembling_exponent",
            "assembling_distance_scale",
            "assembling_box_scale",
        )
        check_at_least(self, (*weights, *others), 0)
        # Below 1 the likelier would cost more.
        check_at_least(self, ("matching_base",), 1)
        shares = (
            "dropout",
            "focal_alpha",
            "triplet_denoising_label_noise",
            "triplet_denoising_box_noise",
        )
        check_shares(self, shares)
        check_above(self, ("gaussian_spread", "score_temperature", "class_score_scale"), 0)

    def validate_generator(self) -> None:
        """Reject settings that do not go together, or would have no effect."""
        is_spatial = self.predicate_node_generator == "spatial_aware"
        if self.num_triplet_denoising_groups and not (is_spatial and self.pair_queries):
            raise ValueError(
                "`num_triplet_denoising_groups` needs `pair_queries=True` and "
                '`predicate_node_generator="spatial_aware"`; set it to 0 or change those.'
            )
        if is_spatial and not (self.dynamic_queries or self.pair_queries):
            raise ValueError(
                '`predicate_node_generator="spatial_aware"` needs `dynamic_queries` or '
                "`pair_queries`: without either all queries would be the same."
            )
        if self.legacy_triplet_matching and self.graph_assembling == "unified":
            raise ValueError(
                "`legacy_triplet_matching` matches triplets that the rule assembled; it has no "
                'meaning with `graph_assembling="unified"`.'
            )
        if self.legacy_conflict_row and not self.legacy_triplet_matching:
            raise ValueError(
                "`legacy_conflict_row` says how `legacy_triplet_matching` resolves conflicts, and "
                "needs it to be True; otherwise there are none."
            )

    def validate_frequencies(self) -> None:
        """Reject frequencies that do not fit the predicates, or are missing."""
        frequencies = self.predicate_frequencies
        if frequencies is None:
            for name in ("logit_adjustment", "predicate_reweighting"):
                if getattr(self, name):
                    raise ValueError(f"`{name}` needs `predicate_frequencies`, got None.")
        elif len(frequencies) != self.num_predicates or min(frequencies) < 0:
            raise ValueError(
                f"`predicate_frequencies` must hold a number of at least 0 for each of the "
                f"{self.num_predicates} predicates, got {frequencies}."
            )
