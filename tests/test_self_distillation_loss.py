import math

import pytest
import torch
from safetensors.torch import load_file

from make_fixtures import FIXTURES
from sgtr_hf.losses.self_distillation_loss import (
    self_distillation_loss,
    teacher_probabilities,
    updated_center,
)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_loss(student, teacher, center, student_temperature, teacher_temperature):
    """The definition, pair by pair."""
    terms = []
    for g, target in enumerate(teacher):
        p = torch.softmax((target - center) / teacher_temperature, dim=-1)
        for v, prediction in enumerate(student):
            if v != g:
                log_q = torch.log_softmax(prediction / student_temperature, dim=-1)
                terms.append(-(p * log_q).sum(-1).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("views", "teacher_views"), [(2, 2), (6, 2), (3, 1)])
def test_loss_and_gradient_are_those_of_the_definition(views, teacher_views):
    student = random_logits(views, 5, 11).requires_grad_()
    teacher = random_logits(teacher_views, 5, 11, seed=1).requires_grad_()
    center = random_logits(11, seed=2) * 0.1
    loss, _ = self_distillation_loss(
        student, teacher, center, student_temperature=0.1, teacher_temperature=0.04
    )
    loss.backward()
    found, student.grad = student.grad, None
    expected = slow_loss(student, teacher.detach(), center, 0.1, 0.04)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(found, student.grad, rtol=1e-5, atol=1e-7)
    assert teacher.grad is None


def test_the_entropy_is_the_teachers():
    teacher = random_logits(2, 3, 7)
    _, entropy = self_distillation_loss(
        random_logits(2, 3, 7, seed=1), teacher, torch.zeros(7),
        student_temperature=0.1, teacher_temperature=0.5,
    )  # fmt: skip
    expected = torch.distributions.Categorical(logits=teacher / 0.5).entropy().mean()
    assert entropy.item() == pytest.approx(expected.item(), rel=1e-5)
    # Distributions with one prototype have none, and are no NaN.
    sure = torch.zeros(2, 3, 7)
    sure[..., 0] = 1e4
    loss, entropy = self_distillation_loss(
        sure, sure, torch.zeros(7), student_temperature=0.1, teacher_temperature=0.04
    )
    assert (loss.item(), entropy.item()) == (0.0, 0.0)


def test_equal_logits_cost_the_logarithm_of_the_prototypes():
    same = torch.zeros(4, 2, 16)
    loss, entropy = self_distillation_loss(
        same, same[:2], torch.zeros(16), student_temperature=0.1, teacher_temperature=0.04
    )
    assert loss.item() == pytest.approx(math.log(16), rel=1e-6)
    assert entropy.item() == pytest.approx(math.log(16), rel=1e-6)


def test_a_single_view_is_an_error():
    logits = random_logits(1, 2, 4)
    with pytest.raises(ValueError, match="only one"):
        self_distillation_loss(
            logits, logits, torch.zeros(4), student_temperature=0.1, teacher_temperature=0.04
        )


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = random_logits(3, 2, 8).bfloat16(), random_logits(2, 2, 8, seed=1).bfloat16()
    arguments = {"student_temperature": 0.1, "teacher_temperature": 0.04}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = self_distillation_loss(student, teacher, torch.zeros(8), **arguments)
    exact, _ = self_distillation_loss(student.float(), teacher.float(), torch.zeros(8), **arguments)
    assert loss.equal(exact)


def test_the_center_sharpens_what_wins_everywhere():
    logits = random_logits(100, 5) + torch.tensor([10.0, 0, 0, 0, 0])
    assert teacher_probabilities(logits, torch.zeros(5), 1.0).mean(0)[0] > 0.9
    center = logits.mean(0)
    for _ in range(200):
        center = updated_center(center, logits.mean(0), 0.9)
    assert teacher_probabilities(logits, center, 1.0).mean(0).max() < 0.3


def test_recorded_loss_and_center():
    recorded = load_file(FIXTURES / "self_distillation.safetensors")
    student = recorded["student_output"].unflatten(0, (6, 2))
    teacher = recorded["teacher_output"].unflatten(0, (2, 2))
    before = recorded["center_before"][0]
    # Epoch 5 of a rise from 0.04 to 0.07 over 30.
    loss, _ = self_distillation_loss(
        student, teacher, before,
        student_temperature=0.1, teacher_temperature=0.04 + 0.03 * 5 / 29,
    )  # fmt: skip
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=1e-5)
    after = updated_center(before, teacher.mean((0, 1)), 0.9)
    torch.testing.assert_close(after, recorded["center_after"][0], rtol=1e-5, atol=1e-7)
