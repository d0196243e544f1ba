import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, pipeline

import sgtr_hf
from conftest import small_config
from sgtr_hf.cli import main
from sgtr_hf.data.annotation import AnnotationSettings, Annotator
from sgtr_hf.data.corpus import open_corpus
from sgtr_hf.data.prediction_file import PredictionFile


COUNT = 11


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    backbone = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    config = small_config(detector={"backbone_config": backbone})
    sgtr_hf.SgtrForSceneGraphGeneration(config).save_pretrained(folder)
    sgtr_hf.SgtrImageProcessor(size={"height": 48, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        pixels = generator.integers(0, 255, (60 + number, 90, 3)).astype(np.uint8)
        where = folder / "more" if number % 2 else folder
        Image.fromarray(pixels).save(where / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def annotator(model_folder):
    model = sgtr_hf.SgtrForSceneGraphGeneration.from_pretrained(model_folder)
    processor = sgtr_hf.SgtrImageProcessor.from_pretrained(model_folder)

    def make(output, workers=0, **settings):
        defaults = {"batch_size": 2, "chunk_images": 3, "threshold": 0.0, "top_k": 5}
        chosen = AnnotationSettings("tiny", "abc", **(defaults | settings))
        return Annotator(model, processor, chosen, output, workers)

    return make


def read(folder):
    return {prediction.image_id: prediction.graph for prediction in PredictionFile(folder)}


def names(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


@pytest.fixture(scope="module")
def whole(annotator, pictures, tmp_path_factory):
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    report = annotator(folder).run(open_corpus(pictures, "train", 3))
    assert report == (COUNT, 0, 0)
    return folder


def test_every_picture_gets_the_graph_of_the_pipeline(whole, pictures, model_folder):
    graphs = read(whole)
    assert PredictionFile(whole).count == COUNT
    assert sorted(graphs) == sorted(
        str(path.relative_to(pictures).with_suffix("")) for path in pictures.rglob("*.png")
    )
    generate = pipeline("scene-graph", model=str(model_folder))
    for image_id in ("00", "more/07"):
        expected = generate(str(pictures / f"{image_id}.png"), top_k=5)
        np.testing.assert_allclose(
            graphs[image_id].relation_scores, expected.relation_scores, rtol=1e-4
        )
        assert graphs[image_id].image_size == expected.image_size


def test_the_files_name_the_model(whole):
    rows = datasets.load_dataset(str(whole), split="train").remove_columns("image")
    assert set(rows["model"]) == {"tiny"}
    assert set(rows["revision"]) == {"abc"}


def test_processes_share_the_work_and_workers_change_nothing(annotator, whole, pictures, tmp_path):
    reports = [
        annotator(tmp_path, workers=rank).run(open_corpus(pictures, "train", 3), rank, 2)
        for rank in range(2)
    ]
    assert sum(report.annotated for report in reports) == COUNT
    assert min(report.annotated for report in reports) > 0
    assert names(tmp_path) == names(whole)
    assert read(tmp_path) == read(whole)


class _StopError(RuntimeError):
    pass


class _StopAfter:
    """Ends a run as a kill would, after so many batches."""

    def __init__(self, batches):
        self.batches = batches

    def update(self, _):
        self.batches -= 1
        if self.batches < 0:
            raise _StopError


@pytest.mark.parametrize("batches", [0, 1, 2, 4, 6])
def test_a_stopped_run_goes_on_without_loss_or_doubling(
    annotator, whole, pictures, tmp_path, batches
):
    corpus = open_corpus(pictures, "train", 3)
    with pytest.raises(_StopError):
        annotator(tmp_path).run(corpus, progress=_StopAfter(batches))
    # What a kill leaves behind.
    (tmp_path / ".unfinished-graphs-00003-00000.parquet").write_bytes(b"half")
    # Another number of processes goes on.
    for rank in range(3):
        annotator(tmp_path).run(corpus, rank, 3)
    assert names(tmp_path) == names(whole)
    assert read(tmp_path) == read(whole)
    assert PredictionFile(tmp_path).count == COUNT


def test_a_finished_run_does_nothing(annotator, pictures, tmp_path):
    corpus = open_corpus(pictures, "train", 3)
    annotator(tmp_path).run(corpus)
    times = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.parquet"))]
    assert annotator(tmp_path).run(corpus).annotated == 0
    assert times == [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*.parquet"))]


def test_other_settings_or_pictures_are_refused(annotator, pictures, tmp_path):
    corpus = open_corpus(pictures, "train", 3)
    annotator(tmp_path).run(corpus)
    with pytest.raises(ValueError, match="`top_k` 5, not 6"):
        annotator(tmp_path, top_k=6).run(corpus)
    with pytest.raises(ValueError, match="`corpus`"):
        annotator(tmp_path).run(open_corpus(pictures / "more", "train", 3))


def test_broken_pictures_are_named_and_the_rest_stays(annotator, pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"no picture")
    whole_file = (pictures / "00.png").read_bytes()
    (folder / "b.png").write_bytes(whole_file[: len(whole_file) // 2])
    (folder / "c.png").write_bytes(whole_file)
    report = annotator(tmp_path / "out", chunk_images=5).run(open_corpus(folder, "train", 5))
    assert (report.annotated, report.broken) == (1, 2)
    lines = (tmp_path / "out" / "_broken-00000-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == ["a", "b"]


def test_a_picture_that_cannot_be_resized_takes_no_other_with_it(
    annotator, pictures, tmp_path, monkeypatch
):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (1, 3000)).save(folder / "a.png")
    (folder / "b.png").write_bytes((pictures / "00.png").read_bytes())
    made = annotator(tmp_path / "out")
    processor = sgtr_hf.SgtrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})
    monkeypatch.setattr(made, "image_processor", processor)
    report = made.run(open_corpus(folder, "train", 5))
    assert (report.annotated, report.broken) == (1, 1)
    [line] = (tmp_path / "out" / "_broken-00000-00000.jsonl").read_text().splitlines()
    assert "1 x 3000 pixels is refused" in json.loads(line)["error"]


def test_a_file_that_was_deleted_is_made_again(annotator, whole, pictures, tmp_path):
    corpus = open_corpus(pictures, "train", 3)
    annotator(tmp_path).run(corpus)
    (tmp_path / names(tmp_path)[1]).unlink()
    assert annotator(tmp_path).run(corpus).annotated == 3
    assert read(tmp_path) == read(whole)


@pytest.fixture(scope="module")
def shards(pictures, tmp_path_factory):
    """The same pictures in two Parquet shards, with their bytes."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(pictures.rglob("*.png"))
    features = datasets.Features({"photo": datasets.Image(), "id": datasets.Value("int64")})
    for number, part in enumerate((files[:7], files[7:])):
        entries = [{"bytes": file.read_bytes(), "path": file.name} for file in part]
        rows = {"photo": entries, "id": [int(file.stem) for file in part]}
        path = folder / f"train-{number:05d}-of-00002.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return folder


def test_parquet_is_streamed_by_its_shards_and_resumed(annotator, whole, shards, tmp_path):
    corpus = open_corpus(shards, "train", 3)
    assert len(corpus.shards) == 2
    with pytest.raises(_StopError):
        annotator(tmp_path).run(corpus, progress=_StopAfter(3))
    for rank in range(2):
        annotator(tmp_path).run(corpus, rank, 2)
    expected = {str(int(Path(name).name)): graph for name, graph in read(whole).items()}
    found = read(tmp_path)
    assert PredictionFile(tmp_path).count == COUNT
    assert set(found) == set(expected)
    for image_id, graph in found.items():
        np.testing.assert_allclose(
            graph.relation_scores, expected[image_id].relation_scores, rtol=1e-4
        )
    # Complete shards are not even opened again.
    for shard in corpus.shards:
        assert (tmp_path / f".complete-{shard.name}").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: open_corpus(folder, "train", 3), "hold no image"),
        (lambda folder: open_corpus(folder / "missing.txt", "train", 3), "missing.txt"),
    ],
    ids=["no image", "no data"],
)
def test_what_is_no_corpus_is_an_error(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_the_column_of_pictures_must_be_one(shards):
    with pytest.raises(ValueError, match="no column nothing; the columns are photo, id"):
        open_corpus(shards, "train", 3, id_column="nothing")
    with pytest.raises(ValueError, match="`--image-column`"):
        open_corpus(shards, "train", 3, image_column="picture")


def test_the_command_writes_what_evaluate_reads(pictures, model_folder, tmp_path, capsys):
    arguments = ["annotate", str(pictures), str(tmp_path / "out"), "--model", str(model_folder)]
    assert main([*arguments, "--workers", "0", "--threshold", "0", "--chunk-images", "4"]) == 0
    assert f"annotated {COUNT} images" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "_annotation.json").read_text())
    assert manifest["revision"].startswith("sha256:")
    assert PredictionFile(tmp_path / "out").count == COUNT
    assert main([*arguments, "--workers", "0", "--threshold", "0.5"]) == 2
    assert "`chunk_images` 4, not 1000" in capsys.readouterr().err


def test_processes_that_do_not_know_of_each_other_are_refused(
    pictures, model_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = ["annotate", str(pictures), str(tmp_path / "out"), "--model", str(model_folder)]
    assert main(arguments) == 2
    assert "2 processes were started, but accelerate sees 1" in capsys.readouterr().err


@pytest.mark.slow
def test_kill_and_two_processes(pictures, whole, model_folder, tmp_path):
    """kill -9 of a run at moments of any kind; then two processes of accelerate finish it."""
    command = [
        *("-m", "sgtr_hf", "annotate", pictures, tmp_path / "out", "--model", model_folder),
        *("--batch-size", "2", "--chunk-images", "3", "--threshold", "0", "--top-k", "5"),
    ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    for wanted in (1, 2):
        process = subprocess.Popen([sys.executable, *map(str, command)], env=environment)
        while len(list((tmp_path / "out").glob("graphs-*.parquet"))) < wanted:
            assert process.poll() in (None, 0)
            time.sleep(0.001)
        process.kill()
        process.wait()
    # Says GPUs, and starts two processes without any; `--cpu` would start one.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    finished = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    for rank in range(2):
        assert f"process {rank} of 2" in finished.stdout
    assert PredictionFile(tmp_path / "out").count == COUNT
    assert set(read(tmp_path / "out")) == set(read(whole))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(annotator, pictures, tmp_path):
    file = next(pictures.rglob("*.png")).read_bytes()
    folder = tmp_path / "pictures"
    folder.mkdir()
    peaks = []
    for count in (300, 1500):
        for number in range(count):
            (folder / f"{number:05d}.png").write_bytes(file)
        corpus = open_corpus(folder, "train", 500)
        output = tmp_path / f"out-{count}"
        annotator(output, batch_size=8, chunk_images=500, top_k=50).run(corpus)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    # In kilobytes.
    assert peaks[1] - peaks[0] < 30_000


def test_output_within_the_pictures_is_refused(pictures, model_folder, capsys):
    arguments = ["annotate", str(pictures), str(pictures / "out"), "--model", str(model_folder)]
    assert main(arguments) == 2
    assert "lies within" in capsys.readouterr().err
    assert not (pictures / "out").exists()


def test_other_parquet_files_or_columns_are_another_corpus(shards, tmp_path):
    first = open_corpus(shards, "train", 3).fingerprint
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert open_corpus(moved, "train", 3).fingerprint == first
    assert open_corpus(f"{moved}/", "train", 3).fingerprint == first
    assert open_corpus(moved, "train", 3, id_column="photo").fingerprint != first
    path = min(moved.glob("*.parquet"))
    datasets.Dataset.from_parquet(str(path)).select(range(3)).to_parquet(path)
    assert open_corpus(moved, "train", 3).fingerprint != first
