"""Scene graph and detection metrics."""

from pathlib import Path


_MODULES = Path(__file__).parents[1] / "assets" / "metrics"


def path(name: str) -> str:
    """Return the folder of a metric that `evaluate.load` takes, without reaching for the Hub.

    Args:
        name: "scene_graph_recall".

    Raises:
        ValueError: If there is none of this name.

    Example:
        ```python
        metric = evaluate.load(sgtr_hf.metrics.path("scene_graph_recall"))
        ```
    """
    folder = _MODULES / name
    if not (folder / f"{name}.py").is_file():
        known = sorted(entry.name for entry in _MODULES.iterdir() if entry.is_dir())
        raise ValueError(f"`name` must be one of {', '.join(known)}, got {name!r}.")
    return str(folder)
