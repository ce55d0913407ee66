"""Starts the runs in Triton's interpreter as soon as it is known that they are wanted (interpreter.py)."""

from __future__ import annotations

import pytest

from tests.medusa.interpreter import HAS_TRITON, end_all, start_early


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or not HAS_TRITON:
        return
    wanted = {item.path.with_name("interpreted") for item in session.items if item.path.name == "test_interpreted.py"}
    start_early(sorted(wanted))


def pytest_sessionfinish() -> None:
    end_all()
