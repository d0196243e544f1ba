import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from sgtr_hf.cli import main
from sgtr_hf.data.dataset_writers import write_coco_rel_annotations, write_parquet
from sgtr_hf.data.prediction_file import PredictionFile, PredictionWriter
from sgtr_hf.data.psg_reader import encode_mask
from sgtr_hf.data.record_source import RecordSource
from sgtr_hf.metrics.detection import DetectionAccuracy
from sgtr_hf.metrics.open_images import OpenImagesScore
from sgtr_hf.metrics.recall import Measured, SceneGraphRecall
from sgtr_hf.metrics.training_triplets import count_training_triplets
from sgtr_hf.scene_graph import SceneGraph
from slow_evaluation import random_images
from test_pipeline import make_picture


LABELS, PREDICATES = ("cup", "table", "box", "shelf"), ("on", "in", "under", "by")
NAMES = {"id2label": dict(enumerate(LABELS)), "id2predicate": dict(enumerate(PREDICATES))}
COUNT = 10


def named(graphs):
    return [
        dataclasses.replace(
            graph,
            labels=graph.labels % 4,
            relations=graph.relations % [99, 99, 4],
            predicate_distributions=(
                None
                if graph.predicate_distributions is None or not graph.num_relations
                else np.resize(graph.predicate_distributions, (graph.num_relations, 4))
            ),
            **NAMES,
        )
        for graph in graphs
    ]


@pytest.fixture(scope="module")
def graphs():
    predictions, references, _ = random_images(3, distributions=True, num_images=COUNT)
    return named(predictions), named(references)


def record_of(number, graph, folder):
    path = folder / f"picture-{number}.png"
    Image.new("RGB", (100, 100)).save(path)
    entities = zip(graph.boxes_xyxy.tolist(), graph.labels.tolist(), strict=True)
    rows = graph.relations.tolist()
    return {
        "image": {"path": str(path), "bytes": None},
        "image_id": str(number),
        "width": 100,
        "height": 100,
        "objects": [
            {"id": row, "bbox": box, "label": label} for row, (box, label) in enumerate(entities)
        ],
        "relations": [
            {"subject": subject, "object": object_, "predicate": predicate}
            for subject, object_, predicate in rows
        ],
    }


@pytest.fixture(scope="module")
def files(graphs, tmp_path_factory):
    """Annotations as shards and as COCO, and predictions in another order."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "pictures").mkdir()
    predictions, references = graphs
    records = [record_of(*entry, folder / "pictures") for entry in enumerate(references)]
    source = RecordSource(LABELS, PREDICATES, lambda _: iter(records), "memory")
    for split, part in (("test", records), ("train", records[:3])):
        write_parquet(source, part, folder / "shards", split)
    write_coco_rel_annotations(source, records, folder / "coco", "test")
    write_predictions(folder / "predictions.parquet", predictions)
    return folder


def write_predictions(path, graphs, ids=None):
    with PredictionWriter(
        path, NAMES["id2label"], NAMES["id2predicate"], distributions=True
    ) as out:
        for number in reversed(range(len(graphs))) if ids is None else ids:
            out.write(str(number), graphs[number], f"elsewhere/picture-{number}.jpg")
    return path


def run(*arguments):
    return main(["evaluate", *map(str, arguments)])


@pytest.mark.parametrize("protocol", ["strict", "scene_graph_benchmark", "egtr", "as_emitted"])
def test_report_equals_the_metric(files, graphs, protocol, tmp_path, capsys):
    output = tmp_path / "report.json"
    arguments = ("--protocol", protocol, "--top-k", 5, 20, "--train-split", "train")
    code = run(
        files / "predictions.parquet", files / "shards", *arguments, "--f1-threshold", 0.25,
        "--output", output, "--csv", tmp_path / "table.csv",
    )  # fmt: skip
    assert code == 0
    metric = SceneGraphRecall(
        (5, 20),
        protocol,
        len(PREDICATES),
        seen_triplets=count_training_triplets(graphs[1][:3]),
        measured=Measured(precision=True, threshold=0.25),
    )
    metric.update(*graphs)
    expected = metric.compute()
    report = json.loads(output.read_text())
    for name, value in expected.items():
        if "@" in name and "mR_" not in name:
            assert report["recall"][name] == value, name
    assert report["recall"]["precision"]["F1"] == expected["precision"]["F1"]
    assert report["recall"]["protocol"]["name"] == protocol
    assert report["images"]["paired"] == COUNT
    printed = capsys.readouterr().out
    assert f"{expected['R@5']:8.4f}{expected['R@20']:8.4f}" in printed
    assert f"protocol {protocol}" in printed
    assert "1 is 100 %" in printed
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    by_name = expected["per_predicate"]["R@20"]
    assert {row["predicate"]: float(row["R@20"]) for row in rows} == {
        PREDICATES[int(number)]: value for number, value in by_name.items()
    }
    assert {row["group"] for row in rows} <= {"head", "body", "tail"}


def test_plots_are_drawn(files, tmp_path, capsys):
    folder = tmp_path / "new" / "plots"
    assert run(files / "predictions.parquet", files / "shards", "--plots", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "precision_recall.png", "predicates.png", "reliability.png",
    ]  # fmt: skip
    assert str(folder / "reliability.png") in capsys.readouterr().out


def test_open_images_and_detections_are_added(files, graphs, tmp_path, capsys):
    output = tmp_path / "report.json"
    options = ("--open-images", "--detection", "--protocol", "egtr", "--output", output)
    assert run(files / "predictions.parquet", files / "shards", *options) == 0
    report = json.loads(output.read_text())
    for name, metric in (
        ("open_images", OpenImagesScore("egtr")),
        ("detection", DetectionAccuracy()),
    ):
        metric.update(*graphs)
        for figure, value in metric.compute().items():
            if isinstance(value, float):
                expected = None if np.isnan(value) else pytest.approx(value, abs=1e-12)
                assert report[name][figure] == expected, figure
    assert "Open Images, protocol egtr: micro_R@50" in capsys.readouterr().out


def test_images_of_coco_are_found_by_file_name(files, tmp_path):
    # COCO counts images from 1 where ids are no numbers that fit; names of files stay.
    reports = []
    for references, match in (("shards", "image-id"), ("coco", "file-name")):
        output = tmp_path / f"{match}.json"
        predictions = files / "predictions.parquet"
        if match == "file-name":
            predictions = rename(files, tmp_path / "renamed.parquet")
        assert run(predictions, files / references, "--match", match, "--output", output) == 0
        reports.append(json.loads(output.read_text())["recall"])
    assert reports[0] == reports[1]


def rename(files, path):
    with PredictionWriter(
        path, NAMES["id2label"], NAMES["id2predicate"], distributions=True
    ) as out:
        for prediction in PredictionFile(files / "predictions.parquet"):
            out.write("other", prediction.graph, f"elsewhere/{prediction.image_id}.jpg")
    return path


def test_images_without_prediction_count_as_0(files, graphs, tmp_path, capsys):
    predictions = write_predictions(tmp_path / "some.parquet", graphs[0], range(4))
    output = tmp_path / "report.json"
    assert run(predictions, files / "shards", "--output", output) == 0
    report = json.loads(output.read_text())
    assert report["images"] == {
        "paired": 4, "annotated_without_prediction": 6, "predicted_without_annotation": 0,
    }  # fmt: skip
    annotated = sum(graph.num_relations > 0 for graph in graphs[1])
    assert report["recall"]["num_images"] == annotated
    assert "6 annotated ones are not in the predictions" in capsys.readouterr().out


def test_predictions_without_annotation(files, graphs, tmp_path, capsys):
    extra = write_predictions(tmp_path / "extra.parquet", [*graphs[0], graphs[0][0]])
    assert run(extra, files / "shards") == 2
    assert "1 predictions are of images without annotation, as '10'" in capsys.readouterr().err
    assert run(extra, files / "shards", "--allow-unmatched") == 0
    assert "1 predicted ones are not annotated" in capsys.readouterr().out
    foreign = rename(files, tmp_path / "foreign.parquet")
    with PredictionWriter(foreign, NAMES["id2label"], NAMES["id2predicate"]) as out:
        out.write("a.jpg", graphs[0][0])
    assert run(foreign, files / "shards", "--allow-unmatched") == 2
    message = capsys.readouterr().err
    assert "No prediction is of an annotated image" in message
    assert "'a.jpg'" in message
    assert "--match" in message


def test_an_image_that_comes_twice_is_an_error(files, graphs, tmp_path, capsys):
    twice = write_predictions(tmp_path / "twice.parquet", graphs[0], [0, 1, 2, 1])
    assert run(twice, files / "shards") == 2
    assert "The predictions have two images '1'" in capsys.readouterr().err


def test_given_entities_need_the_annotated_ones(files, graphs, tmp_path, capsys):
    assert run(files / "predictions.parquet", files / "shards", "--mode", "predcls") == 2
    assert "has the annotated entities" in capsys.readouterr().err
    truth = write_predictions(
        tmp_path / "truth.parquet",
        [
            dataclasses.replace(
                graph,
                labels=np.zeros_like(graph.labels),
                predicate_distributions=np.eye(4)[graph.relations[:, 2]],
            )
            for graph in graphs[1]
        ],
    )
    output = tmp_path / "report.json"
    options = ("--mode", "predcls", "--protocol", "as_emitted", "--output", output)
    assert run(truth, files / "shards", *options) == 0
    report = json.loads(output.read_text())["recall"]
    assert (report["R@20"], report["mode"]) == (1, "predcls")


def test_a_published_list_of_unseen_triplets(files, graphs, tmp_path):
    unseen = np.array([[0, 1, 2], [1, 0, 0], [1, 1, 1]])
    torch.save(torch.from_numpy(unseen + 1), tmp_path / "zeroshot_triplet.pytorch")
    output = tmp_path / "report.json"
    options = ("--zero-shot", tmp_path / "zeroshot_triplet.pytorch", "--output", output)
    assert run(files / "predictions.parquet", files / "shards", *options) == 0
    rows = [
        {
            tuple(row)
            for row in np.column_stack((one.labels[one.relations[:, :2]], one.relations[:, 2]))
        }
        for one in graphs[1]
    ]
    found = any(row & {tuple(entry) for entry in unseen} for row in rows)
    value = json.loads(output.read_text())["recall"]["zR@100"]
    assert (value is not None) == found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["FILES/missing.parquet", "FILES/shards"], "There is no file"),
        (["FILES/predictions.parquet", "FILES/nothing"], "nothing"),
        (["FILES/shards", "FILES/shards"], "`objects` lack score"),
        (["FILES/predictions.parquet", "FILES/shards", "--split", "other"], "other"),
        (
            ["FILES/predictions.parquet", "FILES/shards", "--output", "FILES/no/r.json"],
            "does not exist",
        ),
        (["FILES/predictions.parquet", "FILES/shards", "--groups", "vg150"], "of 50 predicates"),
        (["FILES/predictions.parquet", "FILES/shards", "--top-k", "0"], "top_k"),
        (["FILES/predictions.parquet", "FILES/shards", "--zero-shot", "FILES/coco"], "no file"),
        (["FILES/predictions.parquet", "FILES/shards", "--match-masks"], "no `masks`"),
        (
            [
                "FILES/predictions.parquet", "FILES/shards", "--open-images",
                "--protocol", "scene_graph_benchmark",
            ],
            "strict, egtr, as_emitted",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told_without_a_traceback(arguments, words, files, capsys):
    assert run(*(argument.replace("FILES", str(files)) for argument in arguments)) == 2
    assert words in capsys.readouterr().err


def test_other_names_are_an_error(files, graphs, tmp_path, capsys):
    path = tmp_path / "swapped.parquet"
    swapped = {0: "table", 1: "cup", 2: "box", 3: "shelf"}
    with PredictionWriter(path, swapped, NAMES["id2predicate"]) as out:
        out.write("0", dataclasses.replace(graphs[0][0], id2label=swapped))
    assert run(path, files / "shards") == 2
    assert re.search(r"Number 0 of the classes is 'table' .* but 'cup'", capsys.readouterr().err)
    with PredictionWriter(path, NAMES["id2label"], {0: "on"}):
        pass
    assert run(path, files / "shards") == 2
    assert "knows 1 predicates" in capsys.readouterr().err


def test_predict_writes_what_evaluate_reads(checkpoint_folder, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        make_picture(seed=seed).save(folder / f"{seed}.png")
    output = tmp_path / "graphs.parquet"
    options = ["--model", str(checkpoint_folder), "--threshold", "0", "--output", str(output)]
    assert main(["predict", str(folder), *options]) == 0
    source = PredictionFile(output)
    assert source.entity_names == ["cup", "table", "box"]
    predictions = list(source)
    assert [one.image_id for one in predictions] == ["0", "1", "2"]
    assert predictions[0].graph.predicate_distributions is not None
    assert predictions[0].graph.image_size == (80, 120)


def test_predict_wants_one_name_a_picture(checkpoint_folder, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        make_picture().save(tmp_path / folder / "same.png")
    pictures = [str(tmp_path / folder) for folder in ("a", "b")]
    options = ["--model", str(checkpoint_folder), "--output", str(tmp_path / "graphs.parquet")]
    assert main(["predict", *pictures, *options]) == 2
    assert "2 pictures are called same" in capsys.readouterr().err


def test_masks_are_compared_instead_of_boxes(tmp_path):
    masks = np.zeros((3, 40, 60), dtype=np.bool_)
    for row in range(3):
        masks[row, 12 * row : 12 * row + 10, 5:17] = True
    boxes = [[5, 12 * row, 17, 12 * row + 10] for row in range(3)]
    Image.new("RGB", (60, 40)).save(tmp_path / "picture.png")
    record = {
        "image": {"path": str(tmp_path / "picture.png"), "bytes": None},
        "image_id": "1", "width": 60, "height": 40,
        "objects": [
            {"id": row, "bbox": boxes[row], "label": row,
             "mask": {"bytes": encode_mask(masks[row]), "path": None}}
            for row in range(3)
        ],
        "relations": [
            {"subject": 0, "object": 1, "predicate": 0},
            {"subject": 1, "object": 2, "predicate": 1},
        ],
    }  # fmt: skip
    source = RecordSource(LABELS, PREDICATES, lambda _: iter([record]), "memory", has_masks=True)
    write_parquet(source, [record], tmp_path / "shards", "test")
    # The box of the third entity is right, its mask is not.
    moved = masks.copy()
    moved[2] = masks[0]
    graph = SceneGraph(
        boxes, [0, 1, 2], [1, 1, 1], [[0, 1, 0], [1, 2, 1]], [0.9, 0.8], (40, 60), masks=moved
    )
    path = tmp_path / "masks.parquet"
    with PredictionWriter(path, NAMES["id2label"], NAMES["id2predicate"], masks=True) as out:
        out.write("1", graph)
    for options, recall in (((), 1), (("--match-masks",), 0.5)):
        output = tmp_path / "report.json"
        assert run(path, tmp_path / "shards", "--output", output, *options) == 0
        assert json.loads(output.read_text())["recall"]["R@20"] == recall
