from functools import partial

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf import (
    DinoVitForImageClassification,
    DinoVitForPreTraining,
    DinoVitImageProcessor,
    DinoVitModel,
)
from sgtr_hf.data.picture_source import PictureFiles, open_pictures
from sgtr_hf.self_supervision.feature_extraction import (
    class_token,
    collect_features,
    copy_descriptor,
    extract_features,
    load_features,
    multi_scale,
    raw_pixels,
    save_features,
)
from sgtr_hf.self_supervision.image_preparation import (
    Normalization,
    PatchPreparation,
    ProcessorPreparation,
    SquarePreparation,
    ThumbnailPreparation,
)
from sgtr_hf.self_supervision.linear_probe import (
    ProbeSettings,
    evaluate_classifier,
    make_probe,
    train_probe,
)
from sgtr_hf.self_supervision.vit_loading import load_vision_transformer
from test_modeling_dino_vit import images, small_vit_config


COLORS = {"blue": (20, 30, 220), "green": (30, 200, 40), "red": (220, 40, 30)}
NORMALIZATION = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def color_picture(color, seed, size=(32, 32)):
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def color_folder(tmp_path):
    """Three classes that any model can tell apart, four pictures each."""
    for name, color in COLORS.items():
        (tmp_path / "colors" / name).mkdir(parents=True)
        for number in range(4):
            picture = color_picture(color, number)
            picture.save(tmp_path / "colors" / name / f"{number}.png")
    return tmp_path / "colors"


def small_processor():
    return DinoVitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
        image_mean=NORMALIZATION.mean, image_std=NORMALIZATION.std,
    )  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DinoVitModel(small_vit_config(initializer_range=0.3)).eval()


def test_folders_files_and_data_sets_give_the_same_pictures(color_folder, tmp_path):
    folder = open_pictures(color_folder)
    assert folder.label_names == sorted(COLORS)
    assert [picture.label for picture in folder] == [0] * 4 + [1] * 4 + [2] * 4
    assert open_pictures(color_folder.parent, "colors").labels == folder.labels
    flat = open_pictures(color_folder / "red")
    assert (flat.label_names, flat.labels) == (None, [-1] * 4)
    features = datasets.Features(
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=sorted(COLORS))}
    )
    rows = datasets.Dataset.from_dict(
        {"picture": [str(file) for file in folder.files], "kind": folder.labels}, features
    )
    rows.to_parquet(tmp_path / "colors.parquet")
    table = open_pictures(tmp_path / "colors.parquet")
    stream = open_pictures(tmp_path / "colors.parquet", streaming=True)
    assert table.label_names == stream.label_names == folder.label_names
    assert table.labels == folder.labels
    for first, second, third in zip(folder, table, stream, strict=True):
        assert first.label == second.label == third.label
        assert first.image.tobytes() == second.image.tobytes() == third.image.tobytes()


def test_mistakes_with_pictures_are_named(color_folder, tmp_path):
    with pytest.raises(ValueError, match="no sub-folder test"):
        open_pictures(color_folder, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="hold no image"):
        open_pictures(tmp_path / "empty")
    color_picture((0, 0, 0), 0).save(color_folder / "stray.png")
    with pytest.raises(ValueError, match="images beside sub-folders"):
        open_pictures(color_folder)
    with pytest.raises(ValueError, match="no file"):
        open_pictures(tmp_path / "missing.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no column of images, but text"):
        open_pictures(tmp_path / "text.parquet")
    with pytest.raises(ValueError, match="no column kind"):
        open_pictures(tmp_path / "text.parquet", image_column="text", label_column="kind")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_features_are_those_of_the_model_in_any_batches(batch_size, model, tmp_path):
    files = []
    for number, size in enumerate([(32, 32), (48, 32), (32, 32), (24, 40), (48, 32)]):
        color_picture((90, 100, 110), number, size).save(tmp_path / f"{number}.png")
        files.append(str(tmp_path / f"{number}.png"))
    prepare = ThumbnailPreparation(48, NORMALIZATION)
    batches = extract_features(
        PictureFiles(files), prepare, partial(class_token, model), batch_size=batch_size
    )
    found = collect_features(batches)
    assert found.names == files
    assert found.labels.tolist() == [-1] * 5
    for file, vector in zip(files, found.vectors, strict=True):
        with torch.no_grad():
            [pixels] = prepare([Image.open(file)])
            torch.testing.assert_close(vector, model(pixels[None]).pooler_output[0])


def test_workers_read_each_picture_of_a_stream_once(color_folder, tmp_path):
    folder = open_pictures(color_folder)
    for shard in range(2):
        files = [str(file) for file in folder.files[shard::2]]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        columns = {"image": files, "label": folder.labels[shard::2]}
        rows = datasets.Dataset.from_dict(columns, features)
        rows.to_parquet(tmp_path / "shards" / f"train-{shard:05d}-of-00002.parquet")
    stream = open_pictures(tmp_path / "shards", streaming=True)
    prepare = ProcessorPreparation(small_processor())
    found = collect_features(
        extract_features(stream, prepare, raw_pixels, batch_size=4, num_workers=2)
    )
    assert sorted(found.labels.tolist()) == folder.labels
    assert len(found.vectors.unique(dim=0)) == 12


def test_features_are_written_and_read_again(color_folder, model, tmp_path):
    pictures = open_pictures(color_folder)
    batches = extract_features(pictures, ProcessorPreparation(small_processor()), raw_pixels)
    found = collect_features(batches, pictures.label_names)
    assert found.vectors.shape == (12, 3 * 32 * 32)
    save_features(found, tmp_path / "features.safetensors")
    again = load_features(tmp_path / "features.safetensors")
    assert again.vectors.equal(found.vectors)
    assert again.labels.equal(found.labels)
    assert again[2:] == found[2:]
    (tmp_path / "no.safetensors").write_text("no")
    with pytest.raises(ValueError, match="no file of features"):
        load_features(tmp_path / "no.safetensors")
    with pytest.raises(ValueError, match="no picture"):
        collect_features(iter([]))


def test_copy_descriptors_pool_by_the_generalised_mean(model):
    pixel_values = images(32, 48)
    with torch.no_grad():
        tokens = model(pixel_values).last_hidden_state
        found = copy_descriptor(model, pixel_values, power=3.0)
        largest = copy_descriptor(model, pixel_values, power=50.0)
    patches = tokens[:, 1:].double().clamp(min=1e-6)
    expected = (patches**3).mean(1) ** (1 / 3)
    torch.testing.assert_close(found[:, :24], tokens[:, 0])
    torch.testing.assert_close(found[:, 24:], expected.float())
    assert (largest[:, 24:] / patches.amax(1) - 1).abs().median() < 0.1


def test_multi_scale_features_are_the_normalised_mean(model):
    pixel_values = images(32, 32)
    compute = partial(class_token, model)
    with torch.no_grad():
        found = multi_scale(compute, pixel_values, (1.0, 0.5))
        half = torch.nn.functional.interpolate(pixel_values, scale_factor=0.5, mode="bilinear")
        mean = (compute(pixel_values) + compute(half)) / 2
    torch.testing.assert_close(found, mean / mean.norm(dim=1, keepdim=True))


def test_preparations_keep_what_they_promise():
    wide = color_picture((90, 100, 110), 0, (100, 40))
    [thumbnail] = ThumbnailPreparation(50, NORMALIZATION)([wide])
    assert thumbnail.shape == (3, 20, 50)
    [small] = ThumbnailPreparation(500, NORMALIZATION)([wide])
    assert small.shape == (3, 40, 100)
    [raised] = ThumbnailPreparation(20, NORMALIZATION, least_side=16)([wide])
    assert raised.shape == (3, 16, 20)
    [square] = SquarePreparation(24, NORMALIZATION)([wide])
    assert square.shape == (3, 24, 24)
    [patches] = PatchPreparation(16, 8, NORMALIZATION)([wide])
    assert patches.shape == (3, 16, 40)
    assert square.mean() == pytest.approx(100 / 127.5 - 1, abs=0.02)
    with pytest.raises(ValueError, match="at least a patch"):
        PatchPreparation(4, 8, NORMALIZATION)


@pytest.mark.parametrize("is_augmented", [False, True])
def test_a_linear_probe_learns_and_keeps_its_best(is_augmented, color_folder, model):
    pictures = open_pictures(color_folder)
    probe = make_probe(model, 3, num_layers=2, patch_mean=is_augmented)
    settings = ProbeSettings(epochs=6, learning_rate=5.0, batch_size=8, is_augmented=is_augmented)
    before = {name: value.clone() for name, value in probe.model.state_dict().items()}
    epochs = list(train_probe(probe, small_processor(), pictures, pictures, settings))
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    accuracy = evaluate_classifier(probe, small_processor(), pictures, settings)
    assert accuracy.top1 == max(epoch.accuracy.top1 for epoch in epochs)
    assert accuracy.top1 > 0.9
    assert accuracy.top5 == 1.0
    for name, value in probe.model.state_dict().items():
        assert value.equal(before[name])


def test_the_recipe_of_the_probe_is_that_of_the_reference(color_folder, model):
    """The rate of an epoch by the cosine, times batch / 256; SGD with momentum, no decay."""
    pictures = open_pictures(color_folder)
    probe = make_probe(model, 3, num_layers=1, patch_mean=False)
    assert probe.classifier.weight.detach().std() == pytest.approx(0.01, rel=0.3)
    assert not probe.classifier.bias.any()
    settings = ProbeSettings(epochs=3, learning_rate=2.0, batch_size=12, is_augmented=False)
    pixels = torch.stack(ProcessorPreparation(small_processor())([p.image for p in pictures]))
    with torch.no_grad():
        features = probe.features(pixels)
    weight = probe.classifier.weight.detach().clone().requires_grad_()
    bias = probe.classifier.bias.detach().clone().requires_grad_()
    velocity, losses = [torch.zeros_like(weight), torch.zeros_like(bias)], []
    labels = torch.tensor(pictures.labels)
    for epoch in range(3):
        loss = torch.nn.functional.cross_entropy(features @ weight.T + bias, labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, (weight, bias))
        rate = 2.0 * 12 / 256 * (1 + np.cos(np.pi * epoch / 3)) / 2
        with torch.no_grad():
            for number, (parameter, gradient) in enumerate(
                zip((weight, bias), gradients, strict=True)
            ):
                velocity[number] = 0.9 * velocity[number] + gradient
                parameter -= rate * velocity[number]
    found = train_probe(probe, small_processor(), pictures, pictures, settings)
    assert [epoch.loss for epoch in found] == pytest.approx(losses, rel=1e-4)


def test_mistakes_with_probes_are_named(color_folder, model):
    with pytest.raises(ValueError, match="from 1 to the 3 layers"):
        make_probe(model, 3, num_layers=4, patch_mean=False)
    probe = make_probe(model, 2, num_layers=1, patch_mean=False)
    pictures = open_pictures(color_folder)
    with pytest.raises(ValueError, match="classes from 0 to 1, got 0 to 2"):
        next(train_probe(probe, small_processor(), pictures, pictures, ProbeSettings()))


def test_models_are_loaded_from_any_class(model, tmp_path, checkpoint_folder):
    small_processor().save_pretrained(tmp_path)
    probe = make_probe(model, 2, num_layers=1, patch_mean=False)
    probe.save_pretrained(tmp_path)
    assert isinstance(probe, DinoVitForImageClassification)
    loaded, processor = load_vision_transformer(str(tmp_path))
    assert processor.crop_size["height"] == 32
    for name, value in loaded.state_dict().items():
        assert value.equal(model.state_dict()[name])
    untrained, _ = load_vision_transformer(str(tmp_path), untrained=True, seed=1)
    again, _ = load_vision_transformer(str(tmp_path), untrained=True, seed=1)
    assert untrained.norm.weight.shape == model.norm.weight.shape
    first = untrained.embedding.projection.weight
    assert not first.equal(model.embedding.projection.weight)
    assert first.equal(again.embedding.projection.weight)
    pretraining = DinoVitForPreTraining(small_vit_config(num_prototypes=8, head_hidden_dim=16))
    pretraining.model.load_state_dict(model.state_dict())
    pretraining.save_pretrained(tmp_path / "pretraining")
    small_processor().save_pretrained(tmp_path / "pretraining")
    teacher, _ = load_vision_transformer(str(tmp_path / "pretraining"))
    for name, value in teacher.state_dict().items():
        assert value.equal(model.state_dict()[name])
    with pytest.raises(ValueError, match="is a sgtr checkpoint"):
        load_vision_transformer(str(checkpoint_folder))
