import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from sgtr_hf.data.reading_processes import prepare_worker, reason_of
from tiny_training_run import make_recipe, squares_record, write_recipe, write_squares


TRAIN = Path(__file__).parent.parent / "scripts" / "train_detr.py"


class Broken:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise ValueError(f"Image {index}: it is\nbroken.")


def test_an_error_of_a_worker_is_told_without_its_traceback():
    loader = DataLoader(Broken(), num_workers=1, worker_init_fn=prepare_worker)
    batches = iter(loader)
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        next(batches)
    assert reason_of(caught.value) == "Image 0: it is\nbroken."
    # The error would keep the process alive for other tests.
    batches._shutdown_workers()
    assert reason_of(ValueError("plain")) == "plain"


def test_a_broken_picture_ends_a_run_that_reads_in_processes_of_its_own(tmp_path):
    # The worker ignores the signals by which multiprocessing ends its processes: without a
    # handler of ours the run would print its error and wait forever.
    records = [squares_record(index) for index in range(20)]
    picture = io.BytesIO()
    records[3]["image"].save(picture, "PNG")
    records[3]["image"] = {"bytes": picture.getvalue()[:60], "path": None}
    data = write_squares(tmp_path / "data", train=records)
    recipe = make_recipe(data, tmp_path / "run", task="detection")
    recipe.data.num_workers = 1
    done = subprocess.run(
        [sys.executable, str(TRAIN), str(write_recipe(recipe, tmp_path))],
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: Image squares-3: the picture cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
