"""The log of a run: one JSON object a line, so that an interrupted run keeps all but the last."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor


class RunLog:
    """Appends to `log.jsonl`; only the main process writes.

    Args:
        path: The file.
        enabled: False in all processes but one.
        track: Takes values and step of each line too, as `Accelerator.log` does.
    """

    def __init__(
        self,
        path: Path,
        *,
        enabled: bool,
        track: Callable[..., object] | None = None,
    ) -> None:
        self.path = path
        self.enabled = enabled
        self._track = track
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the run so far, with that before a resumption."""
        return time.monotonic() - self._start

    def rewind(self, step: int, seconds: float) -> None:
        """Go back to a checkpoint: what a killed run did after it will be done, and logged, again.

        Args:
            step: Updates at the checkpoint. The evaluation at this step, if any, is repeated too.
            seconds: Wall time of the run at the checkpoint.
        """
        self._start = time.monotonic() - seconds
        if not self.enabled or not self.path.exists():
            return
        kept = []
        for text in self.path.read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                # The line that was being written when the run was killed.
                continue
            if line["step"] < step or (line["step"] == step and line["split"] == "train"):
                kept.append(text)
        rewritten = self.path.with_suffix(".unfinished")
        rewritten.write_text("".join(f"{text}\n" for text in kept))
        rewritten.replace(self.path)

    def write(self, split: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Add a line."""
        if not self.enabled:
            return
        line = {
            "split": split,
            "step": step,
            "epoch": round(epoch, 4),
            "seconds": round(self.seconds, 1),
            **values,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._track is not None:
            # A figure that is not defined, such as a recall without annotations, is None.
            numbers = {
                f"{split}/{name}": value for name, value in values.items() if value is not None
            }
            self._track(numbers, step)


class LossMeter:
    """Means of the losses, and the speed, since the last line of the log, over all processes."""

    def __init__(self) -> None:
        self._reset()
        self.start_clock()

    def start_clock(self) -> None:
        """Count time from now: what lay between, such as an evaluation, is no training."""
        self._clock = time.monotonic()

    def add(self, losses: Mapping[str, Tensor], num_images: int) -> None:
        """Add a batch of this process; the time since the last one counts as its own."""
        for name, loss in losses.items():
            self._sums[name] = self._sums[name] + loss.detach().float()
            self._counts[name] += 1
        self._images += num_images
        now = time.monotonic()
        self._seconds += now - self._clock
        self._clock = now

    def summarize(self) -> dict[str, float]:
        """Return the means and images_per_second of all processes, and begin anew.

        Every process must call it.
        """
        own = {
            "sums": {name: float(total) for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "images_per_second": self._images / max(self._seconds, 1e-9),
        }
        shares = gather_object([own])
        # Processes differ in names when one of them had no annotation to denoise, say.
        names = dict.fromkeys(name for share in shares for name in share["sums"])
        means = {
            name: sum(share["sums"].get(name, 0.0) for share in shares)
            / sum(share["counts"].get(name, 0) for share in shares)
            for name in names
        }
        self._reset()
        speed = sum(share["images_per_second"] for share in shares)
        return {**means, "images_per_second": round(speed, 2)}

    def _reset(self) -> None:
        self._sums: dict[str, Any] = defaultdict(float)
        self._counts: dict[str, int] = defaultdict(int)
        self._images = 0
        self._seconds = 0.0
