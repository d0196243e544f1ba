"""The log of a run: one JSON object a line, so that an interrupted run keeps all but the last."""

import json
import time
from pathlib import Path
from typing import Any


class RunLog:
    """Appends to `log.jsonl`; only the main process writes.

    Args:
        path: The file.
        enabled: False in all processes but one.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path = path
        self.enabled = enabled
        self._start = time.monotonic()

    def write(self, split: str, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Add a line with the seconds since the run (or its last resumption) began."""
        if not self.enabled:
            return
        line = {
            "split": split,
            "step": step,
            "epoch": round(epoch, 4),
            "seconds": round(time.monotonic() - self._start, 1),
            **values,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
