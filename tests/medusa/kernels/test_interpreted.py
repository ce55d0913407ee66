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


def run_folder(report: Path, environment: dict[str, str]) -> tuple[dict[str, list[int]], str]:
    """[passed, failed] counts by file, and the output of the run."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    run = subprocess.run(
        [*command, FOLDER], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert report.exists(), run.stdout + run.stderr
    counts = {file: [0, 0] for file in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        file = next(part for part in case.get("classname").split(".") + case.get("name").split(".") if part in counts)
        if case.find("skipped") is None:
            counts[file][case.find("failure") is not None or case.find("error") is not None] += 1
    return counts, run.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    environment = {key: value for key, value in os.environ.items() if key != "MEDUSA_KERNEL_DEVICE"}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return run_folder(tmp_path_factory.mktemp("interpreted") / "report.xml", environment)


@needs_triton
@pytest.mark.parametrize("file", FILES)
def test_kernels_in_the_interpreter(results, file):
    counts, output = results
    passed, failed = counts[file]
    assert failed == 0, output
    assert passed > 0, output


@pytest.mark.gpu
def test_compiled_kernels_pass_the_same_tests(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    counts, output = run_folder(tmp_path / "report.xml", environment | {"MEDUSA_KERNEL_DEVICE": "cuda"})
    assert all(passed > 0 and failed == 0 for passed, failed in counts.values()), output


def test_medusa_imports_and_keeps_state_without_triton():
    code = "import sys; sys.modules['triton'] = None; import medusa.engine, medusa.kernels.state"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
