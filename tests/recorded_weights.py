"""Weights as a function of a parameter's name and shape, as the recorded figures were made with."""

import hashlib
import json
import math
import re

import numpy as np
import torch


def recorded_weight(name, shape):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    draw = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        weight = 1 + 0.2 * np.abs(draw)
    elif name.endswith("running_mean"):
        weight = np.float32(0.05) * draw
    elif len(shape) == 1:
        is_scale = name.endswith(("weight", "weight_g"))
        weight = np.float32(0.6) + np.float32(0.1) * draw if is_scale else np.float32(0.05) * draw
    else:
        weight = np.float32(1 / math.sqrt(math.prod(shape[1:]))) * draw
    return weight


# All but the first of the blocks of a backbone stage, and of the layers of a transformer.
_DEEPER = re.compile(r"((en|de)coder\.layers|\.(res|layer)\d|decoder_layers(_sub|_obj)?)\.[1-9]")


def recorded_checkpoint(keys_file, *, shallow=False):
    """A checkpoint in the original's format; `shallow` keeps one layer of each stack."""
    entries = json.loads(keys_file.read_text())
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(recorded_weight(name, tuple(shape))))
        for name, shape in entries["keys"].items()
        if not name.endswith("num_batches_tracked") and not (shallow and _DEEPER.search(name))
    }
    for alias, name in entries.get("tied", {}).items():
        if name in weights:
            weights[alias] = weights[name]
    return weights


def make_batch(recorded, mean, std, *, bgr, scale):
    images = [recorded["image.0"], recorded["image.1"]]
    height, width = (max(image.shape[side] for image in images) for side in (0, 1))
    pixel_values = torch.zeros(2, 3, height, width)
    pixel_mask = torch.zeros(2, height, width, dtype=torch.int64)
    for index, image in enumerate(images):
        pixels = image.permute(2, 0, 1).float() * scale
        pixels = pixels.flip(0) if bgr else pixels
        pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        pixel_values[index, :, : pixels.shape[1], : pixels.shape[2]] = pixels
        pixel_mask[index, : pixels.shape[1], : pixels.shape[2]] = 1
    return pixel_values, pixel_mask
