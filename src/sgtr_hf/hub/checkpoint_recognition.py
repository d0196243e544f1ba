"""Recognises what wrote a checkpoint, by the names and shapes of its tensors."""

import re
from collections.abc import Mapping

from .checkpoint_filling import Weights, list_names


# A name that only files of a format have.
_SIGNATURES = {
    "detr": re.compile(r"^backbone\.0\.body\."),
    "dino": re.compile(r"^patch_embed\.proj\."),
    "sgtr": re.compile(r"^backbone\.(stem|res\d)\."),
}
# What people have beside those; none of it can be converted.
_RELATIVES = {
    "DETR with masks (panoptic)": re.compile(r"^(detr\.|mask_head\.)"),
    "a model of transformers, which its own `from_pretrained` reads": re.compile(
        r"^(model\.)?(backbone\.(conv_encoder|model)|embeddings\.cls_token|vit\.embeddings)"
    ),
    "a convolutional network of torchvision or timm": re.compile(r"^(layer1\.0|conv_stem)\."),
}
# Rows of the predicate heads of the two releases, for files without class weights.
_RELEASED_ROWS = {50: "sgtr-vg150", 31: "sgtr-openimages"}


def check_format(weights: Weights, checkpoint_format: str) -> None:
    """Make sure of the format.

    Raises:
        ValueError: If the tensors are of another one; says of which.
    """
    family = checkpoint_format.partition("-")[0]
    found = likely_format(weights)
    if found is None or found.partition("-")[0] != family:
        raise ValueError(
            f"The file is not of the format `{checkpoint_format}`: {_describe(found, weights)}. "
            f"Its first names are {list_names(list(weights))}."
        )
    if "-" in found and found != checkpoint_format:
        raise ValueError(
            f"The file is not of the format `{checkpoint_format}`: its predicate head has "
            f"{'a' if found == 'sgtr-openimages' else 'no'} background, as `{found}` has."
        )


def likely_format(weights: Weights) -> str | None:
    """Name the format, "sgtr" if it can be either, or None if it is none that is known."""
    family = _first_match(_SIGNATURES, weights)
    head = weights.get("rel_class_embed.weight")
    if family != "sgtr" or head is None:
        return family
    # One weight a predicate and one for background.
    class_weights = weights.get("rel_criterion.empty_weight")
    if class_weights is None:
        return _RELEASED_ROWS.get(len(head), family)
    return "sgtr-openimages" if len(class_weights) == len(head) else "sgtr-vg150"


def _describe(found: str | None, weights: Weights) -> str:
    if found is not None:
        return f"it looks like `{found}`"
    if not weights:
        return "it holds no tensors"
    relative = _first_match(_RELATIVES, weights)
    return f"it looks like {relative or 'none of the known formats'}"


def _first_match(patterns: Mapping[str, re.Pattern[str]], weights: Weights) -> str | None:
    kinds = (
        kind for kind, pattern in patterns.items() if any(pattern.match(name) for name in weights)
    )
    return next(kinds, None)
