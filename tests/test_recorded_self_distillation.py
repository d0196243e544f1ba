"""A step of self-distillation against the original's recorded one; `make fidelity` runs this."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recorded_weights import recorded_checkpoint
from sgtr_hf import DinoVitConfig, DinoVitForPreTraining
from sgtr_hf.hub.checkpoint_conversion import convert_checkpoint
from sgtr_hf.training.self_distillation_schedules import limit_gradients, make_parameter_groups


pytestmark = pytest.mark.fidelity
# Of a tensor's largest absolute value.
TOLERANCE = 1e-5
# Epoch 5 of a rise from 0.04 to 0.07 over 30.
TEMPERATURE = 0.04 + 0.03 * 5 / 29
HEAD = {
    "projection.0": "mlp.0", "projection.2": "mlp.2", "projection.4": "mlp.4",
    "prototypes.length": "last_layer.weight_g", "prototypes.direction": "last_layer.weight_v",
}  # fmt: skip
GRADIENTS = {
    "backbone.cls_token": "model.embedding.class_token",
    "backbone.norm.weight": "model.norm.weight",
    "head.mlp.0.bias": "head.projection.0.bias",
}


def assert_equal(found, recorded, what):
    assert found.shape == recorded.shape, what
    difference = ((found - recorded).abs().max() / recorded.abs().max()).item()
    assert difference < TOLERANCE, f"{what} differs by {difference:.1e}"


def part_of(weights, prefix):
    return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}


def fill(network, weights):
    backbone = convert_checkpoint(part_of(weights, "backbone."), "dino").model
    network.model.load_state_dict(backbone.state_dict())
    head = part_of(weights, "head.")
    state = {}
    for name in network.head.state_dict():
        ours = next(key for key in HEAD if name.startswith(key))
        state[name] = head.pop(HEAD[ours] + name.removeprefix(ours))
    assert not head
    network.head.load_state_dict(state)


def gradients(student):
    """Recorded names, and our gradients; the original has one matrix for three."""
    parameters = dict(student.named_parameters())
    attention = "model.layers.0.self_attention"
    found = {name: parameters[ours].grad.clone() for name, ours in GRADIENTS.items()}
    found["backbone.blocks.0.attn.qkv.weight"] = torch.cat(
        [parameters[f"{attention}.{n}_projection.weight"].grad for n in ("query", "key", "value")]
    )
    return found


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_step_equals_the_recorded_one(backend):
    name = os.environ.get("SGTR_GOLDEN_DIR")
    if name is None:
        pytest.fail("Name the folder of recorded figures in SGTR_GOLDEN_DIR.")
    folder = Path(name)
    recorded = load_file(folder / "dino_step.safetensors")
    weights = recorded_checkpoint(folder / "dino_step.keys.json")
    config = DinoVitConfig(num_prototypes=1024, attn_implementation=backend)
    model = DinoVitForPreTraining(config).train()
    fill(model, part_of(weights, "teacher."))
    fill(model.student, part_of(weights, "student.module."))
    for network in (model, model.student):
        network.head.prototypes.length.data.fill_(1)
    model.center.copy_(recorded["center_before"][0])
    views = torch.stack([recorded[f"crop.{number}"] for number in (0, 1)])
    local = torch.stack([recorded[f"crop.{number}"] for number in range(2, 6)])

    output = model(views, local, teacher_temperature=TEMPERATURE)
    assert_equal(output.student_logits.flatten(0, 1), recorded["student_output"], "student")
    assert_equal(output.teacher_logits.flatten(0, 1), recorded["teacher_output"], "teacher")
    assert output.loss.item() == pytest.approx(recorded["loss"].item(), rel=TOLERANCE)

    output.loss.backward()
    for name, gradient in gradients(model.student).items():
        assert_equal(gradient, recorded[f"gradient.{name}"], name)
    limit_gradients(model, 3.0)
    for name, gradient in gradients(model.student).items():
        assert_equal(gradient, recorded[f"clipped_gradient.{name}"], f"clipped {name}")

    model.update_teacher(0.996)
    assert_equal(model.center, recorded["center_after"][0], "center")
    assert_equal(model.model.norm.weight, recorded["ema.backbone.norm.weight"], "average")
    # Of the 157 tensors of the original, 55 decay; three projections are one there.
    decaying, others = (len(group["params"]) for group in make_parameter_groups(model))
    assert (decaying - 2 * 12, others - 2 * 12) == (55, 102)
