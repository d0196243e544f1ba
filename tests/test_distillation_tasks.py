import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from sgtr_hf import (
    DinoVitConfig,
    DinoVitForImageClassification,
    DinoVitImageProcessor,
    SgtrForSceneGraphGeneration,
    SgtrImageProcessor,
)
from sgtr_hf.losses.knowledge_distillation_loss import knowledge_distillation_losses
from sgtr_hf.training.checkpoints import Progress
from sgtr_hf.training.distillation_settings import DistillationSettings
from sgtr_hf.training.image_recipe import IMAGE_RECIPES
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.recipe import load_recipe
from sgtr_hf.training.tasks.task_choice import make_distillation_task, make_task
from test_self_supervision_features import COLORS, color_picture
from tiny_training_run import SCENE_GRAPH, make_recipe, write_squares


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def teacher(squares, tmp_path_factory):
    """A larger model of the squares, untrained."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = make_recipe(squares, folder, task="scene_graph", model={"feed_forward_dim": 64})
    torch.manual_seed(0)
    task = make_task(recipe, Accelerator(cpu=True))
    task.make_model().save_pretrained(folder)
    task.image_processor.save_pretrained(folder)
    return folder


def distillation_recipe(squares, output, teacher, soft_weight=0.5, **training):
    recipe = make_recipe(squares, output, task="scene_graph", **training)
    recipe.distillation = DistillationSettings(
        str(teacher), soft_weight=soft_weight, entity_confidence=0.0, predicate_confidence=0.0
    )
    return recipe


def losses_of(recipe):
    """Losses of the first batch, with the student that the recipe makes."""
    torch.manual_seed(0)
    task = make_task(recipe, Accelerator(cpu=True))
    student = task.make_model()
    batch = next(iter(task.training_loader(student)))
    batch |= task.prepare_update(student, [batch])
    torch.manual_seed(1)
    # Without dropout, and with the noise of the denoising queries drawn from the same seed.
    return task.compute_losses(student.eval(), batch, Progress())


def test_losses_of_annotations_and_teacher_are_weighted(squares, teacher, tmp_path):
    plain, half, soft = (
        losses_of(distillation_recipe(squares, tmp_path, teacher, weight))
        for weight in (0.0, 0.5, 1.0)
    )
    assert not [name for name in plain if "distilled" in name]
    distilled = [name for name in soft if "distilled" in name]
    assert len(distilled) == 6
    for name in half:
        if name != "loss":
            whole = soft[name] if name in distilled else plain[name]
            torch.testing.assert_close(half[name], whole / 2)
    torch.testing.assert_close(half["loss"], (plain["loss"] + soft["loss"]) / 2)
    assert soft["loss"] > 0


def test_a_student_that_is_its_teacher_has_nothing_to_learn(squares, teacher, tmp_path):
    recipe = distillation_recipe(squares, tmp_path, teacher, 1.0)
    recipe.pretrained_model, recipe.model, recipe.image_processor = str(teacher), {}, {}
    losses = losses_of(recipe)
    for name in ("entity", "predicate", "subject", "object", "box", "giou"):
        assert losses[f"loss_distilled_{name}"] < 1e-4, name


def test_a_run_logs_what_was_learnt_from_the_teacher(squares, teacher, tmp_path):
    recipe = distillation_recipe(squares, tmp_path, teacher, max_steps=4)
    recipe.image_processor = {}
    Trainer(recipe).run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert training
    assert all(line["loss_distilled_predicate"] > 0 for line in training)
    student = SgtrForSceneGraphGeneration.from_pretrained(tmp_path / "final")
    assert student.config.feed_forward_dim == SCENE_GRAPH["feed_forward_dim"]
    # The recipe has none, so the teacher's image processor serves.
    assert dict(SgtrImageProcessor.from_pretrained(tmp_path / "final").size) == {
        "height": 64, "width": 64,
    }  # fmt: skip


CLASSIFIER = {
    "image_size": 16, "patch_size": 8, "d_model": 24, "num_hidden_layers": 2,
    "num_attention_heads": 3, "feed_forward_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Pictures of three classes, in a folder a split."""
    folder = tmp_path_factory.mktemp("colors")
    for split, count in (("train", 4), ("test", 2)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                path = folder / split / name / f"{number}.png"
                color_picture(color, number, (16, 16)).save(path)
    return folder


def save_classifier(folder, names=("blue", "green", "red"), **processor):
    torch.manual_seed(0)
    fields = CLASSIFIER | {"d_model": 48, "id2label": dict(enumerate(names))}
    DinoVitForImageClassification(DinoVitConfig(**fields)).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    DinoVitImageProcessor(**(sizes | processor)).save_pretrained(folder)
    return folder


def classification_recipe(colors, folder, teacher, *overrides):
    entries = {
        "task": "classification",
        "distillation": {"teacher": str(teacher), "temperature": 2.0, "soft_weight": 0.75},
        "data": {"path": str(colors), "validation_split": "test", "num_workers": 0},
        "model": CLASSIFIER,
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 3, "batch_size": 4, "log_every": 1,
            "num_threads": 1,
        },
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(entries))
    return load_recipe(folder / "recipe.yaml", overrides, IMAGE_RECIPES)


def test_a_classifier_learns_from_a_larger_one(colors, tmp_path):
    teacher = save_classifier(tmp_path / "teacher")
    recipe = classification_recipe(colors, tmp_path, teacher)
    task = make_task(recipe, Accelerator(cpu=True))
    student = task.make_model().eval()
    batch = next(iter(task.training_loader(student)))
    losses = task.compute_losses(student, batch, Progress())
    with torch.no_grad():
        wanted = DinoVitForImageClassification.from_pretrained(teacher)(batch["pixel_values"])
    expected = knowledge_distillation_losses(
        student(batch["pixel_values"]).logits, wanted.logits, batch["labels"], 2.0, 0.75
    )
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss)
    torch.testing.assert_close(losses["loss"], losses["loss_soft"] + losses["loss_hard"])
    Trainer(recipe).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss_soft"] > 0 for line in lines if "loss_soft" in line] == [True] * 3
    plain = classification_recipe(colors, tmp_path, teacher, "distillation.soft_weight=0")
    losses = make_task(plain, Accelerator(cpu=True)).compute_losses(student, batch, Progress())
    assert "loss_soft" not in losses


def test_a_teacher_of_other_classes_or_pixels_is_refused(colors, tmp_path):
    accelerator = Accelerator(cpu=True)
    teacher = save_classifier(tmp_path / "words", names=("a", "b", "c"))
    task = make_task(classification_recipe(colors, tmp_path, teacher), accelerator)
    with pytest.raises(ValueError, match="they must be the same"):
        task.make_model()
    teacher = save_classifier(tmp_path / "pixels", image_mean=[0.1, 0.2, 0.3])
    recipe = classification_recipe(colors, tmp_path, teacher)
    recipe.image_processor = {"crop_size": {"height": 16, "width": 16}}
    with pytest.raises(ValueError, match=r"`image_processor\.image_mean` must be"):
        make_task(recipe, accelerator)


def test_a_teacher_of_transformers_needs_pictures_of_one_size(colors, tmp_path):
    names = {0: "blue", 1: "green", 2: "red"}
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "teacher")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "teacher")
    recipe = classification_recipe(colors, tmp_path, tmp_path / "teacher")
    Trainer(recipe).run()
    # Without a crop of its own, the student's images have the size of the teacher's.
    other = copy.deepcopy(recipe)
    other.image_processor = {"crop_size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3,
                             "image_std": [0.5] * 3}  # fmt: skip
    with pytest.raises(ValueError, match=r"pictures of \(16, 16\) pixels.*got \(8, 8\)"):
        make_task(other, Accelerator(cpu=True))
    ViTImageProcessor(size={"shortest_edge": 16}).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="must make pictures of one size"):
        make_task(recipe, Accelerator(cpu=True))


def test_mistakes_are_named(squares, teacher, tmp_path):
    accelerator = Accelerator(cpu=True)
    recipe = distillation_recipe(squares, tmp_path, teacher)
    other = copy.deepcopy(recipe)
    other.image_processor = {"size": {"height": 32, "width": 32}}
    with pytest.raises(ValueError, match=r"`image_processor\.size` must be"):
        make_task(other, accelerator)
    without = copy.deepcopy(recipe)
    without.distillation = DistillationSettings()
    with pytest.raises(ValueError, match=r"lacks `distillation\.teacher`"):
        make_distillation_task(without, accelerator)
    detection = make_recipe(squares, tmp_path)
    detection.distillation = recipe.distillation
    with pytest.raises(ValueError, match="must be null with `task: detection`"):
        make_task(detection, accelerator)
    with pytest.raises(ValueError, match="`soft_weight` must be between 0 and 1"):
        DistillationSettings(soft_weight=2)
    with pytest.raises(ValueError, match=r"distillation\.entity_confidence"):
        DistillationSettings(entity_confidence=-1)


def test_the_recipes_of_this_package_are_read():
    for name in ("classifier_cifar10_teacher", "distill_cifar10"):
        recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml", kinds=IMAGE_RECIPES)
        DinoVitConfig(**recipe.model)
    recipe = load_recipe(ROOT / "recipes" / "distill_sgtr_tabletop.yaml")
    assert recipe.distillation.teacher == "src/sgtr_hf/assets/sgtr-tabletop"
    entries = yaml.safe_load((ROOT / "recipes" / "distill_sgtr_tabletop.yaml").read_text())
    assert entries["distillation"]["soft_weight"] > 0
    changed = load_recipe(
        ROOT / "recipes" / "distill_sgtr_tabletop.yaml", ["distillation.soft_weight=0"]
    )
    assert changed.distillation.soft_weight == 0


def test_the_script_says_what_is_missing(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    entries = yaml.safe_load((ROOT / "recipes" / "distill_sgtr_tabletop.yaml").read_text())
    del entries["distillation"]
    entries["training"]["output_dir"] = str(tmp_path / "run")
    recipe.write_text(yaml.safe_dump(entries))
    command = [sys.executable, str(ROOT / "scripts" / "distill.py"), str(recipe)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "lacks `distillation.teacher`" in found.stderr
