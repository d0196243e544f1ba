"""Collects attention weights on their way through a model, for maps and analyses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .transformer_layers import AttentionBackend


@contextmanager
def record_attention(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Note the weights of every attention that runs while the context is open.

    Args:
        model: Any model of this package, with eager attention: fused backends never form weights.

    Yields:
        A dictionary that fills up: name of the attention module, and weights
        (B, heads, queries, keys) of its last call.

    Raises:
        ValueError: If the backend does not return weights.
    """
    attentions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AttentionBackend)
    }
    backends = {module.config._attn_implementation for module in attentions.values()}
    if backends - {"eager"}:
        raise ValueError(
            f"Attention weights exist with eager attention only, the model uses "
            f"{', '.join(sorted(map(str, backends)))}; load it with attn_implementation='eager'."
        )
    recorded: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
            recorded[name] = outputs[1]

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in attentions.items()]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
