"""Runs folders of tests in Triton's interpreter, each in a process of its own (see kernels/conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def files_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("test_*.py"))


def interpreted() -> dict[str, str]:
    """The environment in which kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "MEDUSA_KERNEL_DEVICE"}
    return environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def run_folder(folder: Path, report: Path, environment: dict[str, str]) -> tuple[dict[str, list[int]], str]:
    """[passed, failed] counts by file, and the output of the run."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(
        [*command, folder], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert report.exists(), run.stdout + run.stderr
    counts = {file: [0, 0] for file in files_of(folder)}
    for case in ElementTree.parse(report).iter("testcase"):
        file = next(part for part in case.get("classname").split(".") + case.get("name").split(".") if part in counts)
        if case.find("skipped") is None:
            counts[file][case.find("failure") is not None or case.find("error") is not None] += 1
    return counts, run.stdout
