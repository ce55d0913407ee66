"""The records of a training run, a line of JSON each in metrics.jsonl: the leading worker writes, the step follows."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from pipelines.journal import RunLog
from pipelines.progress import Advance

METRICS = "metrics.jsonl"
_POLL_S, _TAIL_BYTES = 0.5, 1 << 16


class Recorder:
    """Appends records to metrics.jsonl and to the run's journal, with tokens a second since the last one."""

    def __init__(self, path: Path, log: RunLog, step: int, tokens_seen: int) -> None:
        """Goes on after this step, at which so many tokens had been seen."""
        self._path = path
        self._log = log
        self._keep_until(step)
        self._tokens, self._time = tokens_seen, time.monotonic()

    def write(self, record: Mapping[str, float]) -> None:
        now, tokens = time.monotonic(), int(record["tokens_seen"])
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._tokens, self._time = tokens, now
        line = {**record, "tokens_per_second": rate, **system_metrics()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        values = {name: value for name, value in line.items() if name != "step"}
        self._log.log_metrics(values, step=int(record["step"]))

    def _keep_until(self, step: int) -> None:
        """Drops what a killed worker wrote after its last checkpoint; those steps come again."""
        kept = [record for record in read_records(self._path) if record["step"] <= step]
        partial = self._path.with_name(f".{METRICS}.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self._path)


def system_metrics() -> dict[str, float]:
    """Of the machine and process that trains; utilisations are since the last call."""
    process = psutil.Process()
    metrics = {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_percent": psutil.virtual_memory().percent,
        "system/process_memory_gib": process.memory_info().rss / 2**30,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        metrics["system/gpu_memory_gib"] = (total - free) / 2**30
        metrics["system/gpu_peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return metrics


def read_records(path: Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl; a last line that a kill cut off is no record."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@contextmanager
def following(metrics: Path, advance: Advance) -> Iterator[None]:
    """Moves the bar by what the workers write to metrics.jsonl, wherever they run."""
    ended = threading.Event()

    def follow() -> None:
        shown, more = 0, True
        while more:
            more = not ended.wait(_POLL_S)
            done = _last_step(metrics)
            if done > shown:
                advance(done - shown)
                shown = done

    thread = threading.Thread(target=follow, name="train-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _last_step(metrics: Path) -> int:
    """Of the last whole line, without reading the file from its start each time."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(metrics.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().split(b"\n")
    return int(json.loads(lines[-2])["step"]) if len(lines) > 2 else 0
