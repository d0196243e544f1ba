"""Weights as a function of a parameter's name and shape, as the recorded figures were made with."""

import hashlib
import json
import math

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


def recorded_checkpoint(keys_file):
    entries = json.loads(keys_file.read_text())
    weights = {
        name: torch.from_numpy(np.ascontiguousarray(recorded_weight(name, tuple(shape))))
        for name, shape in entries["keys"].items()
        if not name.endswith("num_batches_tracked")
    }
    for alias, name in entries.get("tied", {}).items():
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
