"""How fast the multiprocessors of a GPU were clocked while something was timed. A GPU that meets its power limit slows
them down, and then a step of many rows takes longer the longer it is timed.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch

EVERY_MS = 50  # a few times while a shape is timed; more often would ask more of the driver beside it
QUERY = "timestamp,clocks.sm"
_READING = re.compile(r"^(\d{4}/\d\d/\d\d \d\d:\d\d:\d\d\.\d{3}), (\d+)$", re.MULTILINE)


class Clock:
    """What nvidia-smi has written so far: a time and a rate in MHz a line, or, where a GPU tells no rate, words."""

    def __init__(self, readings: Path | None) -> None:
        self._readings = readings

    def between(self, start: float, end: float) -> float | None:
        """The median rate in MHz, from `start` to `end` in seconds since the epoch; None where there is no reading."""
        if self._readings is None:
            return None
        whole, _, _ = self._readings.read_text(encoding="utf-8").rpartition("\n")  # the last line may not be, yet
        found = [float(rate) for at, rate in _READING.findall(whole) if start <= _seconds(at) <= end]
        return statistics.median(found) if found else None


@contextmanager
def watched_clock(device: torch.device) -> Iterator[Clock]:
    """Reads the clock of a GPU every EVERY_MS in a process of nvidia-smi's; of a CPU, or without that, nothing."""
    command = shutil.which("nvidia-smi")
    if device.type != "cuda" or command is None:
        yield Clock(None)
        return
    with tempfile.TemporaryDirectory() as folder:
        readings = Path(folder, "clock.csv")
        with readings.open("wb") as file:
            query = [f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", f"--id={_uuid(device)}"]
            process = subprocess.Popen([command, *query, f"--loop-ms={EVERY_MS}"], stdout=file)
        try:
            yield Clock(readings)
        finally:
            process.terminate()
            process.wait()


def _uuid(device: torch.device) -> str:
    """Numbers are the process's own; nvidia-smi's count all GPUs of the machine."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _seconds(at: str) -> float:
    return datetime.strptime(at, "%Y/%m/%d %H:%M:%S.%f").timestamp()
