"""Self-distillation without labels (DINO, Caron et al. 2021) of the vision transformer.

G global and L local crops, B images, K prototypes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from ..configuration.configuration_dino_vit import DinoVitConfig
from ..losses.self_distillation_loss import self_distillation_loss, updated_center
from .modeling_dino_vit import DinoVitModel, DinoVitPreTrainedModel
from .self_distillation_head import Prototypes, SelfDistillationHead


@dataclass
class DinoVitPreTrainingOutput(ModelOutput):
    """What student and teacher say.

    Args:
        loss: Mean cross entropy of student and teacher over pairs of different crops.
        student_logits: (G + L, B, K), the global crops first.
        teacher_logits: (G, B, K), not centred.
        teacher_entropy: Mean entropy of the teacher's distributions, in nats.
    """

    loss: Tensor | None = None
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_entropy: Tensor | None = None


class DinoVitStudent(nn.Module):
    """The network that gradients train.

    Args:
        config: Of network and head.
    """

    def __init__(self, config: DinoVitConfig) -> None:
        super().__init__()
        self.model = DinoVitModel(config)
        self.head = SelfDistillationHead(config, fixed_length=config.fixed_prototype_length)


class DinoVitForPreTraining(DinoVitPreTrainedModel):
    """A student, and a teacher that is its moving average.

    The teacher is `model` and `head`, the student `student`: the teacher is the better network of
    the two, and the one that `from_pretrained` of every other class finds in a saved folder.

    Each optimizer step must be followed by `update_teacher`.
    """

    _keys_to_ignore_on_load_unexpected: list[str] = []  # noqa: RUF012 - transformers' contract

    def __init__(self, config: DinoVitConfig) -> None:
        super().__init__(config)
        self.model = DinoVitModel(config)
        # The reference never trains the lengths of the teacher's prototypes, but averages them.
        self.head = SelfDistillationHead(config, fixed_length=True)
        self.student = DinoVitStudent(config)
        self.register_buffer("center", torch.zeros(config.num_prototypes))
        # Mean logits of the teacher since the last update; one entry a batch.
        self._seen_logits: list[Tensor] = []
        self.post_init()
        self.freeze()
        self.copy_student()

    def freeze(self) -> None:
        """Let gradients reach the student alone, and the lengths of prototypes only if asked."""
        for module in (self.model, self.head):
            module.requires_grad_(False)
        is_fixed = self.config.fixed_prototype_length
        self.student.head.prototypes.length.requires_grad_(not is_fixed)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Prototypes):
            # As `nn.Linear` starts: uniform, with the variance of the width.
            bound = module.direction.shape[1] ** -0.5
            init.uniform_(module.direction, -bound, bound)
            init.ones_(module.length)
        elif isinstance(module, DinoVitForPreTraining):
            init.zeros_(module.center)

    def train(self, mode: bool = True) -> "DinoVitForPreTraining":
        """Set the mode of the student; the teacher drops nothing, ever."""
        super().train(mode)
        self.model.eval()
        self.head.eval()
        return self

    @torch.no_grad()
    def copy_student(self) -> None:
        """Make the teacher equal to the student, as at the start of a training."""
        for teacher, student in self._pairs():
            teacher.copy_(student)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        teacher_temperature: float = 0.04,
        **kwargs: Any,
    ) -> DinoVitPreTrainingOutput:
        """Compare student and teacher; each resolution is one forward pass.

        Args:
            pixel_values: (G, B, C, H, W) global crops of normalised images, seen by both.
            local_pixel_values: (L, B, C, h, w) local crops, seen by the student.
            teacher_temperature: Of the teacher's distributions.
            **kwargs: For the attention backend.

        Raises:
            ValueError: If a tensor has other dimensions, or there is but one crop of an image.
        """
        views = [pixel_values] if local_pixel_values is None else [pixel_values, local_pixel_values]
        for name, view in zip(("pixel_values", "local_pixel_values"), views, strict=False):
            if view.ndim != 5 or view.shape[1] != pixel_values.shape[1]:  # noqa: PLR2004
                raise ValueError(
                    f"`{name}` must be crops (crops, images, channels, height, width) of the same "
                    f"images as the global ones, got {tuple(view.shape)}."
                )
        with torch.no_grad():
            teacher_logits = self.head(_class_tokens(self.model, pixel_values, **kwargs))
        tokens = [_class_tokens(self.student.model, view, **kwargs) for view in views]
        student_logits = self.student.head(torch.cat(tokens))
        if self.training:
            self._seen_logits.append(teacher_logits.mean((0, 1)))
        loss, entropy = self_distillation_loss(
            student_logits,
            teacher_logits,
            self.center,
            student_temperature=self.config.student_temperature,
            teacher_temperature=teacher_temperature,
        )
        return DinoVitPreTrainingOutput(loss, student_logits, teacher_logits, entropy)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student, and the centre to what the teacher has said.

        Every process must call it, after each optimizer step. The centre takes the mean over all
        batches since the last call, so that accumulated gradients count as one large batch.

        Args:
            momentum: Share of the teacher that stays.
        """
        teacher, student = (list(tensors) for tensors in zip(*self._pairs(), strict=True))
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)
        if self._seen_logits:
            mean = torch.stack(self._seen_logits).mean(0)
            self._seen_logits.clear()
            self.center.copy_(updated_center(self.center, mean, self.config.center_momentum))

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter of the teacher, with the student's."""
        pairs = []
        for teacher, student in (
            (self.model, self.student.model),
            (self.head, self.student.head),
        ):
            pairs += list(zip(teacher.parameters(), student.parameters(), strict=True))
        return pairs


def _class_tokens(model: DinoVitModel, crops: Tensor, **kwargs: Any) -> Tensor:
    """Class tokens (crops, B, d_model) of crops of one resolution, in one forward pass."""
    tokens = model(crops.flatten(0, 1), **(kwargs | {"return_dict": True})).pooler_output
    return tokens.unflatten(0, crops.shape[:2])
