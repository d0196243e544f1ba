"""Random numbers that follow from a seed for each image, not from what was drawn before.

The noise of an image is then the same whichever process or batch it falls to.
"""

import torch
from torch import Tensor


_WORD = 0xFFFFFFFF
# Entities of an image and numbers of an entity that get numbers of their own.
_ENTITIES, _CHANNELS = 65_536, 8


def seeded_uniform(
    seeds: Tensor, num_groups: int, num_entities: int, num_channels: int, stream: int = 0
) -> Tensor:
    """Draw numbers for the groups of noised annotations of each image.

    Args:
        seeds: (B,) int64.
        num_groups: G.
        num_entities: T; the numbers of an entity do not depend on how many follow it.
        num_channels: Numbers of each entity, at most 8.
        stream: Another one gives other numbers.

    Returns:
        (B, G * T, num_channels) float32 in [0, 1), group by group.
    """
    device = seeds.device
    groups = torch.arange(num_groups, device=device)[:, None, None]
    entities = torch.arange(num_entities, device=device)[:, None]
    channels = torch.arange(num_channels, device=device)
    # (G, T, channels) -> (G * T, channels)
    places = (((groups + stream * 512) * _ENTITIES + entities) * _CHANNELS + channels).flatten(0, 1)
    keys = _scramble(_scramble(seeds & _WORD) ^ (seeds >> 32 & _WORD))
    words = _scramble(_scramble(places & _WORD) ^ (places >> 32) ^ keys[:, None, None])
    # The 24 bits of a float32.
    return (words >> 8).to(torch.float32) * 2.0**-24


def draw_seeds(num_images: int, device: torch.device) -> Tensor:
    """Return seeds (B,) from torch's own random numbers, for images that bring none."""
    return torch.randint(_WORD, (num_images,), device=device)


def _scramble(words: Tensor) -> Tensor:
    """Mix the 32 lower bits: the "lowbias32" permutation found by C. Wellons' hash prospector."""
    words = words ^ (words >> 16)
    words = words * 0x7FEB352D & _WORD
    words = words ^ (words >> 15)
    words = words * 0x846CA68B & _WORD
    return words ^ (words >> 16)
