"""Readings of a GPU's clock, by a program in nvidia-smi's place."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks import clock as module
from benchmarks.clock import Clock, watched_clock

GPU = torch.device("cuda", 0)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch) -> Path:
    """Writes what it was asked, to the file returned, and then a reading every 10 ms."""
    asked = tmp_path / "asked"
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f'#!/bin/bash\necho "$@" > {asked}\n'
        'while true; do echo "$(date "+%Y/%m/%d %H:%M:%S.%3N"), 1980"; sleep 0.01; done\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(module, "_uuid", lambda device: f"GPU-{device.index}")
    return asked


def started(before: list[psutil.Process]) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child not in before]


def readings(*lines: tuple[float, str]) -> str:
    return "".join(f"{datetime.fromtimestamp(at):%Y/%m/%d %H:%M:%S}.000, {rate}\n" for at, rate in lines)


def test_the_median_of_what_was_read_meanwhile_is_given(tmp_path: Path) -> None:
    file = tmp_path / "clock.csv"
    start = 1_700_000_000.0
    file.write_text(readings(*((start + i, str(1000 + 10 * i)) for i in range(10))))
    clock = Clock(file)
    assert clock.between(start + 2, start + 4) == 1030
    assert clock.between(start + 2, start + 5) == 1035
    assert clock.between(start + 2.2, start + 2.8) is None


def test_what_is_no_reading_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "clock.csv"
    start = 1_700_000_000.0
    good = readings((start, "1500"))
    file.write_text("No devices were found\n" + good + readings((start, "[N/A]")) + readings((start, "1980"))[:-2])
    assert Clock(file).between(start, start + 1) == 1500
    file.write_text("No devices were found\n")
    assert Clock(file).between(start, start + 1) is None


def test_a_gpu_is_read_until_the_end(nvidia_smi: Path) -> None:
    before = psutil.Process().children()
    with watched_clock(GPU) as clock:
        start = time.time()
        while clock.between(start, time.time()) is None:
            assert time.time() < start + 30
            time.sleep(0.01)
        assert clock.between(start, time.time()) == 1980
        assert clock.between(0.0, start - 3600) is None
        (child,) = started(before)
    assert not child.is_running()
    asked = nvidia_smi.read_text()
    assert asked == "--query-gpu=timestamp,clocks.sm --format=csv,noheader,nounits --id=GPU-0 --loop-ms=50\n"


def test_nothing_is_left_running_by_an_error(nvidia_smi: Path) -> None:
    before = psutil.Process().children()
    with pytest.raises(KeyError), watched_clock(GPU):
        (child,) = started(before)
        raise KeyError
    assert not child.is_running()


def test_a_cpu_has_no_clock_to_read(nvidia_smi: Path) -> None:
    with watched_clock(torch.device("cpu")) as clock:
        assert clock.between(0.0, time.time()) is None
    assert not nvidia_smi.exists()


def test_without_the_program_there_is_no_reading(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched_clock(GPU) as clock:
        assert clock.between(0.0, time.time()) is None
