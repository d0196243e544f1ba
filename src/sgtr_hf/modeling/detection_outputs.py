"""What the detector classes return.

B images, N entity queries, M denoising queries, S cells, L levels, C entity classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import ModelOutput

from .entity_decoder import ImageMemory
from .given_entities import GivenEntities


@dataclass
class SgtrDetrModelOutput(ModelOutput):
    """What the decoder says of N entity queries at its L levels.

    Args:
        last_hidden_state: (B, N, d_model) queries after the last level.
        pred_boxes: (B, N, 4) boxes of the last level, cxcywh relative to the image.
        intermediate_hidden_states: (L, B, N, d_model), only when all levels are asked for.
        intermediate_boxes: (L, B, N, 4), likewise.
        denoising_hidden_states: (L, B, M, d_model) of denoising queries, in training.
        denoising_boxes: (L, B, M, 4), likewise.
        denoising_entity_indices: (B, M) annotation that each must restore, -1 on padding.
        proposal_logits: (B, S, C + 1) or (B, S, C) of all cells, with query selection.
        proposal_boxes: (B, S, 4), likewise.
        memory: The encoded image.
        given: The entities that the caller gave, whose boxes are then the predicted ones.
    """

    # Always there, but transformers wants a default for every output.
    last_hidden_state: Tensor = None  # type: ignore[assignment]
    pred_boxes: Tensor = None  # type: ignore[assignment]
    intermediate_hidden_states: Tensor | None = None
    intermediate_boxes: Tensor | None = None
    denoising_hidden_states: Tensor | None = None
    denoising_boxes: Tensor | None = None
    denoising_entity_indices: Tensor | None = None
    proposal_logits: Tensor | None = None
    proposal_boxes: Tensor | None = None
    memory: ImageMemory = None  # type: ignore[assignment]
    given: GivenEntities | None = None


@dataclass
class SgtrDetrObjectDetectionOutput(ModelOutput):
    """Detected entities.

    Args:
        loss: Sum of `loss_dict`, when labels were given.
        loss_dict: Weighted losses by name.
        logits: (B, N, C + 1) with no-object last, or (B, N, C) for a focal head.
        pred_boxes: (B, N, 4) cxcywh relative to the image without its padding.
        entity_probabilities: (B, N, C), no-object removed.
        auxiliary_outputs: `logits` and `pred_boxes` of the earlier levels, when labels were given.
        last_hidden_state: (B, N, d_model).
        encoder_last_hidden_state: (B, S, d_model).
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    entity_probabilities: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None


class EntityLevels(NamedTuple):
    """Raw predictions of all decoder levels."""

    logits: Tensor
    """(L, B, N, C + 1) with no-object last, or (L, B, N, C) for a focal head."""
    boxes: Tensor
    """(L, B, N, 4) cxcywh."""
