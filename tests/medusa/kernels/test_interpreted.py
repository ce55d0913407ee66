"""Runs the tests of the Triton kernels in Triton's interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.medusa.interpreter import (
    ROOT,
    FolderRun,
    assert_passed,
    files_of,
    interpreted,
    interpreted_results,
    needs_triton,
)

FOLDER = Path(__file__).parent / "interpreted"


@pytest.fixture(scope="module")
def results():
    return interpreted_results(FOLDER)


@needs_triton
@pytest.mark.timeout(660)
@pytest.mark.parametrize("file", files_of(FOLDER))
def test_kernels_in_the_interpreter(results, file):
    assert_passed(results, file)


@pytest.mark.gpu
def test_compiled_kernels_pass_the_same_tests():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    counts, output = FolderRun.start(FOLDER, environment | {"MEDUSA_KERNEL_DEVICE": "cuda"}).finished()
    assert all(passed > 0 and failed == 0 for passed, failed in counts.values()), output


def test_medusa_imports_and_keeps_state_without_triton():
    code = "import sys; sys.modules['triton'] = None; import medusa.engine, medusa.kernels.state"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(660)
def test_kernels_on_copies_pass_the_same_tests():
    """As on a GPU, but for the device: what each launch takes and gives back passes the copies."""
    counts, output = FolderRun.start(FOLDER, interpreted() | {"MEDUSA_KERNEL_DEVICE": "cpu"}).finished()
    assert all(passed > 0 and failed == 0 for passed, failed in counts.values()), output
