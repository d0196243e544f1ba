"""Shards that are read by two processes with two workers each, and trained on."""

import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

import dataset_files as files
import sgtr_hf
from sgtr_hf.data.dataset_loading import load_image_stream
from sgtr_hf.data.schema import scene_graph_features
from sgtr_hf.data.training_augmentation import Augmentation
from sgtr_hf.data.training_dataset import SceneGraphDataset
from sgtr_hf.training.loop import Trainer
from tiny_training_run import (
    ENTITIES,
    PREDICATES,
    losses_by_update,
    make_recipe,
    squares_record,
    train,
    write_squares,
)


NUM_IMAGES = 22


def write_shards(folder, lengths):
    """Shards of given lengths, and a validation split."""
    write_squares(folder, num_validation=4)
    (folder / "train-00000-of-00001.parquet").unlink()
    features = scene_graph_features(ENTITIES, PREDICATES)
    first = 0
    for number, length in enumerate(lengths):
        rows = [squares_record(index) for index in range(first, first + length)]
        path = folder / f"train-{number:05d}-of-{len(lengths):05d}.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
        first += length
    return folder


# Shards that the processes can share evenly, that they cannot, that one of them is.
LENGTHS = {"even": [6, 5, 7, 4], "uneven": [9, 5, 8], "one": [NUM_IMAGES]}


@pytest.fixture(scope="module", params=LENGTHS)
def shards(request, tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp(request.param), LENGTHS[request.param])


@pytest.fixture(autouse=True)
def without_sleep(monkeypatch):
    """`datasets` sleeps five seconds where it has read several shards at a time."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def read_ids(items):
    return [item.annotation["image_id"] for item in items]


def ids_of(stream, num_workers, batch_size=3, **settings):
    loader = DataLoader(
        stream, batch_size, num_workers=num_workers, collate_fn=read_ids, **settings
    )
    return [image_id for batch in loader for image_id in batch]


@pytest.mark.parametrize("buffer", [0, 5], ids=["in order", "shuffled"])
def test_two_processes_with_two_workers_lose_and_double_nothing(shards, buffer):
    stream = load_image_stream(shards, "train", shuffle_buffer=buffer, seed=1)
    expected = {f"squares-{index}": 1 for index in range(NUM_IMAGES)}
    orders = []
    for epoch in range(2):
        parts = []
        for rank in range(2):
            part = stream.of_node(rank, 2)
            part.epoch = epoch
            parts.append(ids_of(part, num_workers=2))
        assert Counter(parts[0] + parts[1]) == expected
        assert min(map(len, parts)) > 5
        orders.append(parts)
    assert (orders[0] == orders[1]) == (buffer == 0)


def test_workers_do_not_share_an_epoch(shards, monkeypatch):
    """`datasets` adds to an epoch in shared memory; here it always does so at the worst moment."""

    def set_epoch_slowly(stream, epoch):
        difference = epoch - stream._epoch
        time.sleep(0.2)
        stream._epoch += difference

    stream = load_image_stream(shards, "train", shuffle_buffer=5, seed=1)
    stream.epoch = 1
    alone = ids_of(stream.of_node(0, 2), num_workers=2)
    monkeypatch.setattr("datasets.IterableDataset.set_epoch", set_epoch_slowly)
    assert ids_of(stream.of_node(0, 2), num_workers=2) == alone


def test_processes_train_on_equally_many_batches(shards):
    stream = load_image_stream(shards, "train", shuffle_buffer=5)
    seen = []
    for rank in range(2):
        part = stream.for_training(rank, 2, batch_size=3)
        assert len(part) == 9
        loader = DataLoader(
            part, 3, num_workers=part.num_useful_workers(2), collate_fn=read_ids, drop_last=True
        )
        batches = list(loader)
        assert [len(batch) for batch in batches] == [3, 3, 3]
        assert len(loader) == 3
        seen.append({image_id for batch in batches for image_id in batch})
    # No image in both processes.
    assert not seen[0] & seen[1]


def test_a_stream_without_training_has_no_length(shards):
    stream = load_image_stream(shards, "train")
    with pytest.raises(TypeError, match="for_training"):
        len(stream)
    assert stream.num_images == NUM_IMAGES


def test_augmentation_depends_on_seed_epoch_and_id(shards):
    """Whoever reads an image, in whatever order, changes it alike."""
    augmentation = Augmentation(flip_probability=0.5, brightness=0.3, least_crop=0.5)

    def pixels(seed, epoch, rank, num_nodes):
        stream = load_image_stream(shards, "train", augmentation, seed, shuffle_buffer=7)
        stream = stream.of_node(rank, num_nodes)
        stream.epoch = epoch
        return {item.annotation["image_id"]: item.image.tobytes() for item in stream}

    whole = pixels(0, 1, 0, 1)
    assert pixels(0, 1, 0, 2) | pixels(0, 1, 1, 2) == whole
    assert pixels(0, 2, 0, 1) != whole
    assert pixels(1, 1, 0, 1) != whole


def test_workers_without_shards_are_not_started(tmp_path, caplog):
    stream = load_image_stream(write_shards(tmp_path, [4]), "train")
    part = stream.for_training(0, 1, batch_size=2)
    assert part.num_useful_workers(3) == 1
    assert "2 would have nothing to read" in caplog.text
    loader = DataLoader(part, 2, num_workers=2, collate_fn=read_ids, drop_last=True)
    with pytest.raises(ValueError, match="no shard to read; use fewer workers"):
        list(loader)


def test_a_stream_shows_what_the_rows_show(shards):
    stream, rows = sgtr_hf.data.load(shards, streaming=True), sgtr_hf.data.load(shards)
    assert isinstance(rows, SceneGraphDataset)
    for streamed, item in zip(stream, (rows[index] for index in range(len(rows))), strict=True):
        assert streamed.annotation == item.annotation
        assert streamed.image.tobytes() == item.image.tobytes()
        assert streamed.reference.relations.tolist() == item.reference.relations.tolist()
    graphs = list(stream.references())
    assert [graph.boxes_xyxy.tolist() for graph in graphs] == [
        graph.boxes_xyxy.tolist() for graph in rows.references()
    ]
    with pytest.raises(ValueError, match="`resampling` needs every image"):
        sgtr_hf.data.load(shards, streaming=True, resampling=object())


def streaming_recipe(data, output_dir, num_workers=0, **training):
    recipe = make_recipe(data, output_dir, **training)
    recipe.data.streaming, recipe.data.shuffle_buffer = True, 8
    recipe.data.num_workers = num_workers
    return recipe


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streaming_run_resumes_to_the_bit(tmp_path, without_drawing, num_workers):
    data = write_shards(tmp_path / "data", [7, 6, 9])
    make = partial(streaming_recipe, data, num_workers=num_workers, evaluate_every=100)
    trainer = Trainer(make(tmp_path / "whole"))
    assert (len(trainer.loader), trainer.num_updates) == (5, 10)
    trainer.run()
    stopped = Trainer(make(tmp_path / "half"))
    original = stopped._after_update

    def after_update():
        original()
        if stopped.progress.updates == 7:
            stopped._save_checkpoint()
            raise RuntimeError("killed")

    stopped._after_update = after_update
    with pytest.raises(RuntimeError, match="killed"):
        stopped.run()
    torch.manual_seed(9)
    Trainer(make(tmp_path / "half")).run()
    whole = losses_by_update(tmp_path / "whole")
    half = losses_by_update(tmp_path / "half")
    assert len(whole) == 10
    for update in (1, 5, 8, 9, 10):
        assert half[update] == whole[update], update


def test_a_resumed_epoch_of_a_stream_loses_and_doubles_no_image(tmp_path, without_drawing):
    data = write_shards(tmp_path / "data", [7, 5, 8])
    make = partial(
        streaming_recipe, data, tmp_path / "run", epochs=1, evaluate_every=100, batch_size=2
    )
    trained = []

    def follow(trainer, stop_after):
        original = trainer.task.prepare_update

        def prepare_update(model, batches):
            if trainer.progress.updates == stop_after:
                trainer._save_checkpoint()
                raise RuntimeError("killed")
            trained.extend(name for batch in batches for name in trainer.task.image_ids(batch))
            return original(model, batches)

        trainer.task.prepare_update = prepare_update
        return trainer

    for stop_after in (2, 7):
        with pytest.raises(RuntimeError, match="killed"):
            follow(Trainer(make()), stop_after).run()
    follow(Trainer(make()), -1).run()
    assert Counter(trained) == {f"squares-{index}": 1 for index in range(20)}


def test_scene_graphs_train_on_a_stream(tmp_path, without_drawing):
    data = write_shards(tmp_path / "data", [10, 12])
    recipe = streaming_recipe(data, tmp_path / "run", task="scene_graph", max_steps=2)
    trainer = Trainer(recipe)
    trainer.run()
    # The baseline has counted every relation of the stream.
    assert trainer.task.baseline is not None
    assert len(losses_by_update(tmp_path / "run")) == 2


def test_a_stream_is_checked_before_training(tmp_path):
    records = [squares_record(index) for index in range(8)]
    records[6]["relations"] = [{"subject": 0, "object": 7, "predicate": 1}]
    data = write_squares(tmp_path / "data", train=records)
    with pytest.raises(ValueError, match=r"squares-6: `relations\[0\]\.object`.*6 good records"):
        Trainer(streaming_recipe(data, tmp_path / "run"))
    data = write_squares(tmp_path / "few", train=records[:2])
    with pytest.raises(ValueError, match=r"2 images.*training\.batch_size"):
        Trainer(streaming_recipe(data, tmp_path / "run"))


def test_a_broken_picture_of_a_stream_is_passed_over_on_request(tmp_path, caplog):
    records = [squares_record(index) for index in range(4)]
    records[2]["image"] = {"bytes": b"broken", "path": None}
    data = write_squares(tmp_path, train=records)
    stream = load_image_stream(data, "train")
    with pytest.raises(ValueError, match="Image squares-2: the picture cannot be read"):
        list(stream)
    stream.on_error = "drop"
    assert [image.image_id for image in stream] == ["squares-0", "squares-1", "squares-3"]
    assert "squares-2: the picture cannot be read" in caplog.text


def test_a_broken_picture_names_its_image(caplog):
    features = scene_graph_features(ENTITIES, PREDICATES)
    records = [squares_record(index) for index in range(2)]
    records[1]["image"] = {"bytes": b"broken", "path": None}
    dataset = SceneGraphDataset(Dataset.from_list(records, features=features))
    with pytest.raises(ValueError, match=r"Image squares-1: the picture cannot be read.*validate"):
        dataset[1]
    dataset.on_error = "drop"
    assert [dataset[index].image_id for index in range(2)] == ["squares-0", "squares-0"]
    assert "squares-1: the picture cannot be read" in caplog.text
    assert "The next image takes its place." in caplog.text
    dataset = SceneGraphDataset(dataset.split.select([1]), on_error="drop")
    with pytest.raises(ValueError, match="None of the pictures can be read"):
        dataset[0]
    records[1] = squares_record(1) | {"width": 50}
    dataset = SceneGraphDataset(Dataset.from_list(records, features=features))
    with pytest.raises(ValueError, match=r"squares-1: `width` and `height` are 50.*64 x 64 pixels"):
        dataset[1]


def test_other_formats_are_read_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = files.write_coco_rel(tmp_path / "reltr")
    images = sgtr_hf.data.load(folder, "validation")
    assert images.id2label == dict(enumerate(files.NAMES))
    assert images[1].reference.relations.tolist() == files.RELATIONS[1]
    np.testing.assert_array_equal(images[0].reference.boxes_xyxy, files.BOXES[0])
    (streamed, _) = sgtr_hf.data.load(folder, "val", streaming=True)
    assert streamed.annotation == images[0].annotation
    # A changed file is read again.
    path = folder / "rel.json"
    path.write_text(path.read_text().replace('"11": [[0, 1, 2]]', '"11": []'))
    assert len(sgtr_hf.data.load(folder, "val")[1].reference.relations) == 0
    (folder / "val.json").write_text(
        (folder / "val.json").read_text().replace('"category_id": 3', '"category_id": 9')
    )
    with pytest.raises(ValueError, match=r"val\.json: Image 10: `objects\[2\]\.label`"):
        sgtr_hf.data.load(folder, "val")


def test_training_reads_other_formats(tmp_path, monkeypatch, without_drawing):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = files.write_coco_rel(tmp_path / "reltr")
    recipe = make_recipe(folder, tmp_path / "run", max_steps=1, batch_size=2)
    recipe.data.flip_swaps = None
    Trainer(recipe).run()
    assert len(losses_by_update(tmp_path / "run")) == 1


def test_new_settings_train(tmp_path, without_drawing, caplog):
    """A run with everything on, whose images have several sizes."""
    data = write_squares(tmp_path / "data")
    recipe = make_recipe(data, tmp_path / "run", max_steps=2)
    settings = recipe.data
    settings.flip_swaps, settings.flip_probability = None, 1.0
    settings.saturation = settings.hue = 0.2
    settings.crop_probability, settings.resize_sides = 0.5, [64, 80, 96]
    settings.repeat_threshold, settings.relation_drop_rate = 0.5, 1.0
    with caplog.at_level("INFO"):
        trainer = Trainer(recipe)
    assert "A mirrored image swaps the predicates left of / right of." in caplog.text
    images = trainer.task.splits.train
    assert {min(images[index].image.size) for index in range(20)} == {64, 80, 96}
    assert images[0].annotation["relations"] == [[0, 1, 1]]
    trainer.run()
    assert len(losses_by_update(tmp_path / "run")) == 2
    train(data, tmp_path / "plain", max_steps=1)
