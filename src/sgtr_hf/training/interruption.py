"""SIGTERM and Ctrl-C let the running update finish, so that a checkpoint can be saved."""

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class Interruption:
    """Notes the signals while its context is open.

    Args:
        accelerator: Its processes stop together if one of them got a signal.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._was_signalled = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # Python hands signals to the main thread only, and lets no other set a handler.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def is_requested(self) -> bool:
        """Tell whether any process was signalled; every process must ask after the same update."""
        if self._accelerator.num_processes == 1:
            return self._was_signalled
        # A process that stopped alone would leave the others waiting for its gradients.
        flag = torch.tensor(float(self._was_signalled), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, reduction="sum") > 0)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._was_signalled = True
