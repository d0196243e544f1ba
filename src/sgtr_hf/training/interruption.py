"""SIGTERM and Ctrl-C let the running update finish, so that a checkpoint can be saved."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(KeyboardInterrupt):
    """A signal stopped the run after its checkpoint was saved.

    Args:
        updates: Made so far.
        number: The signal.
    """

    def __init__(self, updates: int, number: signal.Signals) -> None:
        super().__init__(f"Stopped after update {updates}; the same command resumes.")
        self.signal = number


class Interruption:
    """Notes the signals while its context is open.

    Args:
        accelerator: Its processes stop together if one of them got a signal.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._noted = dict.fromkeys(_SIGNALS, False)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python hands signals to the main thread only, and lets no other set a handler.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self) -> signal.Signals | None:
        """Return the signal that any process got; every process must ask after the same update."""
        noted = [float(self._noted[number]) for number in _SIGNALS]
        if self._accelerator.num_processes > 1:
            # A process that stopped alone would leave the others waiting for its gradients.
            flags = torch.tensor(noted, device=self._accelerator.device)
            noted = self._accelerator.reduce(flags, reduction="sum").tolist()
        return next(
            (number for number, times in zip(_SIGNALS, noted, strict=True) if times > 0), None
        )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted[signal.Signals(number)] = True
