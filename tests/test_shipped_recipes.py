"""Recipes and configurations that ship can be read, and what they describe can be built."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from transformers import ResNetConfig, ResNetForImageClassification

from sgtr_hf import SgtrConfig, SgtrForSceneGraphGeneration
from sgtr_hf.training.optimization import make_optimizer
from sgtr_hf.training.recipe import load_recipe
from sgtr_hf.training.setup_run import _augmentation, make_image_processor, make_model
from tiny_training_run import ENTITIES, PREDICATES, make_recipe


ROOT = Path(__file__).parents[1]

RECIPES = sorted(ROOT.glob("recipes/*_r[0-9]*.yaml"))
# Entities and predicates of each set.
SIZES = {"coco": (91, 0), "vg150": (150, 50), "open_images": (601, 30), "psg": (133, 56)}


def names(count, kind):
    return {index: f"{kind} {index}" for index in range(count)}


def build(recipe, key):
    """The model without memory for its weights, and without those of others."""
    recipe.backbone_weights = None
    if recipe.detector is not None:
        detector = load_recipe(ROOT / f"recipes/detr_{key}_r101.yaml").model
        recipe.detector, recipe.model["detector_config"] = None, detector
        recipe.image_processor = {"size": {"shortest_edge": 600, "longest_edge": 1000}}
        recipe.model.pop("freeze_detector", None)
    num_entities, num_predicates = SIZES[key]
    with torch.device("meta"):
        return make_model(recipe, names(num_entities, "entity"), names(num_predicates, "predicate"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_describes_model_optimizer_and_data(path):
    recipe = load_recipe(path)
    key = next(key for key in SIZES if key in path.stem)
    model = build(recipe, key)
    # As many as ResNet-50 or -101 and the transformers have.
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert 38 < millions < 110
    optimizer = make_optimizer(model, recipe.training)
    rates = {group["lr"] for group in optimizer.param_groups}
    assert rates == {recipe.training.learning_rate, recipe.training.backbone_learning_rate}
    assert make_image_processor(recipe).size["shortest_edge"] >= 600
    assert _augmentation(recipe.data, {0: "on"}).resize_longest_side in (1000, 1333)
    assert path.stem in recipe.training.output_dir


def test_there_are_recipes_for_every_set_and_model():
    stems = {path.stem for path in RECIPES}
    for key in ("vg150", "open_images", "psg"):
        assert {f"sgtr_{key}_r101", f"sgtr_plus_{key}_r101", f"detr_{key}_r101"} <= stems
    assert "detr_coco_r50" in stems


def test_every_other_recipe_is_read():
    for path in ROOT.glob("recipes/*.yaml"):
        if re.search("^task: (detection|scene_graph)$", path.read_text(), re.MULTILINE):
            load_recipe(path)


def test_weights_of_a_classifier_start_a_backbone(tmp_path):
    recipe = make_recipe("data", tmp_path)
    shapes = {name: recipe.model["backbone_config"][name]
              for name in ("embedding_size", "hidden_sizes", "depths", "layer_type")}  # fmt: skip
    classifier = ResNetForImageClassification(ResNetConfig(**shapes, num_labels=3))
    classifier.save_pretrained(tmp_path / "classifier")
    recipe.backbone_weights = str(tmp_path / "classifier")
    detector = make_model(recipe, dict(enumerate(ENTITIES)), dict(enumerate(PREDICATES)))
    state = detector.model.backbone.state_dict()
    for name, tensor in classifier.resnet.state_dict().items():
        if name in state:
            assert torch.equal(state[name], tensor), name
    assert len(state) > 20
    deeper = dict(recipe.model["backbone_config"]) | {"depths": [1, 1, 1, 2]}
    recipe.model = recipe.model | {"backbone_config": deeper}
    with pytest.raises(ValueError, match=r"classifier lacks \d+ weights of the backbone"):
        make_model(recipe, dict(enumerate(ENTITIES)), dict(enumerate(PREDICATES)))


def read_configuration(name):
    return load_config_from_file(str(ROOT / "recipes" / "accelerate" / f"{name}.yaml"))


@pytest.mark.parametrize("name", ["ddp", "multi_node", "fsdp2", "deepspeed_zero2"])
def test_a_configuration_of_accelerate_is_read(name):
    configuration = read_configuration(name)
    assert configuration.num_processes in (8, 16)
    assert configuration.num_machines == (2 if name == "multi_node" else 1)


def test_the_plugin_of_fsdp_wraps_layers_that_there_are(monkeypatch):
    entries = read_configuration("fsdp2").fsdp_config
    classes = entries["fsdp_transformer_layer_cls_to_wrap"].split(",")
    # Set, for the plugin sets some itself.
    for variable in list(os.environ):
        if variable.startswith("FSDP_"):
            monkeypatch.delenv(variable)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=entries["fsdp_version"],
        reshard_after_forward=entries["fsdp_reshard_after_forward"],
        auto_wrap_policy=entries["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=classes,
        state_dict_type=entries["fsdp_state_dict_type"],
        cpu_ram_efficient_loading=entries["fsdp_cpu_ram_efficient_loading"],
    )
    with torch.device("meta"):
        model = SgtrForSceneGraphGeneration(SgtrConfig())
    plugin.set_auto_wrap_policy(model)
    assert plugin.fsdp_version == 2
    assert set(classes) <= set(model._no_split_modules)
    assert {type(module).__name__ for module in model.modules()} >= set(classes)


def test_the_plugin_of_deepspeed_is_made_of_its_entries():
    entries = read_configuration("deepspeed_zero2").deepspeed_config
    plugin = DeepSpeedPlugin(**entries)
    assert plugin.zero_stage == 2
    assert json.loads(json.dumps(plugin.deepspeed_config))["zero_optimization"]["stage"] == 2
