import dataclasses
import logging

import datasets
import pytest
import torch
import yaml
from PIL import Image

from sgtr_hf import DinoVitForPreTraining, DinoVitModel
from sgtr_hf.training.checkpoints import list_checkpoints
from sgtr_hf.training.collapse_watch import EntropyMeter, TeacherEntropies, describe_collapse
from sgtr_hf.training.image_recipe import (
    IMAGE_RECIPES,
    SelfDistillationData,
    SelfDistillationTraining,
)
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.recipe import DataSettings, Recipe, TrainingSettings, load_recipe
from sgtr_hf.training.tasks.self_distillation_task import SelfDistillationTask
from tiny_pictures import (
    NAMES,
    distillation_recipe,
    run_pretraining,
    write_picture_folder,
    write_picture_rows,
)
from tiny_training_run import losses_by_update, read_log
from training_processes import start_group


pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_picture_rows(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole_run(data, without_drawing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    Trainer(distillation_recipe(data, folder)).run()
    return folder


def test_a_run_logs_what_tells_a_collapse(whole_run):
    line = read_log(whole_run)[4]
    assert {"loss", "teacher_entropy", "weight_decay", "teacher_momentum"} <= line.keys()
    assert line["teacher_temperature"] == 0.04
    assert 0.9 < line["teacher_momentum"] < 1
    figures = read_log(whole_run, "validation")
    assert figures.keys() == {3, 6}
    for values in figures.values():
        assert values["entropy_gap"] == pytest.approx(
            values["mean_entropy"] - values["teacher_entropy"]
        )
        assert 0 <= values["knn_top1"] <= values["knn_top5"] <= 1


def test_the_teacher_is_what_the_folder_holds(whole_run):
    pretraining = DinoVitForPreTraining.from_pretrained(whole_run / "final")
    teacher = DinoVitModel.from_pretrained(whole_run / "final")
    assert teacher.norm.weight.equal(pretraining.model.norm.weight)
    # It has moved, but less far than the student.
    assert not teacher.norm.weight.equal(pretraining.student.model.norm.weight)
    assert pretraining.center.abs().max() > 0


def test_a_run_resumes_to_the_bit(data, whole_run, tmp_path):
    stopped = Trainer(distillation_recipe(data, tmp_path))
    original = stopped._after_update

    def after_update():
        original()
        if stopped.progress.updates == 4:
            stopped._save_checkpoint()
            raise RuntimeError("killed")

    stopped._after_update = after_update
    with pytest.raises(RuntimeError, match="killed"):
        stopped.run()
    torch.manual_seed(7)
    Trainer(distillation_recipe(data, tmp_path)).run()
    assert losses_by_update(tmp_path) == losses_by_update(whole_run)
    for name in ("teacher_momentum", "weight_decay", "learning_rate"):
        assert read_log(tmp_path)[6][name] == read_log(whole_run)[6][name]
    one, two = (
        DinoVitForPreTraining.from_pretrained(folder / "final").state_dict()
        for folder in (tmp_path, whole_run)
    )
    for name, tensor in one.items():
        assert tensor.equal(two[name]), name


def test_the_prototypes_hold_still_at_first(data, tmp_path):
    trainer = Trainer(distillation_recipe(data, tmp_path, frozen_prototype_epochs=1))
    prototypes = trainer.model.student.head.prototypes
    start = prototypes.direction.clone()
    seen = {}
    original = trainer._after_update

    def after_update():
        original()
        seen[trainer.progress.updates] = prototypes.direction.equal(start)

    trainer._after_update = after_update
    trainer.run()
    assert seen == {1: True, 2: True, 3: True, 4: False, 5: False, 6: False}


def test_accumulated_batches_move_the_center_as_one(data, tmp_path):
    fields = {"max_steps": 1, "warmup_epochs": 0.0, "evaluate_every": 100}
    plain = Trainer(distillation_recipe(data, tmp_path / "plain", batch_size=8, **fields))
    plain.run()
    halves = Trainer(
        distillation_recipe(
            data, tmp_path / "halves", batch_size=4, gradient_accumulation_steps=2, **fields
        )
    )
    halves.run()
    torch.testing.assert_close(halves.model.center, plain.model.center, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(data, tmp_path):
    fields = {"data": str(data), "model": {"drop_path": 0.0}}
    Trainer(distillation_recipe(output_dir=tmp_path / "one", **fields)).run()
    fields |= {"output_dir": str(tmp_path / "two"), "batch_size": 4}
    group = start_group(run_pretraining, 2, fields)
    for process in group:
        process.join(300)
    assert [process.exitcode for process in group] == [0, 0]
    one, two = losses_by_update(tmp_path / "one"), losses_by_update(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    centers = [
        DinoVitForPreTraining.from_pretrained(tmp_path / name / "final").center
        for name in ("one", "two")
    ]
    torch.testing.assert_close(centers[0], centers[1], rtol=1e-3, atol=1e-5)
    figures = [read_log(tmp_path / name, "validation")[6] for name in ("one", "two")]
    for name in ("entropy_gap", "mean_entropy", "knn_top1"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=1e-3), name


def test_decoded_beforehand_shows_the_same(data, whole_run, tmp_path):
    recipe = distillation_recipe(data, tmp_path, data_fields={"cache_images": True})
    Trainer(recipe).run()
    assert losses_by_update(tmp_path) == losses_by_update(whole_run)


@pytest.mark.parametrize("with_classes", [True, False], ids=["classes", "no classes"])
def test_folders_of_images_train(tmp_path, with_classes):
    folder = write_picture_folder(tmp_path / "data", with_classes=with_classes)
    Trainer(distillation_recipe(folder, tmp_path / "run", max_steps=3, warmup_epochs=0.5)).run()
    figures = read_log(tmp_path / "run", "validation")[3]
    assert (figures["knn_top1"] is not None) == with_classes
    assert figures["entropy_gap"] > -1e-6


def test_a_folder_without_splits_trains(tmp_path):
    write_picture_folder(tmp_path / "data", with_classes=False)
    recipe = distillation_recipe(
        tmp_path / "data" / "train", tmp_path / "run", max_steps=3, warmup_epochs=0.5,
        data_fields={"train_split": None, "validation_split": None},
    )  # fmt: skip
    Trainer(recipe).run()
    figures = read_log(tmp_path / "run", "validation")[3]
    assert figures["knn_top1"] is None
    assert figures["mean_entropy"] > 0


def test_streams_train_and_resume_to_the_bit(tmp_path):
    data = write_picture_rows(tmp_path / "data", num_shards=2)
    stream = {"streaming": True, "images_per_epoch": 20, "shuffle_buffer": 5}
    trainer = Trainer(distillation_recipe(data, tmp_path / "whole", data_fields=stream))
    # 20 images are two batches of 8.
    assert (trainer.updates_per_epoch, trainer.num_updates) == (2, 4)
    trainer.run()
    stopped = Trainer(distillation_recipe(data, tmp_path / "half", data_fields=stream))
    original = stopped._after_update

    def after_update():
        original()
        if stopped.progress.updates == 3:
            stopped._save_checkpoint()
            raise RuntimeError("killed")

    stopped._after_update = after_update
    with pytest.raises(RuntimeError, match="killed"):
        stopped.run()
    Trainer(distillation_recipe(data, tmp_path / "half", data_fields=stream)).run()
    assert losses_by_update(tmp_path / "half") == losses_by_update(tmp_path / "whole")
    assert read_log(tmp_path / "whole", "validation")[4]["knn_top1"] is not None


def test_an_evaluation_made_again_after_a_resume_has_the_same_figures(data, tmp_path):
    # The teacher's temperature rises after the first epoch, which ends with a checkpoint.
    fields = {
        "warmup_teacher_temperature": 0.02,
        "warmup_teacher_temperature_epochs": 1,
        "checkpoint_every": 1,
    }
    trainer = Trainer(distillation_recipe(data, tmp_path, **fields))

    def evaluate():
        raise RuntimeError("killed")

    trainer._evaluate = evaluate
    with pytest.raises(RuntimeError, match="killed"):
        trainer.run()
    assert read_log(tmp_path, "validation") == {}
    Trainer(distillation_recipe(data, tmp_path, **fields)).run()
    Trainer(distillation_recipe(data, tmp_path / "whole", **fields)).run()
    resumed = read_log(tmp_path, "validation")[3]
    whole = read_log(tmp_path / "whole", "validation")[3]
    for name in ("teacher_entropy", "mean_entropy", "entropy_gap", "knn_top1"):
        assert resumed[name] == whole[name], name


def test_training_images_need_no_classes_even_where_validation_has_them(tmp_path, caplog):
    folder = write_picture_folder(tmp_path / "data")
    for path in sorted((folder / "train").glob("*/*.png")):
        path.rename(folder / "train" / path.name)
    for name in NAMES:
        (folder / "train" / name).rmdir()
    fields = {"max_steps": 3, "warmup_epochs": 0.5}
    with caplog.at_level(logging.WARNING):
        Trainer(distillation_recipe(folder, tmp_path / "run", **fields)).run()
    assert read_log(tmp_path / "run", "validation")[3]["knn_top1"] is None
    assert "split train have no classes" in caplog.text


def test_splits_of_other_classes_are_refused(tmp_path):
    folder = write_picture_folder(tmp_path / "data")
    (folder / "validation" / "red").rename(folder / "validation" / "pink")
    with pytest.raises(ValueError, match="must have the same classes"):
        Trainer(distillation_recipe(folder, tmp_path / "run"))


@pytest.mark.parametrize(
    "fields",
    [{}, {"cache_images": True}, {"streaming": True, "images_per_epoch": 16}],
    ids=["at hand", "decoded beforehand", "streamed"],
)
def test_broken_training_images_are_left_out(tmp_path, fields, caplog):
    data = write_picture_rows(tmp_path / "data")
    path = data / "train-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(path)).cast_column(
        "image", datasets.Image(decode=False)
    )
    broken = rows.to_list()
    broken[0]["image"], broken[1]["image"] = None, {"bytes": b"no picture", "path": None}
    datasets.Dataset.from_list(broken, features=rows.features).to_parquet(path)
    fields = fields | {"on_error": "drop"}
    recipe = distillation_recipe(data, tmp_path / "run", data_fields=fields, max_steps=3,
                                 warmup_epochs=0.5)  # fmt: skip
    with caplog.at_level(logging.WARNING):
        Trainer(recipe).run()
    assert "row 0: it has no picture" in caplog.text
    assert "row 1: " in caplog.text
    assert read_log(tmp_path / "run", "validation")[3 if "streaming" not in fields else 2]
    recipe.data.on_error = "raise"
    recipe.training.output_dir = str(tmp_path / "strict")
    with pytest.raises(ValueError, match=r"row \d+: "):
        Trainer(recipe).run()


def test_folders_of_images_are_not_streamed(tmp_path):
    folder = write_picture_folder(tmp_path / "data")
    fields = {"streaming": True, "images_per_epoch": 16}
    with pytest.raises(ValueError, match=r"`data\.streaming` is for rows"):
        Trainer(distillation_recipe(folder, tmp_path / "run", data_fields=fields))


def test_one_network_starts_student_and_teacher(data, whole_run, tmp_path):
    DinoVitModel.from_pretrained(whole_run / "final").save_pretrained(tmp_path / "one")
    recipe = distillation_recipe(data, tmp_path / "run")
    recipe.pretrained_model = str(tmp_path / "one")
    model = Trainer(recipe).model
    wanted = DinoVitModel.from_pretrained(tmp_path / "one").state_dict()
    for network in (model.model, model.student.model):
        assert all(tensor.equal(wanted[name]) for name, tensor in network.state_dict().items())
    assert model.head.prototypes.direction.equal(model.student.head.prototypes.direction)


def test_weights_of_other_sizes_are_not_thrown_away(data, whole_run, tmp_path):
    recipe = distillation_recipe(data, tmp_path / "run", model={"image_size": 32})
    recipe.pretrained_model = str(whole_run / "final")
    with pytest.raises(ValueError, match=r"position.*leave out what changes it"):
        Trainer(recipe)


def test_a_collapse_is_seen(data, tmp_path, caplog):
    trainer = Trainer(distillation_recipe(data, tmp_path, epochs=2))
    original = trainer._after_update

    def after_update():
        original()
        with torch.no_grad():
            # Every image gets the same features.
            trainer.model.model.norm.weight.zero_()

    trainer._after_update = after_update
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert "says nearly the same of every image" in caplog.text
    assert "teacher_temperature" in caplog.text
    assert read_log(tmp_path, "validation")[6]["entropy_gap"] == pytest.approx(0, abs=1e-5)


def test_a_loss_that_is_not_finite_names_update_parts_and_images(data, tmp_path):
    trainer = Trainer(distillation_recipe(data, tmp_path))
    with torch.no_grad():
        trainer.model.student.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"after update 0 .*teacher_entropy.*row \d+"):
        trainer.run()
    assert list_checkpoints(tmp_path) == []


def test_entropies_tell_uniform_single_and_healthy_teachers_apart():
    class Alone:
        @staticmethod
        def reduce(tensor, reduction):
            return tensor

    def measure(logits):
        meter = EntropyMeter(torch.zeros(16), 0.04)
        for part in logits.split(10):
            meter.add(part)
        return meter.compute(Alone())

    uniform = measure(torch.zeros(64, 16))
    single = measure(torch.eye(16)[:1].expand(64, -1))
    healthy = measure(torch.eye(16).repeat(4, 1))
    assert uniform.of_samples == pytest.approx(2.7726, abs=1e-3)
    assert single.of_mean == pytest.approx(0, abs=1e-3)
    assert healthy.gap == pytest.approx(2.7726, abs=1e-3)
    assert "uniform" in describe_collapse(uniform, 0.5)
    assert "one prototype" in describe_collapse(single, 0.5)
    assert describe_collapse(healthy, 0.5) is None
    assert TeacherEntropies(1.0, 2.5, 16).gap == 1.5


def test_recipes_are_read_by_task(tmp_path):
    recipe = distillation_recipe("somewhere", "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    loaded = load_recipe(path, ["training.teacher_momentum=0.99"], IMAGE_RECIPES)
    assert loaded.training.teacher_momentum == 0.99
    assert loaded.data == recipe.data
    assert dataclasses.asdict(loaded) | {"training": 0} == dataclasses.asdict(recipe) | {
        "training": 0
    }


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.ema_decay=0.9", r"training\.ema_decay` has no use"),
        ("training.warmup_steps=9", r"training\.warmup_steps` has no use"),
        ("data.flip_swaps=[]", r"data\.flip_swaps` has no use"),
        ("data.brightness=0.5", r"data\.brightness` has no use.*data\.crops"),
        ("data.streaming=true", r"images_per_epoch"),
        ("data={path: x, streaming: true, images_per_epoch: 9, validation_split: null}", "named"),
        ("data.crops.local_scale=[0.5, 0.1]", "local_scale"),
        ("data.crops={num_local_crops: 0, local_size: 8}", r"data\.crops\.local_size` has no use"),
        ("data.crops.blur_probabilities=[0.5]", "must be three"),
        ("data.crops.gray_probability=2.0", "between 0 and 1"),
        ("training.teacher_temperature=0.0", "teacher_temperature` must be above 0"),
        ("training.teacher_momentum=2.0", "teacher_momentum` must be between"),
        ("backbone_weights=x", "`backbone_weights` has no use"),
    ],
)
def test_settings_without_effect_or_sense_are_errors(tmp_path, override, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(distillation_recipe("somewhere", "run"))))
    with pytest.raises(ValueError, match=words):
        load_recipe(path, [override], IMAGE_RECIPES)


def test_a_recipe_of_another_kind_is_an_error():
    recipe = Recipe("self_distillation", DataSettings("x"), TrainingSettings("run", epochs=1))
    with pytest.raises(TypeError, match="SelfDistillationRecipe"):
        SelfDistillationTask(recipe, None)
    assert SelfDistillationData("x").neighbour_images == 10000
    assert SelfDistillationTraining("run", epochs=1).gradient_clip_norm_per_tensor == 3.0


def test_mistakes_are_found_before_training(data, tmp_path):
    for fields, words in (
        ({"data_fields": {"train_split": "training"}}, r"`data\.path`.*`data\.train_split`"),
        ({"model": {"patch_size": 16}}, r"`data\.crops\.local_size` must be at least a patch"),
        ({"warmup_epochs": 2.0}, r"training\.warmup_epochs"),
        ({"batch_size": 25}, r"24 images.*training\.batch_size"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(distillation_recipe(data, tmp_path / "run", **fields))
    recipe = distillation_recipe(data, tmp_path / "run")
    recipe.pretrained_model = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`pretrained_model` .*nowhere"):
        Trainer(recipe)
    recipe.image_processor = {}
    with pytest.raises(ValueError, match="has no image processor"):
        Trainer(recipe)


def test_pictures_of_several_sizes_cannot_be_decoded_into_one_array(tmp_path):
    folder = write_picture_folder(tmp_path / "data")
    Image.new("RGB", (20, 16)).save(folder / "train" / "red" / "99.png")
    recipe = distillation_recipe(folder, tmp_path / "run", data_fields={"cache_images": True})
    with pytest.raises(ValueError, match=r"cache_images.*20 x 16"):
        Trainer(recipe)
