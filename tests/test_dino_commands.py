import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf import DinoVitForImageClassification, DinoVitModel
from sgtr_hf.cli import main
from test_modeling_dino_vit import small_vit_config
from test_self_supervision_features import COLORS, color_picture, small_processor
from test_self_supervision_video import moving_squares


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    DinoVitModel(small_vit_config(initializer_range=0.3)).save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors")
    for split in ("train", "test"):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(3):
                picture = color_picture(color, number + 10 * (split == "test"))
                picture.save(folder / split / name / f"{name}{number}.png")
    return folder


def dino(*arguments):
    return main(["dino", *map(str, arguments)])


def test_neighbours_from_pictures_and_from_features(vit, colors, tmp_path, capsys):
    train, test = colors / "train", colors / "test"
    report = tmp_path / "report.json"
    assert dino("knn", train, test, "--model", vit, "-k", 1, 5, 20, "--output", report) == 0
    figures = json.loads(report.read_text())["neighbours"]
    assert [row["neighbours"] for row in figures] == [1, 5, 20]
    # Three plain colours are told apart by any weights.
    assert figures[0]["top1"] == 1.0
    assert "20 neighbours (all 9 there are)" in capsys.readouterr().out
    for name in ("train", "test"):
        output = tmp_path / f"{name}.safetensors"
        assert dino("features", colors / name, "--model", vit, "--output", output) == 0
    files = [tmp_path / "train.safetensors", tmp_path / "test.safetensors"]
    again = tmp_path / "again.json"
    assert dino("knn", *files, "-k", 1, 5, 20, "--output", again) == 0
    assert json.loads(again.read_text()) == json.loads(report.read_text())
    splits = ("--train-split", "train", "--test-split", "test")
    assert dino("knn", colors, colors, *splits, "--model", vit, "--raw-pixels") == 0
    assert dino("knn", train, test, "--model", vit, "--untrained") == 0


def test_a_probe_is_trained_saved_and_measured(vit, colors, tmp_path, capsys):
    output = tmp_path / "probe"
    arguments = ("linear-probe", colors / "train", colors / "test", "--model", vit)
    settings = ("--epochs", 3, "--layers", 2, "--no-augmentation", "--learning-rate", 100,
                "--batch-size", 9)  # fmt: skip
    assert dino(*arguments, "--output", output, *settings) == 0
    best = capsys.readouterr().out.split("top-1 ")[-1].strip(".\n")
    assert json.loads((output / "config.json").read_text())["id2label"]["2"] == "red"
    report = tmp_path / "report.json"
    arguments = ("classifier-accuracy", colors / "test", "--model", output, "--output", report)
    assert dino(*arguments) == 0
    assert json.loads(report.read_text())["top1"] == pytest.approx(float(best), abs=1e-4)
    # A test folder that lacks a class numbers the others anew.
    for name in ("green", "red"):
        shutil.copytree(colors / "test" / name, tmp_path / "two" / name)
    assert dino("classifier-accuracy", tmp_path / "two", "--model", output) == 2
    assert "classes of" in capsys.readouterr().err
    arguments = ("linear-probe", colors / "train", tmp_path / "two", "--model", vit)
    assert dino(*arguments, "--output", tmp_path / "none", *settings) == 2
    assert "classes of" in capsys.readouterr().err
    assert dino("classifier-accuracy", colors / "test", "--model", vit) == 2
    assert "no trained classifier" in capsys.readouterr().err


def test_a_probe_knows_classes_without_a_picture(vit, colors, tmp_path):
    names = ["blue", "green", "red", "violet"]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    for split in ("train", "test"):
        files = sorted((colors / split).glob("*/*.png"))
        rows = [{"image": str(file), "label": names.index(file.parent.name)} for file in files]
        data = datasets.Dataset.from_list(rows, features=features)
        data.to_parquet(tmp_path / f"{split}.parquet")
    arguments = ("linear-probe", tmp_path / "train.parquet", tmp_path / "test.parquet")
    settings = ("--model", vit, "--epochs", 2, "--layers", 1, "--output", tmp_path / "probe")
    assert dino(*arguments, *settings) == 0
    model = DinoVitForImageClassification.from_pretrained(tmp_path / "probe")
    assert list(model.config.id2label.values()) == names
    # Random crops are those of the seed.
    again = (*settings[:-1], tmp_path / "again")
    torch.rand(5)
    assert dino(*arguments, *again) == 0
    other = DinoVitForImageClassification.from_pretrained(tmp_path / "again")
    assert other.classifier.weight.equal(model.classifier.weight)


def test_similar_pictures_are_found_and_drawn(vit, colors, tmp_path, capsys):
    folder = tmp_path / "all"
    folder.mkdir()
    for name, color in COLORS.items():
        for number in range(3):
            color_picture(color, number, (40, 30)).save(folder / f"{name}{number}.png")
    sheet, report = tmp_path / "sheet.png", tmp_path / "found.json"
    queries = (folder / "red0.png", folder / "blue1.png")
    assert dino("retrieve", folder, "--queries", *queries, "--output", sheet, "--json", report,
                "--top-k", 2, "--model", vit, "--image-size", 32) == 0  # fmt: skip
    found = json.loads(report.read_text())
    # The queries themselves lie in the folder, and are not among what is found.
    names = [[result["image"].split("/")[-1] for result in query["results"]] for query in found]
    assert set(names[0]) == {"red1.png", "red2.png"}
    assert set(names[1]) == {"blue0.png", "blue2.png"}
    with Image.open(sheet) as drawn:
        assert drawn.width > 3 * 128
    answers = {
        "imlist": ["red1", "blue0", "green0", "red2"], "qimlist": ["red0"],
        "gnd": [{"easy": [0], "hard": [3], "junk": [1]}],
    }  # fmt: skip
    (tmp_path / "gnd.json").write_text(json.dumps(answers))
    capsys.readouterr()
    assert dino("retrieval-benchmark", folder, "--answers", tmp_path / "gnd.json", "--model", vit,
                "--image-size", 32, "--multi-scale", "--output", report) == 0  # fmt: skip
    assert "medium: mAP 1.0000" in capsys.readouterr().out
    assert json.loads(report.read_text())["hard"]["mean_average_precision"] == 1.0
    answers["imlist"][0] = "violet"
    (tmp_path / "gnd.json").write_text(json.dumps(answers))
    arguments = ("--answers", tmp_path / "gnd.json", "--model", vit)
    assert dino("retrieval-benchmark", folder, *arguments) == 2
    assert "lacks 1 images" in capsys.readouterr().err


def test_attention_is_drawn_filmed_and_compared(vit, tmp_path, capsys):
    frames, masks = moving_squares(2)
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
    for number, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        frame.save(tmp_path / "frames" / f"{number}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
    size = ("--model", vit, "--image-size", 32)
    drawing, film = tmp_path / "heads.png", tmp_path / "film.gif"
    picture = tmp_path / "frames" / "0.png"
    assert dino("attention", picture, "--output", drawing, "--mass", 0.6, *size) == 0
    assert dino("attention-video", tmp_path / "frames", "--output", film, *size) == 0
    assert drawing.stat().st_size > 1000
    with Image.open(film) as animation:
        assert animation.n_frames == 2
    report = tmp_path / "jaccard.json"
    folders = (tmp_path / "frames", tmp_path / "masks")
    assert dino("jaccard", *folders, "--output", report, *size) == 0
    figures = json.loads(report.read_text())
    assert figures["jaccard"] == pytest.approx(np.mean(list(figures["images"].values())))
    assert 0 < figures["jaccard"] < 1
    Image.fromarray(masks[0][:, :64]).save(tmp_path / "masks" / "0.png")
    assert dino("jaccard", *folders, *size) == 2
    assert "they must be alike" in capsys.readouterr().err


def test_copies_are_detected(vit, tmp_path, capsys):
    for folder in ("original", "strong", "jpegqual/10", "others"):
        (tmp_path / folder).mkdir(parents=True)
    for number, color in enumerate(COLORS.values()):
        picture = color_picture(color, number, (40, 30))
        picture.save(tmp_path / "original" / f"200{number}00.png")
        picture.save(tmp_path / "jpegqual" / "10" / f"200{number}00.jpg", quality=10)
        picture.resize((20, 20)).save(tmp_path / "strong" / f"200{number}01.png")
    others = tmp_path / "others"
    for number in range(4):
        color_picture((120, 120, 10 * number), number).save(others / f"{number}.png")
    copies = tmp_path / "copies"
    copies.mkdir()
    for folder in ("original", "strong", "jpegqual"):
        (tmp_path / folder).rename(copies / folder)
    report = tmp_path / "report.json"
    size = ("--model", vit, "--image-size", 32)
    options = ("--distractors", others, "--whitening", others, "--output", report)
    assert dino("copy-detection", copies, *options, *size) == 0
    figures = json.loads(report.read_text())
    assert list(figures) == ["jpegqual/10", "original", "strong"]
    assert figures["original"] == {"num_copies": 3, "mean_average_precision": 1.0}
    assert dino("copy-detection", others, *size) == 2
    assert "no folder original" in capsys.readouterr().err


def test_objects_are_followed_through_a_set_of_videos(vit, tmp_path, capsys):
    frames, masks = moving_squares(4)
    for folder in ("frames/run", "masks/run"):
        (tmp_path / folder).mkdir(parents=True)
    for number, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        frame.save(tmp_path / "frames" / "run" / f"{number:05d}.png")
        Image.fromarray(mask).save(tmp_path / "masks" / "run" / f"{number:05d}.png")
    output, report = tmp_path / "found", tmp_path / "report.json"
    options = ("--output", output, "--report", report, "--model", vit, "--image-size", 64)
    assert dino("video-segmentation", tmp_path / "frames", tmp_path / "masks", *options) == 0
    assert sorted(path.name for path in (output / "run").iterdir()) == [
        f"{number:05d}.png" for number in range(4)
    ]
    figures = json.loads(report.read_text())
    assert figures["mean"]["num_objects"] == 2
    assert 0 < figures["mean"]["region_similarity"] <= 1
    one = (tmp_path / "frames" / "run", tmp_path / "masks" / "run" / "00000.png")
    capsys.readouterr()
    assert dino("video-segmentation", *one, *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run: 4 frames"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["knn", "COLORS", "missing", "--model", "VIT"], "missing"),
        (["knn", "COLORS", "COLORS"], "`--model` is needed"),
        (["knn", "COLORS/train/red", "COLORS/test", "--model", "VIT"], "have no class"),
        (["features", "COLORS", "--model", "COLORS", "--output", "a.safetensors"], "config.json"),
        (["features", "COLORS", "--model", "VIT", "--output", "no/a.safetensors"], "not exist"),
        (["attention", "missing.png", "--model", "VIT", "--output", "a.png"], "missing.png"),
        (["attention", "missing.png", "--model", "VIT", "--output", "a.xyz"], "a.xyz"),
        (["retrieve", "COLORS", "--queries", "x.png", "--model", "VIT", "--output", "a.png"],
         "x.png"),
        (["jaccard", "COLORS/test/red", "COLORS", "--model", "VIT"], "has a mask of its name"),
        (["attention-video", "COLORS", "--model", "VIT", "--output", "film.doc"], "film.doc"),
        (["knn", "COLORS", "COLORS", "--model", "VIT", "--device", "abacus"], "abacus"),
        (["knn", "COLORS", "COLORS", "--model", "VIT", "--output", "no/a.json"], "not exist"),
    ],
)  # fmt: skip
def test_mistakes_are_told_without_a_traceback(arguments, words, vit, colors, capsys, monkeypatch,
                                               tmp_path):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = {"VIT": str(vit), "COLORS": str(colors)}
    filled = [argument.replace("COLORS", places["COLORS"]) for argument in arguments]
    assert dino(*(places.get(argument, argument) for argument in filled)) == 2
    assert words in capsys.readouterr().err


def test_help_says_what_each_evaluation_does(capsys):
    for evaluation in ("knn", "linear-probe", "retrieve", "attention", "copy-detection"):
        with pytest.raises(SystemExit):
            dino(evaluation, "--help")
        assert "--model" in capsys.readouterr().out
