import json

import numpy as np
import pytest
import torch
from torch import nn

from make_fixtures import FIXTURES
from sgtr_hf import DinoVitConfig, DinoVitForPreTraining
from sgtr_hf.training.image_recipe import SelfDistillationTraining
from sgtr_hf.training.self_distillation_schedules import (
    RateAndDecaySchedule,
    cosine_schedule,
    limit_gradients,
    make_parameter_groups,
    make_schedules,
)


def make_settings(**fields):
    defaults = {"epochs": 4, "warmup_epochs": 1.0}
    return SelfDistillationTraining("run", **(defaults | fields))


def tiny_config(**fields):
    defaults = {
        "image_size": 16, "patch_size": 4, "d_model": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "feed_forward_dim": 32, "num_prototypes": 20,
        "head_hidden_dim": 16, "head_bottleneck_dim": 8,
    }  # fmt: skip
    return DinoVitConfig(**(defaults | fields))


def test_schedules_equal_the_recorded_ones():
    recorded = json.loads((FIXTURES / "dino_schedules.json").read_text())
    schedules = make_schedules(make_settings(), 20, 5, batch_size=256)
    for found, name in (
        (schedules.learning_rate, "lr"),
        (schedules.weight_decay, "weight_decay"),
        (schedules.teacher_momentum, "teacher_momentum"),
    ):
        np.testing.assert_allclose(found, recorded[name], rtol=1e-12, atol=1e-18)
    settings = make_settings(
        epochs=100, teacher_temperature=0.07, warmup_teacher_temperature_epochs=30
    )
    temperatures = make_schedules(settings, 500, 5, batch_size=256).teacher_temperature
    np.testing.assert_allclose(temperatures, recorded["teacher_temperature_per_epoch"], rtol=1e-12)


def test_the_rate_grows_with_the_batch_and_its_end_does_not():
    schedules = make_schedules(make_settings(), 20, 5, batch_size=1024)
    assert schedules.learning_rate.max() == pytest.approx(2e-3)
    assert cosine_schedule(2e-3, 1e-6, 100_000)[-1] == pytest.approx(1e-6, rel=1e-3)


def test_the_last_temperature_stays():
    schedules = make_schedules(make_settings(), 20, 5, batch_size=256)
    assert schedules.temperature(100) == pytest.approx(0.04)


def test_a_rise_longer_than_the_run_is_an_error():
    with pytest.raises(ValueError, match=r"warmup_epochs.*20 updates"):
        make_schedules(make_settings(warmup_epochs=4.0), 20, 5, batch_size=256)


def test_matrices_and_tokens_decay_and_nothing_else():
    model = DinoVitForPreTraining(tiny_config())
    decaying, others = make_parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].startswith("student.") for p in decaying["params"] + others["params"])
    assert all(p.ndim == 1 for p in others["params"])
    tokens = {"student.model.embedding.class_token", "student.model.embedding.position"}
    assert tokens <= {names[id(p)] for p in decaying["params"]}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(decaying["params"]) + len(others["params"]) == len(trained)
    # The length of prototypes is fixed, unless asked for.
    free = make_parameter_groups(DinoVitForPreTraining(tiny_config(fixed_prototype_length=False)))
    assert len(free[0]["params"]) == len(decaying["params"]) + 1


def test_rate_and_decay_follow_their_schedules_and_resume():
    schedules = make_schedules(make_settings(), 20, 5, batch_size=256)
    optimizer = torch.optim.AdamW(make_parameter_groups(nn.Linear(3, 2)))
    schedule = RateAndDecaySchedule(optimizer, schedules)
    for update in range(12):
        first, second = optimizer.param_groups
        assert first["lr"] == second["lr"] == pytest.approx(schedules.learning_rate[update])
        assert first["weight_decay"] == pytest.approx(schedules.weight_decay[update])
        assert second["weight_decay"] == 0
        optimizer.step()
        schedule.step()
    resumed = torch.optim.AdamW(make_parameter_groups(nn.Linear(3, 2)))
    again = RateAndDecaySchedule(resumed, schedules)
    again.load_state_dict(schedule.state_dict())
    resumed.step()
    again.step()
    assert again.get_last_lr()[0] == pytest.approx(schedules.learning_rate[13])


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("query", "key", "value"):
            setattr(self, f"{name}_projection", nn.Linear(4, 4))
        self.output_projection = nn.Linear(4, 4)


def test_gradients_are_limited_one_by_one_and_projections_together():
    model = Projections()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = limit_gradients(model, 2.0)
    assert norm.item() == pytest.approx(
        torch.cat([g.flatten() for g in before.values()]).norm().item(), rel=1e-6
    )
    fused = torch.cat([before[f"{name}_projection.weight"] for name in ("query", "key", "value")])
    factor = min(2.0 / (fused.norm().item() + 1e-6), 1)
    assert factor < 1
    torch.testing.assert_close(
        model.key_projection.weight.grad, before["key_projection.weight"] * factor
    )
    small = before["output_projection.bias"]
    assert small.norm() < 2
    assert model.output_projection.bias.grad.equal(small)
    # 0 is no limit.
    kept = model.key_projection.weight.grad.clone()
    limit_gradients(model, 0.0)
    assert model.key_projection.weight.grad.equal(kept)
