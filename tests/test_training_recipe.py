import pytest

from sgtr_hf import (
    SgtrDetrConfig,
    SgtrDetrForObjectDetection,
    SgtrForSceneGraphGeneration,
    SgtrImageProcessor,
)
from sgtr_hf.auto import DEFAULT_CHECKPOINT
from sgtr_hf.training.command import run_recipe
from sgtr_hf.training.recipe import Recipe, TrainingSettings, load_recipe
from sgtr_hf.training.setup_run import make_image_processor, make_model
from tiny_training_run import DETECTOR, ENTITIES, PREDICATES, make_recipe


LABELS, PREDICATE_NAMES = dict(enumerate(ENTITIES)), dict(enumerate(PREDICATES))
TEXT = """
task: detection
data: {path: somewhere}
training: {output_dir: run, epochs: 3}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    return path


def test_overrides_replace_and_add_entries(recipe_file):
    overrides = [
        "training.epochs=null", "training.max_steps=7", "training.learning_rate=2.0e-4",
        "data.flip_swaps=[[left, right]]", "model.d_model=64",
        "model.backbone_config.model_type=resnet",
    ]  # fmt: skip
    recipe = load_recipe(recipe_file, overrides)
    assert (recipe.training.epochs, recipe.training.max_steps) == (None, 7)
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.flip_swaps == [["left", "right"]]
    assert recipe.model == {"d_model": 64, "backbone_config": {"model_type": "resnet"}}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainin.epochs=3"], "no entry `trainin`; known are .*training"),
        (["training.epoch=3"], r"no entry `training\.epoch`; known are .*epochs"),
        (["training.max_steps=3"], r"either `training\.epochs` or `training\.max_steps`"),
        (["training.epochs=null"], r"either `training\.epochs`"),
        (["training.learning_rate=1e-4"], r"learning_rate` must be float.*1\.0e-4"),
        (["training.evaluate_every=0"], "evaluate_every` must be a number above 0"),
        (["training.num_threads=0"], "num_threads` must be at least 1"),
        (["training.gradient_clip_norm=.inf"], "gradient_clip_norm"),
        (["training.ema_decay=1"], "ema_decay"),
        (["training.resume=3"], r"resume` must be str \| null"),
        (["training.gradient_checkpointing=1"], "gradient_checkpointing` must be bool"),
        (["training.gradient_clip_norm_per_tensor=-1"], "per_tensor` must be at least 0"),
        (["training.patience=0"], "patience` must be at least 1"),
        (["training.trackers=[mlflow]"], "trackers` must be .*tensorboard"),
        (["training.compile_backend=fast"], "compile_backend` must be .*inductor"),
        (["data.on_error=skip"], "on_error` must be one of 'raise', 'drop'"),
        (["data.flip_swaps=[[1, 2]]"], "flip_swaps"),
        (["data.least_crop=0"], "least_crop` must be between"),
        (["model.freeze_detector=true", "task=scene_graph"], "freeze_detector` needs `detector`"),
        (["task=scene_graph", "detector=x", "backbone_weights=efficientnet_lite0"], "remove one"),
        (["task=scene_graph", "detector=x", "model.detector_config={}"], "remove one"),
        (["pretrained_model=x", "backbone_weights=efficientnet_lite0"], "remove one"),
        (["data.crop_probability=0.5"], r"without `data\.least_crop`, which is 1\.0: set that"),
        (["data.resize_longest_side=900"], r"without `data\.resize_sides`, which is \[\]"),
        (["data.shuffle_buffer=9"], r"without `data\.streaming`, which is False"),
        (["data.relation_drop_rate=0.7"], r"without `data\.repeat_threshold`, which is 0\.0"),
        (["distillation.temperature=3"], r"without `distillation\.teacher`, which is None"),
        (["training.epochs=[1"], "not YAML"),
        (["task.epochs=1"], "`task` in the override"),
    ],
)
def test_wrong_overrides_name_entry_and_remedy(recipe_file, overrides, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(recipe_file, overrides)


def test_missing_entries_and_broken_files(tmp_path):
    path = tmp_path / "recipe.yaml"
    for text, words in (
        ("task: detection\ndata: {path: x}\n", "lacks `training`"),
        (TEXT.replace("output_dir: run, ", ""), r"lacks `training\.output_dir`"),
        ("- task", "must hold sections"),
        ("task: [", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            load_recipe(path)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_querys": 3}, r"no entry `model\.num_querys`; known are .*num_queries"),
        ({"id2label": {0: "a"}}, "comes from the data"),
        ({"backbone_config": {"depths": [1]}}, "model_type"),
        ({"dropout": 2.0}, "dropout"),
    ],
)
def test_wrong_model_fields_are_errors(tmp_path, model, words):
    recipe = make_recipe("data", tmp_path, model=model)
    with pytest.raises(ValueError, match=words):
        make_model(recipe, LABELS, PREDICATE_NAMES)


def test_wrong_fields_of_parts_are_errors(tmp_path):
    graphs = make_recipe("data", tmp_path, task="scene_graph")
    graphs.model["detector_config"] = DETECTOR | {"num_querys": 3}
    with pytest.raises(ValueError, match=r"model\.detector_config\.num_querys"):
        make_model(graphs, LABELS, PREDICATE_NAMES)
    graphs = make_recipe("data", tmp_path, task="scene_graph", model={"predicate_layers": 3})
    with pytest.raises(ValueError, match=r"model\.predicate_layers"):
        make_model(graphs, LABELS, PREDICATE_NAMES)
    recipe = make_recipe("data", tmp_path)
    recipe.image_processor["sise"] = 3
    with pytest.raises(ValueError, match=r"image_processor\.sise`; known are .*size"):
        make_image_processor(recipe)


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    recipe = make_recipe("data", folder)
    make_model(recipe, LABELS, {}).save_pretrained(folder)
    SgtrImageProcessor(size={"height": 48, "width": 80}).save_pretrained(folder)
    return folder


def graph_recipe(output_dir, detector):
    recipe = make_recipe("data", output_dir, task="scene_graph")
    del recipe.model["detector_config"]
    recipe.detector, recipe.image_processor = str(detector), {}
    return recipe


def test_a_detector_brings_weights_and_image_processor(tmp_path, detector_folder):
    recipe = graph_recipe(tmp_path, detector_folder)
    recipe.model["freeze_detector"] = True
    model = make_model(recipe, LABELS, PREDICATE_NAMES)
    detector = SgtrDetrForObjectDetection.from_pretrained(detector_folder)
    for name, tensor in detector.state_dict().items():
        assert tensor.equal(model.model.detector.state_dict()[name]), name
    assert not any(p.requires_grad for p in model.model.detector.parameters())
    assert make_image_processor(recipe).size == {"height": 48, "width": 80}


def test_a_detector_of_other_classes_is_an_error(tmp_path, detector_folder):
    with pytest.raises(ValueError, match=r"knows the classes.*purple"):
        make_model(graph_recipe(tmp_path, detector_folder), {0: "purple"}, PREDICATE_NAMES)


def test_a_pretrained_model_goes_on_with_changed_fields(tmp_path, detector_folder):
    recipe = make_recipe("data", tmp_path, model={"dropout": 0.25})
    recipe.pretrained_model, recipe.image_processor = str(detector_folder), {}
    trained = SgtrDetrForObjectDetection.from_pretrained(detector_folder)
    model = make_model(recipe, LABELS, {})
    assert model.config.dropout == 0.25
    for name, tensor in trained.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    assert make_image_processor(recipe).size == {"height": 48, "width": 80}
    # Only what depends on the number of classes starts anew.
    other = make_model(recipe, {0: "purple"}, {}).state_dict()
    new = {name for name, tensor in trained.state_dict().items() if not tensor.equal(other[name])}
    assert other["class_head.weight"].shape[0] == 1
    assert all("class" in name for name in new), new


def test_a_pretrained_graph_model_keeps_its_detector(tmp_path, detector_folder):
    trained = make_model(graph_recipe(tmp_path, detector_folder), LABELS, PREDICATE_NAMES)
    trained.save_pretrained(tmp_path / "graphs")
    recipe = make_recipe("data", tmp_path, task="scene_graph")
    recipe.pretrained_model, recipe.image_processor = str(tmp_path / "graphs"), {}
    recipe.model = {"detector_config": {"dropout": 0.25}}
    model = make_model(recipe, LABELS, PREDICATE_NAMES)
    assert model.config.detector_config.dropout == 0.25
    assert model.config.detector_config.d_model == trained.config.detector_config.d_model
    for name, tensor in trained.state_dict().items():
        assert tensor.equal(model.state_dict()[name]), name
    recipe.model = {"detector_config": {"num_queris": 3}}
    with pytest.raises(ValueError, match=r"model\.detector_config\.num_queris"):
        make_model(recipe, LABELS, PREDICATE_NAMES)
    # What was trained must not be lost to a changed size.
    recipe.model = {"detector_config": {"feed_forward_dim": 52}}
    with pytest.raises(ValueError, match="leave out the entry that changes it"):
        make_model(recipe, LABELS, PREDICATE_NAMES)


def test_wrong_fields_of_a_backbone_are_errors(tmp_path):
    backbone = {"model_type": "resnet", "hidden_siz": [8, 8]}
    recipe = make_recipe("data", tmp_path, model={"backbone_config": backbone})
    with pytest.raises(ValueError, match=r"model\.backbone_config\.hidden_siz"):
        make_model(recipe, LABELS, {})


def test_a_plain_no_is_what_it_says(recipe_file):
    recipe = load_recipe(recipe_file, ["training.mixed_precision=no"])
    assert recipe.training.mixed_precision == "no"
    with pytest.raises(ValueError, match=r"mixed_precision.*True"):
        load_recipe(recipe_file, ["training.mixed_precision=yes"])


def test_all_sections_have_typed_defaults():
    settings = TrainingSettings("run", epochs=1)
    assert settings.mixed_precision == "no"
    assert Recipe.__dataclass_fields__["model"].default_factory() == {}
    assert SgtrDetrConfig(id2label=LABELS).num_labels == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.yaml"], "no recipe missing.yaml"),
        (["RECIPE", "training.epoch=1"], "training.epoch"),
        (["RECIPE"], "no readable split"),
        (["RECIPE", "task=scene_graph"], "this trains 'detection'"),
    ],
)
def test_the_command_reports_mistakes_in_one_line(monkeypatch, recipe_file, arguments, words):
    arguments = [str(recipe_file) if name == "RECIPE" else name for name in arguments]
    monkeypatch.chdir(recipe_file.parent)
    monkeypatch.setattr("sys.argv", ["train_detr.py", *arguments])
    with pytest.raises(SystemExit) as error:
        run_recipe("Train.", task="detection")
    assert words in str(error.value)


def test_the_shipped_model_learns_other_classes_and_predicates(tmp_path):
    recipe = make_recipe("data", tmp_path, task="scene_graph")
    recipe.pretrained_model, recipe.image_processor, recipe.model = DEFAULT_CHECKPOINT, {}, {}
    model = make_model(recipe, {0: "cat", 1: "dog", 2: "bird"}, {0: "chases", 1: "sees"})
    # All that knows classes or predicates begins anew, the rest is as trained.
    trained = SgtrForSceneGraphGeneration.from_pretrained(DEFAULT_CHECKPOINT).state_dict()
    changed = {
        name for name, tensor in model.state_dict().items() if not tensor.equal(trained[name])
    }
    assert all("class" in name or "predicate_head" in name for name in changed)
    assert "model.predicate_node_generator.entity_embedding.class_projection.weight" in changed
    recipe.model = {"num_predicate_queries": 7, "feed_forward_dim": 12}
    with pytest.raises(ValueError, match="leave out the entry that changes it"):
        make_model(recipe, {0: "cat", 1: "dog", 2: "bird"}, {0: "chases", 1: "sees"})
