"""Runs the GPU's decoder and runner in Triton's interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.medusa.interpreter import FolderRun, assert_passed, files_of, interpreted, interpreted_results, needs_triton

FOLDER = Path(__file__).parent / "interpreted"
TEAM = Path(__file__).parent / "interpreted_team"  # whose tests start processes of their own


@pytest.fixture(scope="module")
def results():
    return interpreted_results(FOLDER)


@needs_triton
@pytest.mark.timeout(660)
@pytest.mark.parametrize("file", files_of(FOLDER))
def test_the_gpus_engine_in_the_interpreter(results, file):
    assert_passed(results, file)


@needs_triton
@pytest.mark.slow
def test_what_the_gpus_engine_takes_longer_for():
    counts, output = FolderRun.start(FOLDER, interpreted() | {"PYTEST_ADDOPTS": "-m slow"}).finished(280)
    assert sum(failed for _, failed in counts.values()) == 0 < sum(passed for passed, _ in counts.values()), output


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("speed", "tests"), [("not slow", 1), ("slow", 2)])
def test_the_gpus_engine_in_two_processes(speed, tests):
    counts, output = FolderRun.start(TEAM, interpreted() | {"PYTEST_ADDOPTS": f"-m '{speed}'"}).finished(280)
    assert counts["test_team"] == [tests, 0], output
