"""Knowledge distillation (Hinton et al. 2015): a model learns the distributions of a larger one.

B images, C classes, ... any further dimensions.
"""

import torch
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    log_softmax,
    logsigmoid,
)


def soft_target_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL(teacher at T || student at T) of softmax distributions.

    The divergence, unlike the cross entropy, is 0 for equal distributions; the gradients are the
    same. They shrink with 1 / T^2, which the factor makes up for.

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C); no gradient flows into it.
        temperature: T, above 0. Large ones compare logits: the gradient nears the difference of
            the logits, less their means, over C.

    Returns:
        (...), in nats times T^2, float32.
    """
    student = log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def soft_sigmoid_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Compute T^2 KL(teacher at T || student at T) of C independent yes-or-no distributions.

    For focal heads, whose classes do not add up to 1 (ours).

    Args:
        student_logits: (..., C).
        teacher_logits: (..., C); no gradient flows into it.
        temperature: T, above 0.

    Returns:
        (...) sum over the classes, float32.
    """
    student = student_logits.float() / temperature
    teacher = teacher_logits.detach().float() / temperature
    probabilities = teacher.sigmoid()
    entropy = -(probabilities * logsigmoid(teacher) + (1 - probabilities) * logsigmoid(-teacher))
    crossed = binary_cross_entropy_with_logits(student, probabilities, reduction="none")
    return temperature**2 * (crossed - entropy).sum(-1)


def knowledge_distillation_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    soft_weight: float,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Compute the weighted losses of a classifier that learns from a larger one.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        labels: (B,) annotated classes.
        temperature: T, above 0.
        soft_weight: Weight of the soft targets, from 0 (annotations alone) to 1 (teacher alone).
        label_smoothing: Share of the hard targets that is spread over all classes.

    Returns:
        `loss_soft` = soft_weight T^2 KL and `loss_hard` = (1 - soft_weight) cross entropy, each
        the mean over images. Their sum is the loss.

    Raises:
        ValueError: If the shapes of the logits differ, or a setting is out of range.
    """
    check_distillation(temperature, soft_weight)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student and teacher must have the same classes, got logits of shapes "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    soft = soft_target_loss(student_logits, teacher_logits, temperature).mean()
    hard = cross_entropy(student_logits.float(), labels, label_smoothing=label_smoothing)
    return {"loss_soft": soft_weight * soft, "loss_hard": (1 - soft_weight) * hard}


def check_distillation(temperature: float, soft_weight: float) -> None:
    """Reject settings out of range.

    Raises:
        ValueError: If the temperature is not above 0, or the weight not between 0 and 1.
    """
    if not 0 < temperature < torch.inf:
        raise ValueError(f"`temperature` must be above 0 and finite, got {temperature}.")
    if not 0 <= soft_weight <= 1:
        raise ValueError(f"`soft_weight` must be between 0 and 1, got {soft_weight}.")
