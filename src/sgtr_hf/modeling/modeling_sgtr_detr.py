"""The detector: DETR (Carion et al. 2020) with learned or anchor queries."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_sgtr_detr import SgtrDetrConfig
from ..losses.detection_loss import count_annotations, denoising_losses, detection_losses
from ..losses.hungarian_matching import (
    AssignmentProblem,
    LossCounts,
    PaddedAnnotations,
    assign_all,
    entity_matching_costs,
    pad_annotations,
)
from .backbone_freezing import FreezablePreTrainedModel, freeze_backbone, hold_batch_norm
from .denoising_queries import DenoisingQueries, DenoisingQueryGenerator, denoising_visibility
from .detection_outputs import (
    EntityLevels,
    SgtrDetrModelOutput,
    SgtrDetrObjectDetectionOutput,
)
from .detector_backbone import check_images, input_projection, make_backbone
from .entity_decoder import AnchorQueryDecoder, ImageMemory, LearnedQueryDecoder
from .given_entities import GivenEntities, given_logits
from .position_embedding import grid_boxes, grid_sine_embedding
from .prediction_heads import AnchorEmbedding, ClassHead, init_head
from .query_selection import QuerySelection, SelectedQueries
from .transformer_layers import EncoderLayer, PlaceProjection


# Size of the box on a cell of the finest level, as a share of the image; it doubles as cells do, up
# to a size from which boxes can still grow.
CELL_SIZE = 0.15
LARGEST_CELL = 0.6


class SgtrDetrPreTrainedModel(FreezablePreTrainedModel):
    """What the detector's classes share with transformers: names, backends, initial weights."""

    config: SgtrDetrConfig
    config_class = SgtrDetrConfig
    base_model_prefix = "model"
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012 - transformers' contract

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_transformer_weights(module, self.config.initializer_range)


def init_transformer_weights(module: nn.Module, embedding_std: float) -> None:
    """Initialise one module as DETR does: Xavier for matrices, a normal draw for embeddings."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=embedding_std)
    if isinstance(module, PlaceProjection):
        init.copy_(module.weight, module.initial_weight().to(module.weight))
    init_head(module)


class SgtrDetrModel(SgtrDetrPreTrainedModel):
    """Backbone, encoder and decoder: an image becomes N query vectors with boxes."""

    def __init__(self, config: SgtrDetrConfig) -> None:
        super().__init__(config)
        self.backbone = make_backbone(config)
        channels = self.backbone.channels
        self.input_projections = nn.ModuleList(
            input_projection(width, config) for width in channels
        )
        self.level_embedding = (
            nn.Embedding(len(channels), config.d_model) if len(channels) > 1 else None
        )
        self.encoder_layers = nn.ModuleList(
            EncoderLayer(config) for _ in range(config.encoder_layers)
        )
        # Post-norm layers end normalised; pre-norm stacks need one more norm.
        self.encoder_norm = (
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
            if config.norm_first
            else nn.Identity()
        )
        self.query_embedding = nn.Embedding(config.num_queries, config.d_model)
        self.query_selection = QuerySelection(config) if config.select_queries else None
        if config.query_type == "anchors":
            if self.query_selection is None:
                self.anchor_embedding = AnchorEmbedding(config.num_queries)
            self.decoder: LearnedQueryDecoder | AnchorQueryDecoder = AnchorQueryDecoder(config)
        else:
            self.decoder = LearnedQueryDecoder(config)
        self.denoising = (
            DenoisingQueryGenerator(config) if config.num_denoising_groups > 0 else None
        )
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Stop the training of the backbone's leading stages, and of its batch norms."""
        freeze_backbone(self.backbone, self.config.frozen_backbone_stages)
        self._hold_batch_norm()

    def train(self, mode: bool = True) -> "SgtrDetrModel":
        """Switch modes; frozen batch norms stay in evaluation mode."""
        super().train(mode)
        self._hold_batch_norm()
        return self

    def _hold_batch_norm(self) -> None:
        # The norms of a frozen stage are part of it.
        stages = -1 if self.config.freeze_batch_norm else self.config.frozen_backbone_stages
        hold_batch_norm(self.backbone, stages)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        annotations: PaddedAnnotations | None = None,
        *,
        all_levels: bool = False,
        given: GivenEntities | None = None,
        **kwargs: Any,
    ) -> SgtrDetrModelOutput:
        """Detect.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            pixel_mask: (B, H, W), 1 where the image is and 0 on padding; all 1 when None.
            annotations: Needed for denoising queries, which are added in training mode.
            all_levels: Also return the earlier levels of the decoder.
            given: Entities to describe instead of detecting any; needs anchor queries.
            **kwargs: For the attention backend.
        """
        memory = self.encode(pixel_values, pixel_mask, **kwargs)
        if given is not None:
            return self._describe(memory, given, **kwargs)
        denoising = None
        if self.denoising is not None and self.training and annotations is not None:
            denoising = self.denoising(annotations)
        selected = None
        if self.query_selection is not None:
            selected = self.query_selection(memory.features, memory.cells, memory.padding_mask)
        hidden_states, boxes = self._decode(
            memory, selected, denoising, all_levels=all_levels, **kwargs
        )
        num_denoising = 0 if denoising is None else denoising.entity_indices.shape[1]
        output = SgtrDetrModelOutput(
            last_hidden_state=hidden_states[-1, :, num_denoising:],
            pred_boxes=boxes[-1, :, num_denoising:],
            memory=memory,
        )
        if all_levels:
            output.intermediate_hidden_states = hidden_states[:, :, num_denoising:]
            output.intermediate_boxes = boxes[:, :, num_denoising:]
            if selected is not None:
                output.proposal_logits, output.proposal_boxes = selected.logits, selected.boxes
        if denoising is not None:
            output.denoising_hidden_states = hidden_states[:, :, :num_denoising]
            output.denoising_boxes = boxes[:, :, :num_denoising]
            output.denoising_entity_indices = denoising.entity_indices
        return output

    def _describe(
        self, memory: ImageMemory, given: GivenEntities, **kwargs: Any
    ) -> SgtrDetrModelOutput:
        """Decode queries that stand on given boxes, which stay where they are."""
        if len(given.boxes) != len(memory.features):
            raise ValueError(
                f"`entity_boxes` must have one entry for each of the {len(memory.features)} "
                f"images, got {len(given.boxes)}."
            )
        if self.query_selection is None:
            content = self.query_embedding.weight.mean(0).expand(*given.boxes.shape[:2], -1)
        else:
            content = self.query_selection.content_at(memory.features, memory.cells, given.boxes)
            content = content + self.query_embedding.weight.mean(0)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=content, attention_mask=given.valid
        )
        hidden_states, _ = self.decoder(
            content,
            memory,
            anchors=given.boxes.to(content),
            self_mask=mask,
            all_levels=False,
            **kwargs,
        )
        return SgtrDetrModelOutput(
            last_hidden_state=hidden_states[-1],
            pred_boxes=given.boxes.to(content),
            memory=memory,
            given=given,
        )

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, **kwargs: Any
    ) -> ImageMemory:
        """Run backbone and encoder; arguments as in `forward`.

        Raises:
            TypeError: If `pixel_values` is no tensor of floats.
            ValueError: If it or `pixel_mask` has another shape.
        """
        check_images(pixel_values, pixel_mask)
        features, positions, masks, cells = [], [], [], []
        finest = 0
        # Convolutions are a third faster on processors, and on GPUs, with channels last.
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        feature_maps = self.backbone(pixel_values).feature_maps
        for level, (feature_map, projection) in enumerate(
            zip(feature_maps, self.input_projections, strict=True)
        ):
            mask = _resize_mask(pixel_mask, feature_map)
            finest = finest or feature_map.shape[-1]
            doublings = round(math.log2(finest / feature_map.shape[-1]))
            features.append(projection(feature_map).flatten(2).transpose(1, 2))
            position = grid_sine_embedding(
                mask,
                self.config.d_model,
                self.config.position_temperature,
                feature_map.dtype,
                cell_centres=self.config.query_type == "anchors",
            )
            if self.level_embedding is not None:
                position = position + self.level_embedding.weight[level]
            positions.append(position)
            masks.append(mask)
            cells.append(grid_boxes(mask, min(CELL_SIZE * 2**doublings, LARGEST_CELL)))
        memory = ImageMemory(
            torch.cat(features, dim=1),
            torch.cat(positions, dim=1),
            torch.cat(cells, dim=1),
            grids=tuple((mask.shape[1], mask.shape[2]) for mask in masks),
        )
        if pixel_mask is not None:
            memory.padding_mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)
        memory.features = self._run_encoder(memory, **kwargs)
        return memory

    def _run_encoder(self, memory: ImageMemory, **kwargs: Any) -> Tensor:
        hidden_states = memory.features
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=memory.padding_mask
        )
        for layer in self.encoder_layers:
            hidden_states = layer(hidden_states, memory.position, mask, **kwargs)
        return self.encoder_norm(hidden_states)

    def _decode(
        self,
        memory: ImageMemory,
        selected: SelectedQueries | None,
        denoising: DenoisingQueries | None,
        *,
        all_levels: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        batch_size = memory.features.shape[0]
        content = self.query_embedding.weight.expand(batch_size, -1, -1)
        if self.config.query_type == "learned":
            return self.decoder(content, memory, all_levels=all_levels, **kwargs)
        if selected is None:
            anchors = self.anchor_embedding.weight.sigmoid().expand(batch_size, -1, -1)
        else:
            content, anchors = content + selected.content, selected.anchors
        mask = None
        if denoising is not None:
            content = torch.cat((denoising.content, content), dim=1)
            anchors = torch.cat((denoising.anchors.to(anchors), anchors), dim=1)
            mask = self._denoising_mask(content, denoising)
        return self.decoder(
            content, memory, anchors=anchors, self_mask=mask, all_levels=all_levels, **kwargs
        )

    def _denoising_mask(self, content: Tensor, denoising: DenoisingQueries) -> Tensor | None:
        is_query = content.new_ones(content.shape[:2], dtype=torch.bool)
        is_query[:, : denoising.entity_indices.shape[1]] = denoising.entity_indices >= 0
        visibility = denoising_visibility(denoising.group, self.config.num_queries)
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=content,
            attention_mask=is_query,
            and_mask_function=visibility,
        )


class SgtrDetrForObjectDetection(SgtrDetrPreTrainedModel):
    """`SgtrDetrModel` with a class head, matching and losses."""

    def __init__(self, config: SgtrDetrConfig) -> None:
        super().__init__(config)
        self.model = SgtrDetrModel(config)
        # The last column of a softmax head is no-object.
        is_focal = config.classification == "focal"
        columns = config.num_labels + (not is_focal)
        self.class_head = ClassHead(config.d_model, columns, is_focal=is_focal)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        loss_counts: LossCounts | None = None,
        **kwargs: Any,
    ) -> SgtrDetrObjectDetectionOutput:
        """Detect entities, and compute the loss when `labels` are given.

        Args:
            pixel_values: (B, 3, H, W) normalised images.
            pixel_mask: (B, H, W), 1 where the image is and 0 on padding; all 1 when None.
            labels: One dict an image: class_labels (T,) from 0 and boxes (T, 4), cxcywh relative
                to the image without its padding.
            loss_counts: Of `loss_counts`, where gradients of several batches are accumulated;
                these images, in all processes, are counted if None.
            **kwargs: For the attention backend.

        Raises:
            ValueError: If labels are out of range or an image has more entities than queries.
        """
        annotations = None
        if labels is not None:
            annotations = self._pad(labels)
            annotations = annotations._replace(counts=loss_counts or count_annotations(annotations))
        model_output = self.model(
            pixel_values, pixel_mask, annotations, all_levels=annotations is not None, **kwargs
        )
        levels = self.read_levels(model_output)
        output = self.summarize(model_output, levels)
        if annotations is not None:
            matches = assign_all(*self.matching_problems(model_output, levels, annotations))
            losses = self.losses(model_output, levels, annotations, matches)
            # An output that gets fields afterwards would not list them among its items.
            output = replace(output, loss=torch.stack([*losses.values()]).sum(), loss_dict=losses)
        return output

    def loss_counts(self, labels: Sequence[dict[str, Tensor]], num_batches: int = 1) -> LossCounts:
        """Count what the losses of an update are divided by; every process must call it.

        Args:
            labels: As of `forward`, of all images of this process in the update.
            num_batches: Batches that they come in, whose gradients are averaged.
        """
        return count_annotations(self._pad(labels), num_batches=num_batches)

    def _pad(self, labels: Sequence[dict[str, Tensor]]) -> PaddedAnnotations:
        return pad_annotations(labels, self.device, num_classes=self.config.num_labels)

    def read_levels(self, model_output: SgtrDetrModelOutput) -> EntityLevels:
        """Read classes and boxes off the queries, of all levels if the decoder returned them."""
        hidden_states, boxes = (
            model_output.intermediate_hidden_states,
            model_output.intermediate_boxes,
        )
        if hidden_states is None or boxes is None:
            hidden_states = model_output.last_hidden_state[None]
            boxes = model_output.pred_boxes[None]
        logits = self.class_head(hidden_states)
        if model_output.given is not None:
            logits = given_logits(self.config, logits[-1], model_output.given)[None]
        return EntityLevels(logits, boxes)

    def summarize(
        self, model_output: SgtrDetrModelOutput, levels: EntityLevels
    ) -> SgtrDetrObjectDetectionOutput:
        """Make the public output, without losses."""
        logits = levels.logits[-1]
        output = SgtrDetrObjectDetectionOutput(
            logits=logits,
            pred_boxes=levels.boxes[-1],
            entity_probabilities=entity_probabilities(logits, self.config.classification),
            last_hidden_state=model_output.last_hidden_state,
            encoder_last_hidden_state=model_output.memory.features,
        )
        if model_output.intermediate_hidden_states is not None:
            output.auxiliary_outputs = [
                {"logits": level_logits, "pred_boxes": level_boxes}
                for level_logits, level_boxes in zip(
                    levels.logits[:-1], levels.boxes[:-1], strict=True
                )
            ]
        return output

    def matching_problems(
        self,
        model_output: SgtrDetrModelOutput,
        levels: EntityLevels,
        annotations: PaddedAnnotations,
    ) -> list[AssignmentProblem]:
        """What must be matched: the queries of all levels and, with query selection, the cells."""
        first = 0 if self.config.auxiliary_loss else -1
        levels = EntityLevels(levels.logits[first:], levels.boxes[first:])
        predictions = [levels, *_proposals(model_output)]
        return [
            AssignmentProblem(
                entity_matching_costs(self.config, logits, boxes, annotations), annotations.valid
            )
            for logits, boxes in predictions
        ]

    def losses(
        self,
        model_output: SgtrDetrModelOutput,
        levels: EntityLevels,
        annotations: PaddedAnnotations,
        matches: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Weighted losses of all levels, of denoising queries and of cells.

        Args:
            model_output: Of `SgtrDetrModel`, with all levels.
            levels: Read off it by `read_levels`.
            annotations: Padded annotations.
            matches: Solutions of `matching_problems`, (L, B, T) each, of the last level alone
                without `auxiliary_loss`.
        """
        first = 0 if self.config.auxiliary_loss else -1
        losses = detection_losses(
            self.config,
            levels.logits[first:],
            levels.boxes[first:],
            annotations,
            matches[0],
        )
        hidden_states, boxes, indices = (
            model_output.denoising_hidden_states,
            model_output.denoising_boxes,
            model_output.denoising_entity_indices,
        )
        if hidden_states is not None and boxes is not None and indices is not None:
            logits = self.class_head(hidden_states)[first:]
            losses |= denoising_losses(self.config, logits, boxes[first:], annotations, indices)
        for proposals in _proposals(model_output):
            found = detection_losses(self.config, *proposals, annotations, matches[1])
            losses |= {
                name.replace("loss_", "loss_proposal_"): loss for name, loss in found.items()
            }
        return losses


def _proposals(model_output: SgtrDetrModelOutput) -> list[EntityLevels]:
    """The cells' predictions as a single level; none without query selection."""
    logits, boxes = model_output.proposal_logits, model_output.proposal_boxes
    return [] if logits is None or boxes is None else [EntityLevels(logits[None], boxes[None])]


def entity_probabilities(logits: Tensor, classification: str) -> Tensor:
    """Turn logits into the probabilities (..., C) of the real classes.

    Args:
        logits: (..., C + 1) with no-object last for "softmax", (..., C) for "focal".
        classification: `SgtrDetrConfig.classification`.
    """
    if classification == "softmax":
        return logits.softmax(dim=-1)[..., :-1]
    return logits.sigmoid()


def _resize_mask(pixel_mask: Tensor | None, feature_map: Tensor) -> Tensor:
    """Bring (B, H, W) to the size of a feature map (B, C, h, w) as booleans."""
    batch_size, _, height, width = feature_map.shape
    if pixel_mask is None:
        return feature_map.new_ones((batch_size, height, width), dtype=torch.bool)
    resized = nn.functional.interpolate(pixel_mask[:, None].float(), size=(height, width))
    return resized[:, 0] > 0
