"""Scene graph data: one schema, readers and writers, images for training, synthetic scenes.

`load` opens annotated images; `datasets` and what else it needs is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .dataset_loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .dataset_loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
