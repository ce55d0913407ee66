"""Runs gpu_requests.py in a process of its own: Triton's interpreter is chosen before Triton is imported."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("gpu_requests.py")
HAS_LLGUIDANCE = importlib.util.find_spec("llguidance") is not None
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run_file(environment, of_gpu):
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", FILE]
    run = subprocess.run(
        command, cwd=FILE.parents[3], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = of_gpu + (4 if HAS_LLGUIDANCE else 2)
    expected = f"{passed} passed, {7 - passed} skipped" if passed < 7 else f"{passed} passed"
    assert run.stdout.splitlines()[-1].startswith(expected), run.stdout


@needs_triton
@pytest.mark.slow
def test_the_gpus_runner_in_the_interpreter_does_what_the_reference_does():
    environment = {key: value for key, value in os.environ.items() if key != "MEDUSA_KERNEL_DEVICE"}
    run_file(environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, of_gpu=0)


@needs_triton
@pytest.mark.gpu
def test_the_gpus_runner_on_a_gpu_does_too():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run_file(environment | {"MEDUSA_KERNEL_DEVICE": "cuda"}, of_gpu=3)
