import dataclasses
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgtr_hf.data.prediction_file import (
    GROUP_IMAGES,
    PredictionFile,
    PredictionWriter,
    prediction_features,
)
from sgtr_hf.scene_graph import SceneGraph
from slow_evaluation import random_images


ID2LABEL = dict(enumerate(("cup", "table", "box", "shelf")))
ID2PREDICATE = dict(enumerate(("on", "in", "under", "by")))
NAMES = {"id2label": ID2LABEL, "id2predicate": ID2PREDICATE}


def random_graphs(count, *, distributions=True, masks=False):
    generator = np.random.default_rng(0)
    graphs = []
    for graph in random_images(0, distributions=False, num_images=count)[0]:
        table = generator.random((graph.num_relations, 4), dtype=np.float32)
        shape = (graph.num_entities, 100, 100)
        graphs.append(
            dataclasses.replace(
                graph,
                labels=graph.labels % 4,
                scores=generator.random(graph.num_entities),
                relations=graph.relations % [99, 99, 4],
                predicate_distributions=table if distributions and len(table) else None,
                masks=generator.random(shape) < 0.5 if masks else None,
                **NAMES,
            )
        )
    return graphs


def write(path, graphs, **arguments):
    with PredictionWriter(path, ID2LABEL, ID2PREDICATE, **arguments) as writer:
        for number, graph in enumerate(graphs):
            writer.write(f"image-{number}", graph, f"folder/{number}.jpg")
    return path


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("distributions", [False, True])
def test_graphs_come_back_to_the_last_bit(tmp_path, distributions, masks):
    count = GROUP_IMAGES + 6 if not masks else 5
    graphs = random_graphs(count, distributions=distributions, masks=masks)
    path = write(tmp_path / "graphs.parquet", graphs, distributions=distributions, masks=masks)
    source = PredictionFile(path)
    assert (source.count, source.entity_names) == (count, list(ID2LABEL.values()))
    assert source.predicate_names == list(ID2PREDICATE.values())
    for number, (image_id, file_name, graph) in enumerate(source):
        assert (image_id, file_name) == (f"image-{number}", f"{number}.jpg")
        expected = graphs[number]
        if distributions and not expected.num_relations:
            expected = dataclasses.replace(expected, predicate_distributions=np.zeros((0, 4)))
        assert graph == expected
    assert [path.name for path in tmp_path.iterdir()] == ["graphs.parquet"]


def test_datasets_reads_the_file_as_its_features_say(tmp_path):
    graphs = random_graphs(4)
    path = write(tmp_path / "graphs.parquet", graphs, distributions=True)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    expected = prediction_features(
        list(ID2LABEL.values()), list(ID2PREDICATE.values()), distributions=True
    )
    assert loaded.features == expected
    row = loaded.remove_columns("image")[0]
    assert row["objects"][0]["score"] == graphs[0].scores[0]
    np.testing.assert_array_equal(
        [entry["distribution"] for entry in row["relations"]], graphs[0].predicate_distributions
    )


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    graphs = random_graphs(6)
    for shard, part in enumerate((graphs[:2], graphs[2:])):
        write(tmp_path / f"{shard}.parquet", part, distributions=True)
    source = PredictionFile(tmp_path)
    assert source.count == len(list(source)) == 6
    with PredictionWriter(tmp_path / "2.parquet", {0: "cup"}, ID2PREDICATE):
        pass
    with pytest.raises(ValueError, match=r"2\.parquet has other names than .*0\.parquet"):
        PredictionFile(tmp_path)


def test_reading_takes_no_more_memory_for_longer_files(tmp_path):
    generator = np.random.default_rng(0)
    predicates = {number: str(number) for number in range(50)}
    relations = np.array([[0, 1, 0]] * 40)
    path = tmp_path / "long.parquet"
    with PredictionWriter(path, ID2LABEL, predicates, distributions=True) as writer:
        for number in range(8 * GROUP_IMAGES):
            graph = SceneGraph(
                [[0, 0, 9, 9], [1, 1, 8, 8]], [0, 1], [1, 1], relations, np.ones(40), (10, 10),
                predicate_distributions=generator.random((40, 50)),
            )  # fmt: skip
            writer.write(str(number), graph)
    assert path.stat().st_size > 6e6
    before = pa.total_allocated_bytes()
    assert max(pa.total_allocated_bytes() - before for _ in PredictionFile(path)) < 5e6


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    graph = random_graphs(1)[0]
    path = tmp_path / "graphs.parquet"
    writer = PredictionWriter(path, ID2LABEL, ID2PREDICATE)
    writer.write("1", graph)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_an_error(tmp_path):
    graph = dataclasses.replace(random_graphs(1)[0], predicate_distributions=None)
    for fields, words in (
        ({"distributions": True}, "Image 1: the graph has no `predicate_distributions`"),
        ({"masks": True}, "Image 1: the graph has no `masks`"),
    ):
        with (
            pytest.raises(ValueError, match=words),
            PredictionWriter(tmp_path / "a.parquet", ID2LABEL, ID2PREDICATE, **fields) as writer,
        ):
            writer.write("1", graph)
    with (
        pytest.raises(ValueError, match=r"Image 1: `labels` must be below 1"),
        PredictionWriter(tmp_path / "a.parquet", {0: "cup"}, ID2PREDICATE) as writer,
    ):
        writer.write("1", dataclasses.replace(graph, labels=np.full(graph.num_entities, 1)))


def broken_file(tmp_path, change, **arguments):
    """Five good records, the fourth of which is changed in its plain form."""
    arguments = {"distributions": True} | arguments
    path = write(tmp_path / "broken.parquet", random_graphs(5, **arguments), **arguments)
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows[3])
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return path


def set_box(value):
    def change(row):
        row["objects"][0]["bbox"] = value

    return change


def set_field(column, name, value):
    def change(row):
        row[column][0][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(set_field("objects", "label", 9), r"`labels` holds 9", id="label"),
        pytest.param(set_field("objects", "label", -1), r"`labels` holds -1", id="unnamed label"),
        pytest.param(
            set_field("objects", "score", float("nan")), "`scores` must be finite", id="score"
        ),
        pytest.param(set_box([float("nan"), 0, 1, 1]), "`boxes_xyxy` must be finite", id="box"),
        pytest.param(set_box([9, 0, 1, 1]), "`boxes_xyxy` must have x2 >= x1", id="inverted box"),
        pytest.param(set_field("relations", "subject", 99), "`relations` holds 99", id="dangling"),
        pytest.param(set_field("relations", "predicate", 7), "`relations` holds 7", id="predicate"),
        pytest.param(
            set_field("relations", "score", float("nan")), "`relation_scores` must be finite",
            id="relation score",
        ),
        pytest.param(
            set_field("relations", "distribution", [float("nan")] * 4),
            "`predicate_distributions` must be finite", id="distribution",
        ),
    ],
)  # fmt: skip
def test_wrong_records_name_file_record_field_and_good_ones(tmp_path, change, words):
    path = broken_file(tmp_path, change)
    good = []
    place = rf"{re.escape(str(path))}: record 3 \(image image-3\): .*{words}.* 3 good records"
    with pytest.raises(ValueError, match=place):
        good.extend(PredictionFile(path))
    assert len(good) == 3


def test_missing_entries_are_an_error(tmp_path):
    path = broken_file(tmp_path, set_field("objects", "score", None))
    with pytest.raises(ValueError, match=r"broken.*`objects.score` must not be missing.*0 good"):
        list(PredictionFile(path))


def test_broken_masks_are_an_error(tmp_path):
    change = set_field("objects", "mask", {"bytes": b"no picture", "path": None})
    path = broken_file(tmp_path, change, masks=True)
    with pytest.raises(ValueError, match=r"record 3 .*cannot identify image.*3 good"):
        list(PredictionFile(path))


def test_files_of_another_kind_are_an_error(tmp_path):
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"image_id": ["1"]}), other)
    annotation = tmp_path / "annotation.parquet"
    features = prediction_features(["cup"], ["on"])
    for column in ("objects", "relations"):
        entries = {name: kind for name, kind in features[column].feature.items() if name != "score"}
        features[column] = datasets.List(entries)
    pq.write_table(features.arrow_schema.empty_table(), annotation)
    for path, words in (
        (tmp_path / "missing.parquet", "There is no file"),
        (text, "is not Parquet"),
        (empty, "has no Parquet file of predictions"),
        (other, "lacks the columns width, height, objects, relations"),
        (annotation, "`objects` lack score; predictions need scores, is this an annotation"),
    ):
        with pytest.raises(ValueError, match=words):
            PredictionFile(path)


def test_a_file_without_pictures_will_do(tmp_path):
    path = write(tmp_path / "graphs.parquet", random_graphs(3), distributions=True)
    pq.write_table(pq.read_table(path).drop_columns(["image"]), path)
    assert [one.file_name for one in PredictionFile(path)] == [None] * 3
    assert isinstance(next(iter(PredictionFile(path))).graph, SceneGraph)
