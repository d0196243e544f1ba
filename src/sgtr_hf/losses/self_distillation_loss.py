"""The loss of DINO (Caron et al. 2021): a student says of every crop what a teacher says of others.

V views (crops) that the student sees, the first G of which the teacher sees too; B images, K
prototypes.
"""

import torch
from torch import Tensor, distributed


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Centre and sharpen the teacher's logits.

    Args:
        logits: (..., K).
        center: (K,) their running mean: taken away, no prototype can win everywhere.
        temperature: Below the student's, so that targets are sharper than what they are compared
            with: not all prototypes can be said alike.

    Returns:
        (..., K) float32 distributions.
    """
    return ((logits.float() - center) / temperature).softmax(dim=-1)


def self_distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    center: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor]:
    """Compute the mean cross entropy over pairs of different views of an image.

    Args:
        student_logits: (V, B, K), the views of the teacher first.
        teacher_logits: (G, B, K); no gradient flows into it.
        center: (K,) of the teacher's logits.
        student_temperature: Above 0.
        teacher_temperature: Above 0.

    Returns:
        The loss, and the mean entropy of the teacher's distributions, both scalars in nats.

    Raises:
        ValueError: If there is only one view, which has no other to be compared with.

    Source:
        `DINOLoss` of facebookresearch/dino. As -sum p log q = logsumexp(z) - sum p z, neither
        log q nor a product of the size of the logits is ever held.
    """
    num_student, num_teacher = len(student_logits), len(teacher_logits)
    num_pairs = num_teacher * (num_student - 1)
    if num_pairs < 1:
        raise ValueError(
            "Self-distillation compares different views of an image, and there is only one; give "
            "two global crops, or a global and a local one."
        )
    targets = teacher_probabilities(teacher_logits.detach(), center, teacher_temperature)
    scaled = student_logits.float() / student_temperature
    # Autocast would round the products.
    with torch.autocast(scaled.device.type, enabled=False):
        agreement = torch.einsum("gbk,vbk->gv", targets, scaled)
    spread = scaled.logsumexp(dim=-1).sum(1)
    # A view is no target of itself: the pairs (g, g) are left out.
    total = (spread - agreement).sum() - (spread[:num_teacher] - agreement.diagonal()).sum()
    entropy = -(targets * targets.clamp(min=torch.finfo(targets.dtype).tiny).log()).sum(-1).mean()
    return total / (num_pairs * student_logits.shape[1]), entropy


def updated_center(center: Tensor, mean_logits: Tensor, momentum: float) -> Tensor:
    """Move the centre towards the mean of the teacher's logits over all processes.

    Args:
        center: (K,).
        mean_logits: (K,) mean over this process's views and images; processes have as many.
        momentum: Share of the centre that stays.
    """
    mean = mean_logits.float()
    if distributed.is_available() and distributed.is_initialized():
        mean = mean.clone()
        distributed.all_reduce(mean)
        mean /= distributed.get_world_size()
    return center * momentum + mean * (1 - momentum)
