"""Schedules, parameter groups and gradient limits of self-distillation, as in the reference."""

import re
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from .image_recipe import SelfDistillationTraining


# The batch that the learning rate of a recipe is meant for.
BASE_BATCH_SIZE = 256
# Three matrices here, one in the reference, which limits the gradient of each tensor.
_FUSED = re.compile(r"\b(query|key|value)_projection\b")
# Added to norms, as in the reference.
_EPSILON = 1e-6


def cosine_schedule(
    start: float, end: float, num_updates: int, num_warmup: int = 0
) -> NDArray[np.float64]:
    """Return the value of each update: a rise from 0 to `start`, then half a cosine to `end`.

    Both ends belong to the rise, and the cosine would reach its end one update after the last.

    Args:
        start: Highest value, or the first of a schedule that rises.
        end: Where the cosine leads.
        num_updates: Length.
        num_warmup: Updates of the rise.
    """
    rise = np.linspace(0, start, num_warmup)
    steps = np.arange(num_updates - num_warmup)
    fall = end + 0.5 * (start - end) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate((rise, fall))


class SelfDistillationSchedules(NamedTuple):
    """What changes in the course of a run."""

    learning_rate: NDArray[np.float64]
    """Of each update."""
    weight_decay: NDArray[np.float64]
    """Of each update, for matrices."""
    teacher_momentum: NDArray[np.float64]
    """Of each update."""
    teacher_temperature: NDArray[np.float64]
    """Of each epoch."""

    def temperature(self, epoch: int) -> float:
        """Return the teacher's temperature in an epoch; the last one stays."""
        return float(self.teacher_temperature[min(epoch, len(self.teacher_temperature) - 1)])


def make_schedules(
    settings: SelfDistillationTraining, num_updates: int, updates_per_epoch: int, batch_size: int
) -> SelfDistillationSchedules:
    """Lay out the schedules of a run.

    Args:
        settings: Of the recipe.
        num_updates: Of the run.
        updates_per_epoch: Likewise.
        batch_size: Images of an update, over all processes.

    Raises:
        ValueError: If the run ends before the rise of the learning rate does.
    """
    num_warmup = round(settings.warmup_epochs * updates_per_epoch)
    if num_warmup >= num_updates:
        raise ValueError(
            f"`training.warmup_epochs` is {settings.warmup_epochs}, {num_warmup} updates, but the "
            f"run has {num_updates}; lower it, or train longer."
        )
    rate = settings.learning_rate * batch_size / BASE_BATCH_SIZE
    num_epochs = -(-num_updates // updates_per_epoch)
    rising = settings.warmup_teacher_temperature_epochs
    temperatures = np.full(max(num_epochs, rising), settings.teacher_temperature)
    temperatures[:rising] = np.linspace(
        settings.warmup_teacher_temperature, settings.teacher_temperature, rising
    )
    return SelfDistillationSchedules(
        cosine_schedule(rate, settings.final_learning_rate, num_updates, num_warmup),
        cosine_schedule(settings.weight_decay, settings.final_weight_decay, num_updates),
        cosine_schedule(settings.teacher_momentum, 1.0, num_updates),
        temperatures,
    )


def make_parameter_groups(student: nn.Module) -> list[dict[str, Any]]:
    """Group the trained parameters: the first group decays, biases and vectors do not.

    Tokens and position embeddings decay too, as in the reference.
    """
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            is_vector = parameter.ndim == 1 or name.endswith(".bias")
            (others if is_vector else decaying).append(parameter)
    return [
        {"params": decaying, "has_decay": True},
        {"params": others, "has_decay": False, "weight_decay": 0.0},
    ]


class RateAndDecaySchedule(LRScheduler):
    """Sets learning rate and weight decay of each update.

    Args:
        optimizer: Whose groups say with `has_decay` whether they have one.
        schedules: Of the run.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedules: SelfDistillationSchedules
    ) -> None:
        self._schedules = schedules
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the rate of each group, and set its decay."""
        update = min(self.last_epoch, len(self._schedules.learning_rate) - 1)
        for group in self.optimizer.param_groups:
            if group["has_decay"]:
                group["weight_decay"] = float(self._schedules.weight_decay[update])
        rate: float | Tensor = float(self._schedules.learning_rate[update])
        return [rate] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the schedules, which the recipe makes again."""
        return {"last_epoch": self.last_epoch, "_last_lr": self.get_last_lr()}


def limit_gradients(model: nn.Module, limit: float) -> Tensor:
    """Limit the norm of each tensor's gradient, and return the norm of all before that.

    Query, key and value projections count as the one tensor that they are in the reference.

    Args:
        model: Whose gradients are changed.
        limit: Largest norm; 0 for none.

    Source:
        `clip_gradients` of facebookresearch/dino.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(_FUSED.sub("projections", name), []).append(parameter.grad)
    norms = torch.stack(
        [torch.stack(torch._foreach_norm(gradients)).norm() for gradients in groups.values()]
    )
    if limit > 0:
        factors = (limit / (norms + _EPSILON)).clamp(max=1.0).unbind()
        gradients = [gradient for group in groups.values() for gradient in group]
        spread = [
            factor for factor, group in zip(factors, groups.values(), strict=True) for _ in group
        ]
        torch._foreach_mul_(gradients, spread)
    return norms.norm()
