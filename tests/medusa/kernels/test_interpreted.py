"""Runs the tests of the Triton kernels in Triton's interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.stem for path in FOLDER.glob("test_*.py"))
ROOT = Path(__file__).parents[3]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(passed, failed) counts by file, and the output of the run."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, FOLDER], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert report.exists(), run.stdout + run.stderr
    counts = {file: [0, 0] for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        file = next(part for part in case.get("classname").split(".") + case.get("name").split(".") if part in counts)
        counts[file][any(case.find(tag) is not None for tag in ("failure", "error", "skipped"))] += 1
    return counts, run.stdout


@needs_triton
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(results, file):
    counts, output = results
    passed, failed = counts[file]
    assert failed == 0, output
    assert passed > 0, output


def test_medusa_imports_and_keeps_state_without_triton():
    code = "import sys; sys.modules['triton'] = None; import medusa.engine, medusa.kernels.state"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
