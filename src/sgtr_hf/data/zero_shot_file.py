"""Reads the list of unseen triplets that Scene-Graph-Benchmark.pytorch publishes for VG150."""

import pickle
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray


def read_zero_shot_triplets(path: Path) -> NDArray[np.int64]:
    """Return (n, 3) classes of subject and object, and predicate, from 0.

    Args:
        path: `zeroshot_triplet.pytorch`: a tensor of the same columns, counted from 1.

    Raises:
        ValueError: If it is not such a file.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        triplets = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a file of torch: {error}") from error
    is_table = isinstance(triplets, torch.Tensor) and triplets.shape[1:] == (3,)
    if not is_table or int(triplets.min()) < 1:
        raise ValueError(f"{path} must hold a tensor (n, 3) of numbers from 1.")
    return triplets.long().numpy() - 1
