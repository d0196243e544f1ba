"""The most memory that a process holds, as Linux tells it."""

import re
from pathlib import Path


class PeakMemory:
    """Growth of this process's resident memory from now on."""

    def __init__(self) -> None:
        # Sets the peak to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._megabytes("VmRSS")

    def growth(self) -> float:
        """Return the largest growth so far in MB."""
        return self._megabytes("VmHWM") - self.start

    @staticmethod
    def _megabytes(name: str) -> float:
        (kilobytes,) = re.findall(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(kilobytes) / 1024
