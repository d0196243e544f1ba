"""Processes that read pictures for a loader: how they start, end and tell of their errors."""

import atexit
import multiprocessing
import re
import signal

import torch


def prepare_worker(_: int) -> None:
    """Set a loader's worker up: one thread, and no ear for signals.

    The cores belong to the model. A scheduler, or Ctrl-C, signals every process of a run; a worker
    that died of it would take the main process down before that has saved its checkpoint.
    """
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# Runs before the handler of multiprocessing, which was registered earlier: that one asks workers to
# end by SIGTERM, which they ignore, and would wait for them without a limit.
@atexit.register
def _end_workers() -> None:
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        # torch would raise an error about each that is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in workers:
        process.kill()


def reason_of(error: BaseException) -> str:
    """Return the message of an error, without the traceback that a worker put before it."""
    message = str(error)
    if "Original Traceback" not in message:
        return message
    # The last line that names an exception, and what follows it.
    starts = [*re.finditer(r"^(?:\w+\.)*\w*(?:Error|Exception): ", message, re.MULTILINE)]
    return message[starts[-1].end() :].strip() if starts else message
