import pytest
import torch
from torch.nn.functional import cross_entropy, softmax

from conftest import small_config
from sgtr_hf import SgtrForSceneGraphGeneration
from sgtr_hf.losses.knowledge_distillation_loss import (
    knowledge_distillation_losses,
    soft_sigmoid_loss,
    soft_target_loss,
)
from sgtr_hf.losses.scene_graph_distillation_loss import (
    GraphDistillation,
    GraphPredictions,
    check_teacher,
    scene_graph_distillation_losses,
)


def logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def test_soft_targets_have_the_closed_form_gradient():
    student, teacher = logits(0, 6, 5).requires_grad_(), logits(1, 6, 5)
    soft_target_loss(student, teacher, 2.5).sum().backward()
    # T^2 times (softmax(student / T) - softmax(teacher / T)) / T.
    expected = 2.5 * (softmax(student / 2.5, -1) - softmax(teacher / 2.5, -1))
    torch.testing.assert_close(student.grad, expected)


def test_at_high_temperature_the_gradient_compares_logits():
    student, teacher = logits(0, 6, 5).double().requires_grad_(), logits(1, 6, 5).double()
    # In double precision: distributions are nearly even.
    temperature = 1e4
    value = soft_target_loss(student.float(), teacher.float(), 100.0)
    assert torch.isfinite(value).all()
    scaled = torch.log_softmax(student / temperature, -1)
    target = torch.log_softmax(teacher / temperature, -1)
    (temperature**2 * (target.exp() * (target - scaled)).sum(-1)).sum().backward()
    difference = (student - student.mean(-1, keepdim=True)) - (
        teacher - teacher.mean(-1, keepdim=True)
    )
    torch.testing.assert_close(student.grad, difference / 5, rtol=1e-2, atol=1e-3)
    single = logits(0, 6, 5).requires_grad_()
    soft_target_loss(single, teacher.float(), 200.0).sum().backward()
    torch.testing.assert_close(single.grad, (difference / 5).float(), rtol=0.05, atol=0.02)


def test_at_temperature_one_it_is_the_divergence():
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    divergence = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.softmax(-1), reduction="none"
    ).sum(-1)
    torch.testing.assert_close(soft_target_loss(student, teacher, 1.0), divergence)


@pytest.mark.parametrize("loss", [soft_target_loss, soft_sigmoid_loss])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_distributions_cost_nothing_and_others_something(loss, temperature):
    teacher = logits(1, 6, 5)
    torch.testing.assert_close(loss(teacher, teacher, temperature), torch.zeros(6))
    assert (loss(logits(0, 6, 5), teacher, temperature) > 0).all()
    extreme = torch.tensor([[1e4, -1e4, 0.0]])
    assert torch.isfinite(loss(extreme, -extreme, temperature)).all()
    student = extreme.clone().requires_grad_()
    teacher = (-extreme).requires_grad_()
    loss(student, teacher, temperature).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert teacher.grad is None


def test_sigmoids_are_distributions_of_two():
    student, teacher = logits(0, 4, 3), logits(1, 4, 3)
    pairs = [torch.stack((values, torch.zeros_like(values)), -1) for values in (student, teacher)]
    expected = soft_target_loss(*pairs, 3.0).sum(-1)
    torch.testing.assert_close(soft_sigmoid_loss(student, teacher, 3.0), expected)


@pytest.mark.parametrize("soft_weight", [0.0, 0.3, 1.0])
def test_soft_and_hard_targets_are_weighted(soft_weight):
    student, teacher = logits(0, 6, 5), logits(1, 6, 5)
    labels = torch.arange(6) % 5
    losses = knowledge_distillation_losses(student, teacher, labels, 2.0, soft_weight)
    soft, hard = soft_target_loss(student, teacher, 2.0).mean(), cross_entropy(student, labels)
    assert list(losses) == ["loss_soft", "loss_hard"]
    torch.testing.assert_close(losses["loss_soft"], soft_weight * soft)
    torch.testing.assert_close(losses["loss_hard"], (1 - soft_weight) * hard)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"temperature": 0}, "temperature"), ({"soft_weight": 1.5}, "soft_weight"),
     ({"teacher_logits": torch.zeros(6, 4)}, "same classes")],
)  # fmt: skip
def test_mistakes_are_named(change, words):
    arguments = {
        "student_logits": logits(0, 6, 5), "teacher_logits": logits(1, 6, 5),
        "labels": torch.zeros(6).long(), "temperature": 2.0, "soft_weight": 0.5,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        knowledge_distillation_losses(**(arguments | change))


def predictions(seed, images=2, entities=6, queries=5, extra=0):
    """Random graphs of 3 classes and 2 predicates with focal heads; `extra` for softmax ones."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(*shape, generator=generator) * 3

    def boxes(count):
        return torch.rand(images, count, 4, generator=generator) * 0.4 + 0.1

    return GraphPredictions(
        numbers(images, entities, 3 + extra), boxes(entities),
        numbers(images, queries, 2 + extra), numbers(images, queries, 3 + extra), boxes(queries),
        numbers(images, queries, 3 + extra), boxes(queries),
    )  # fmt: skip


def permuted(graph, entity_order, query_order):
    orders = [entity_order] * 2 + [query_order] * 5
    return GraphPredictions(*(field[:, order] for field, order in zip(graph, orders, strict=True)))


ALL = GraphDistillation(temperature=2.0, entity_confidence=0.0, predicate_confidence=0.0)


@pytest.mark.parametrize("kind", ["focal", "softmax"])
def test_a_student_that_says_the_same_in_another_order_has_nothing_to_learn(kind):
    extra = int(kind == "softmax")
    config = small_config({"classification": kind}, predicate_classification=kind)
    teacher = predictions(0, extra=extra)
    student = permuted(teacher, torch.tensor([3, 1, 5, 0, 2, 4]), torch.tensor([4, 2, 0, 1, 3]))
    losses = scene_graph_distillation_losses(config, student, teacher, ALL)
    assert len(losses) == 6
    for name, loss in losses.items():
        assert loss == pytest.approx(0, abs=1e-4), name
    other = predictions(1, extra=extra)
    assert all(
        loss > 0.01
        for loss in scene_graph_distillation_losses(config, other, teacher, ALL).values()
    )


def test_losses_are_means_over_the_sure_nodes_of_each_image():
    config = small_config()
    teacher, student = predictions(0), predictions(1)
    # One sure entity in the first image, none in the second; likewise one predicate.
    teacher.logits.fill_(-5)
    teacher.logits[0, 4, 1] = 5
    teacher.predicate_logits.fill_(-5)
    teacher.predicate_logits[1, 2, 0] = 5
    losses = scene_graph_distillation_losses(config, student, teacher, GraphDistillation())
    target = teacher.logits[0, 4]
    values = soft_sigmoid_loss(student.logits[0], target.expand(6, 3), 2.0)
    found = losses["loss_distilled_entity"] * 2
    [[node]] = (values - found).abs().lt(1e-4).nonzero().tolist()
    distance = (student.pred_boxes[0, node] - teacher.pred_boxes[0, 4]).abs().sum()
    weight = config.detector.box_loss_weight
    torch.testing.assert_close(losses["loss_distilled_box"], weight * distance / 2)
    values = soft_sigmoid_loss(
        student.predicate_logits[1], teacher.predicate_logits[1, 2].expand(5, 2), 2.0
    )
    assert (values - losses["loss_distilled_predicate"] * 2).abs().min() < 1e-4


def test_an_unsure_teacher_teaches_nothing():
    teacher = predictions(0)
    unsure = teacher._replace(
        logits=teacher.logits * 0 - 9, predicate_logits=teacher.predicate_logits * 0 - 9
    )
    student = GraphPredictions(*(field.requires_grad_() for field in predictions(1)))
    losses = scene_graph_distillation_losses(small_config(), student, unsure, GraphDistillation())
    total = torch.stack(list(losses.values())).sum()
    assert total == 0
    total.backward()
    assert all(not field.grad.any() for field in student if field.grad is not None)


def test_a_teacher_with_more_nodes_gives_its_surest():
    config = small_config()
    teacher = predictions(0, entities=20, queries=9)
    student = GraphPredictions(
        *(field.requires_grad_() for field in predictions(1, entities=4, queries=3))
    )
    losses = scene_graph_distillation_losses(config, student, teacher, ALL)
    torch.stack(list(losses.values())).sum().backward()
    # Every node of the student has a partner.
    assert student.logits.grad.abs().sum(-1).gt(0).all()
    assert student.predicate_logits.grad.abs().sum(-1).gt(0).all()


def test_the_outputs_of_models_can_be_distilled(pixel_values):
    torch.manual_seed(0)
    config = small_config({"num_queries": 6})
    teacher = SgtrForSceneGraphGeneration(small_config({"d_model": 64})).eval()
    student = SgtrForSceneGraphGeneration(config)
    check_teacher(student.config, teacher.config)
    with torch.no_grad():
        wanted = GraphPredictions.of(teacher(pixel_values))
    losses = scene_graph_distillation_losses(
        config, GraphPredictions.of(student(pixel_values)), wanted, ALL
    )
    torch.stack(list(losses.values())).sum().backward()
    for name in ("predicate_head", "subject_class_head", "model.detector.class_head"):
        assert student.get_submodule(name).weight.grad.any(), name


def test_a_teacher_of_other_words_is_refused():
    with pytest.raises(ValueError, match="same `id2predicate`"):
        check_teacher(small_config(), small_config(id2predicate={0: "under", 1: "inside"}))
    with pytest.raises(ValueError, match=r"same `detector_config\.classification`"):
        check_teacher(small_config(), small_config({"classification": "softmax"}))
