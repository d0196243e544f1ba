"""The recipes of trainings on images that ship."""

import dataclasses
from pathlib import Path

import pytest
import torch

from sgtr_hf import DinoVitConfig, DinoVitForPreTraining
from sgtr_hf.training.image_recipe import IMAGE_RECIPES
from sgtr_hf.training.recipe import load_recipe
from sgtr_hf.training.self_distillation_schedules import make_schedules
from sgtr_hf.training.setup_run import make_model


RECIPES = Path(__file__).parents[1] / "recipes"
WITHOUT_LABELS = sorted(path.stem for path in RECIPES.glob("dino_*.yaml"))
UPDATES_PER_EPOCH = 10


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_recipes_without_labels_fit_together(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", kinds=IMAGE_RECIPES)
    with torch.device("meta"):
        model = DinoVitForPreTraining(DinoVitConfig(**recipe.model))
    # Crops are whole patches, and the images that positions are made for are the larger crops,
    # unless crops are smaller to make more of them.
    crops = recipe.data.crops
    for size in (crops.global_size, *([crops.local_size] if crops.num_local_crops else [])):
        assert size % model.config.patch_size == 0
    image_size = {"dino_cifar10": 32, "dino_tabletop": 112}.get(name, crops.global_size)
    assert model.config.image_size == image_size >= crops.global_size
    training = recipe.training
    schedules = make_schedules(
        training, training.epochs * UPDATES_PER_EPOCH, UPDATES_PER_EPOCH, batch_size=256
    )
    assert schedules.learning_rate.max() == pytest.approx(training.learning_rate)
    assert schedules.temperature(training.epochs) == training.teacher_temperature
    assert Path(training.output_dir).name == name


def test_the_small_network_has_its_size():
    config = load_recipe(RECIPES / "dino_cifar10.yaml", kinds=IMAGE_RECIPES).model
    with torch.device("meta"):
        student = DinoVitForPreTraining(DinoVitConfig(**config)).student.model
    assert 0.5e6 < sum(parameter.numel() for parameter in student.parameters()) < 3e6


@pytest.mark.parametrize("name", ["imagenet_vits16", "cifar10"])
def test_recipes_with_labels_name_the_same_network(name):
    """So that one can be fine-tuned from the other, and both be compared."""
    labelled = load_recipe(RECIPES / f"classifier_{name}.yaml", kinds=IMAGE_RECIPES)
    without = load_recipe(RECIPES / f"dino_{name}.yaml", kinds=IMAGE_RECIPES)
    mine, other = DinoVitConfig(**labelled.model), DinoVitConfig(**without.model)
    for field in ("image_size", "patch_size", "convolutional_stem", "d_model",
                  "num_hidden_layers", "num_attention_heads", "feed_forward_dim"):  # fmt: skip
        assert getattr(mine, field) == getattr(other, field), field


def test_the_detector_takes_the_backbone_of_its_pretraining(tmp_path):
    torch.manual_seed(0)
    pretraining = load_recipe(RECIPES / "dino_tabletop.yaml", kinds=IMAGE_RECIPES)
    teacher = DinoVitForPreTraining(DinoVitConfig(**pretraining.model))
    teacher.save_pretrained(tmp_path)
    recipe = load_recipe(RECIPES / "detr_tabletop_dino.yaml")
    assert recipe.backbone_weights == f"{pretraining.training.output_dir}/final"
    recipe = dataclasses.replace(recipe, backbone_weights=str(tmp_path))
    detector = make_model(recipe, {0: "cup"}, {})
    for name, tensor in teacher.model.state_dict().items():
        assert detector.model.backbone.model.state_dict()[name].equal(tensor), name
