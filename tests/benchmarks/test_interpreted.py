"""Runs the attention benchmark's contenders in Triton's interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.medusa.interpreter import assert_passed, files_of, interpreted_results, needs_triton

FOLDER = Path(__file__).parent / "interpreted"


@pytest.fixture(scope="module")
def results():
    return interpreted_results(FOLDER)


@needs_triton
@pytest.mark.timeout(660)
@pytest.mark.parametrize("file", files_of(FOLDER))
def test_the_contenders_in_the_interpreter(results, file):
    assert_passed(results, file)
