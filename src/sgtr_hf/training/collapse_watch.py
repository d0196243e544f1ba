"""Tells a teacher that has collapsed from one that knows images apart.

A falling loss says nothing: it falls in a collapse too. N images, K prototypes.
"""

import math
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ..losses.self_distillation_loss import teacher_probabilities


# Share of the largest entropy above which distributions are as good as uniform.
_UNIFORM = 0.5


class TeacherEntropies(NamedTuple):
    """Entropies in nats of the teacher's distributions of many images."""

    of_samples: float
    """H, their mean: small, if the teacher is sure of each image."""
    of_mean: float
    """H_mean, of their mean: near ln K, if it uses all prototypes."""
    num_prototypes: int

    @property
    def gap(self) -> float:
        """How much the distribution tells of the image (mutual information); 0 in a collapse."""
        return self.of_mean - self.of_samples


class EntropyMeter:
    """Adds up over batches and processes.

    Args:
        center: (K,) of the teacher's logits.
        temperature: Of its distributions.
    """

    def __init__(self, center: Tensor, temperature: float) -> None:
        self.center, self.temperature = center, temperature
        # Counted with them, so that one sum over the processes is enough: K, entropy, images.
        self.sums = torch.zeros(len(center) + 2, dtype=torch.float64, device=center.device)

    def add(self, logits: Tensor) -> None:
        """Add the logits (N, K) of a batch."""
        probabilities = teacher_probabilities(logits, self.center, self.temperature)
        tiny = torch.finfo(probabilities.dtype).tiny
        entropy = -(probabilities * probabilities.clamp(min=tiny).log()).sum()
        self.sums[:-2] += probabilities.sum(0)
        self.sums[-2] += entropy
        self.sums[-1] += len(logits)

    def compute(self, accelerator: Accelerator) -> TeacherEntropies:
        """Return the entropies over all processes, every one of which must call it."""
        sums = accelerator.reduce(self.sums, reduction="sum")
        mean, entropy = sums[:-2] / sums[-1], float(sums[-2] / sums[-1])
        of_mean = -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()
        return TeacherEntropies(entropy, float(of_mean), len(mean))


def describe_collapse(entropies: TeacherEntropies, least_gap: float) -> str | None:
    """Return a warning with the usual remedies if the teacher has collapsed, or else None.

    Args:
        entropies: Of many more images than a batch.
        least_gap: In nats.
    """
    if entropies.gap >= least_gap:
        return None
    figures = (
        f"The teacher says nearly the same of every image: H {entropies.of_samples:.2f}, H_mean "
        f"{entropies.of_mean:.2f} of ln K = {math.log(entropies.num_prototypes):.2f}, gap "
        f"{entropies.gap:.2f} nats, below `training.least_entropy_gap` {least_gap}."
    )
    if entropies.of_mean > _UNIFORM * math.log(entropies.num_prototypes):
        return (
            f"{figures} Its distributions are uniform: lower `training.teacher_temperature` "
            "(0.02) and `training.learning_rate`, lengthen `training.warmup_epochs`, keep "
            "`model.fixed_prototype_length`, and for short runs lower `training.teacher_momentum` "
            "(0.99)."
        )
    return (
        f"{figures} Its distributions have one prototype: raise `training.teacher_temperature` "
        "(0.04 to 0.07, by a warm-up), lower `training.learning_rate`, raise "
        "`training.teacher_momentum` and `model.center_momentum`, and train with larger batches."
    )
