import pytest
import torch

from sgtr_hf import DinoVitForImageClassification
from sgtr_hf.training.image_recipe import IMAGE_RECIPES, ClassificationData, ClassificationTraining
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.recipe import load_recipe
from tiny_pictures import (
    NAMES,
    classification_recipe,
    distillation_recipe,
    write_picture_folder,
    write_picture_rows,
)
from tiny_training_run import losses_by_update, read_log


pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_picture_rows(tmp_path_factory.mktemp("pictures"))


def test_colours_are_learnt_from_scratch(data, tmp_path):
    figures = Trainer(classification_recipe(data, tmp_path, epochs=8, evaluate_every=4)).run()
    assert figures["top1"] > 0.8
    assert figures["num_images"] == 9
    model = DinoVitForImageClassification.from_pretrained(tmp_path / "best")
    assert list(model.config.id2label.values()) == NAMES
    line = read_log(tmp_path)[24]
    assert {"loss", "accuracy", "learning_rate"} <= line.keys()


def test_a_teacher_of_self_distillation_is_fine_tuned(data, tmp_path):
    Trainer(distillation_recipe(data, tmp_path / "dino", max_steps=1, warmup_epochs=0.0)).run()
    recipe = classification_recipe(data, tmp_path / "tuned", max_steps=1)
    recipe.model, recipe.image_processor = {"drop_path": 0.0}, {}
    recipe.pretrained_model = str(tmp_path / "dino" / "final")
    trainer = Trainer(recipe)
    pretrained = DinoVitForImageClassification.from_pretrained(recipe.pretrained_model).model
    for name, tensor in pretrained.state_dict().items():
        assert trainer.model.model.state_dict()[name].equal(tensor), name
    assert trainer.model.config.drop_path == 0.0
    assert trainer.model.classifier.out_features == 3
    assert trainer.model.config.label2id == {name: i for i, name in enumerate(NAMES)}
    assert trainer.task.image_processor.crop_size == {"height": 16, "width": 16}
    trainer.run()


def test_streams_train(tmp_path):
    data = write_picture_rows(tmp_path / "data", num_shards=2)
    fields = {"streaming": True, "images_per_epoch": 16, "shuffle_buffer": 4}
    Trainer(classification_recipe(data, tmp_path / "run", data_fields=fields)).run()
    assert len(losses_by_update(tmp_path / "run")) == 4


def test_label_smoothing_raises_the_least_loss(data, tmp_path):
    recipe = classification_recipe(data, tmp_path, label_smoothing=0.3)
    task = Trainer(recipe).task

    class Sure(torch.nn.Module):
        def forward(self, pixel_values):
            self.logits = 50.0 * torch.nn.functional.one_hot(torch.tensor([0, 1, 2])).float()
            return self

    batch = {"pixel_values": None, "labels": torch.tensor([0, 1, 2])}
    losses = task.compute_losses(Sure(), batch, None)
    # 0.2 of the target lie on the two other classes, whose logits are 50 lower.
    assert losses["loss"].item() == pytest.approx(0.2 * 50, rel=1e-3)
    assert losses["accuracy"] == 1


def test_images_need_classes(tmp_path):
    folder = write_picture_folder(tmp_path / "data", with_classes=False)
    with pytest.raises(ValueError, match=r"have no classes.*sub-folder a class"):
        Trainer(classification_recipe(folder, tmp_path / "run"))
    folder = write_picture_folder(tmp_path / "named")
    (folder / "validation" / "red").rename(folder / "validation" / "purple")
    with pytest.raises(ValueError, match=r"must have the same classes"):
        Trainer(classification_recipe(folder, tmp_path / "run"))


def test_settings_out_of_range_are_errors(tmp_path):
    with pytest.raises(ValueError, match="crop_scale"):
        ClassificationData("x", crop_scale=[0.5])
    with pytest.raises(ValueError, match="label_smoothing"):
        ClassificationTraining("run", epochs=1, label_smoothing=1.0)
    with pytest.raises(ValueError, match=r"validation_split` must be named"):
        ClassificationData("x", validation_split=None)
    path = tmp_path / "recipe.yaml"
    path.write_text("task: classification\ndata: {path: x}\ntraining: {output_dir: r, epochs: 1}\n")
    with pytest.raises(ValueError, match=r"no entry `data\.crops`; known are .*crop_scale"):
        load_recipe(path, ["data.crops={}"], IMAGE_RECIPES)
    overrides = ["distillation.teacher=t", "distillation.entity_confidence=0.9"]
    with pytest.raises(ValueError, match=r"distillation\.entity_confidence` has no use"):
        load_recipe(path, overrides, IMAGE_RECIPES)
