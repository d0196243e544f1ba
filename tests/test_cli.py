import json
import socket

import numpy as np
import pytest
from PIL import Image
from transformers import BertConfig

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
    # A dictionary, as for any two pictures.
    assert json.loads(output.read_text())[str(picture)]["image"]["width"] == 120


def test_an_address_that_is_not_there_loses_no_picture(
    checkpoint_folder, picture, tmp_path, capsys
):
    output = tmp_path / "graphs.json"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.jpg"
        assert predict(checkpoint_folder, picture, address, "--output", output) == 2
    assert address in capsys.readouterr().err
    assert list(json.loads(output.read_text())) == [str(picture)]


def test_drawings_of_pictures_of_one_name_have_their_own_files(checkpoint_folder, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_picture().save(tmp_path / folder / "x.png")
    pictures = [tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"]
    assert predict(checkpoint_folder, *pictures, "--draw", tmp_path / "d.png") == 0
    assert sorted(path.name for path in tmp_path.glob("d*")) == ["d-x-2.png", "d-x.png"]


def test_a_deep_picture_is_drawn_as_the_model_sees_it(checkpoint_folder, tmp_path, monkeypatch):
    levels = np.linspace(0, 65535, 120 * 80).reshape(80, 120).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    drawn = []
    monkeypatch.setattr("sgtr_hf.cli._draw", lambda picture, *_: drawn.append(picture))
    assert predict(checkpoint_folder, tmp_path / "deep.png", "--draw", tmp_path / "d.png") == 0
    assert 100 < np.asarray(drawn[0]).mean() < 155


def test_another_model_is_refused_in_one_line(picture, tmp_path, capsys):
    BertConfig().save_pretrained(tmp_path / "bert")
    assert main(["predict", str(picture), "--model", str(tmp_path / "bert")]) == 2
    error = capsys.readouterr().err
    assert "type bert" in error
    assert "Traceback" not in error


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
        (["predict", "PICTURE", "--output", "EMPTY"], "is a folder"),
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
