"""Parameter groups and learning rate schedules."""

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .recipe import TrainingSettings


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.AdamW:
    """AdamW with a rate of its own for the backbone, and weight decay on matrices only."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for is_backbone, decays, parameter in _trainable(model):
        groups.setdefault((is_backbone, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": settings.backbone_learning_rate if is_backbone else settings.learning_rate,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (is_backbone, decays), parameters in groups.items()
        ]
    )


def clip_each_gradient(model: nn.Module, limit: float) -> None:
    """Scale every gradient whose norm is larger down to the limit, each on its own, as SGTR does.

    Args:
        model: Its gradients are changed in place.
        limit: Above 0.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    # As `clip_grad_norm_` of torch, which adds as much to the norm.
    factors = (limit / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()))


def make_schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, num_updates: int
) -> LambdaLR:
    """The factor on the learning rates by update: a linear rise, then the recipe's fall."""

    def factor(update: int) -> float:
        if update < settings.warmup_steps:
            return (update + 1) / settings.warmup_steps
        progress = (update - settings.warmup_steps) / max(num_updates - settings.warmup_steps, 1)
        if settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        # DETR's single drop, at the same share of the run.
        return 0.1 if settings.schedule == "step" and progress >= 0.8 else 1.0  # noqa: PLR2004

    return LambdaLR(optimizer, factor)


def _trainable(model: nn.Module) -> Iterator[tuple[bool, bool, nn.Parameter]]:
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield (
                ".backbone." in f".{name}",
                parameter.ndim > 1 and name not in embeddings,
                parameter,
            )
