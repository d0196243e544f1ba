import json

import pytest

from sgtr_hf.cli import main
from test_pipeline import make_picture


@pytest.fixture
def picture(tmp_path):
    make_picture().save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def predict(checkpoint_folder, *arguments):
    options = ["--model", str(checkpoint_folder), "--threshold", "0"]
    return main(["predict", *map(str, arguments), *options])


def test_predict_prints_writes_and_draws(checkpoint_folder, picture, tmp_path, capsys):
    output, drawing = tmp_path / "graph.json", tmp_path / "drawing.png"
    assert predict(checkpoint_folder, picture, "--output", output, "--draw", drawing) == 0
    assert "entities" in capsys.readouterr().out
    assert json.loads(output.read_text())["image"] == {"height": 80, "width": 120}
    assert drawing.stat().st_size > 1000


def test_one_broken_file_loses_no_other(checkpoint_folder, picture, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    output = tmp_path / "graphs.json"
    assert predict(checkpoint_folder, broken, picture, "--output", output) == 2
    assert "broken.png" in capsys.readouterr().err
    assert json.loads(output.read_text())["image"]["width"] == 120


def test_a_folder_of_pictures(checkpoint_folder, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(2):
        make_picture(seed=seed).save(folder / f"{seed}.png")
    output = tmp_path / "graphs.json"
    assert predict(checkpoint_folder, folder, "--output", output) == 0
    assert sorted(json.loads(output.read_text())) == [str(folder / f"{n}.png") for n in range(2)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "missing.png"], "missing.png"),
        (["predict", "EMPTY"], "no image"),
        (["predict", "PICTURE", "--model", "EMPTY"], "config.json"),
        (["predict", "PICTURE", "--output", "missing/graph.json"], "does not exist"),
        (["predict", "PICTURE", "--draw", "graph.xyz"], "graph.xyz"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, words, picture, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"PICTURE": str(picture), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--top-k", "0"], ["--threshold", "2"], ["--surprise"]])
def test_wrong_options(option, picture):
    with pytest.raises(SystemExit) as caught:
        main(["predict", str(picture), *option])
    assert caught.value.code == 2
