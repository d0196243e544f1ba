"""The sizes that a configuration may have.

A size far beyond every known model is a mistake, or an attempt to take all memory; it is refused
when the configuration is read, before a tensor is made.
"""

from collections.abc import Iterable, Mapping
from typing import Any


# Ten times and more what published models use.
_MOST = {
    "d_model": 16_384,
    "feed_forward_dim": 131_072,
    "num_attention_heads": 1_024,
    "num_hidden_layers": 1_000,
    "encoder_layers": 1_000,
    "decoder_layers": 1_000,
    "predicate_encoder_layers": 1_000,
    "predicate_decoder_layers": 1_000,
    "num_queries": 20_000,
    "num_predicate_queries": 20_000,
    "num_denoising_groups": 1_000,
    "num_triplet_denoising_groups": 1_000,
    "training_assembling_top_k": 20_000,
    "auxiliary_assignments": 1_000,
    "pair_width": 16_384,
    "image_size": 16_384,
    "patch_size": 1_024,
    "num_channels": 1_024,
    "num_registers": 10_000,
    "num_prototypes": 10_000_000,
    "head_layers": 100,
    "head_hidden_dim": 131_072,
    "head_bottleneck_dim": 16_384,
}
MAX_LABELS = 1_000_000


def check_sizes(config: Any, names: Iterable[str], least: int) -> None:
    """Reject sizes that are too small or far too large.

    Args:
        config: Has the fields.
        names: Of the fields.
        least: The smallest size they may have.

    Raises:
        ValueError: With field, value and limits.
    """
    for name in names:
        size, most = getattr(config, name), _MOST[name]
        if not least <= size <= most:
            raise ValueError(f"`{name}` must be at least {least} and at most {most}, got {size}.")


def check_num_labels(arguments: Mapping[str, Any]) -> None:
    """Reject a `num_labels` for which transformers would make up more names than fit in memory.

    Raises:
        ValueError: With value and limit.
    """
    count = arguments.get("num_labels")
    is_integer = isinstance(count, int) and not isinstance(count, bool)
    if count is not None and not (is_integer and 0 < count <= MAX_LABELS):
        raise ValueError(
            f"`num_labels` must be an integer between 1 and {MAX_LABELS}, got {count!r}."
        )
