"""Runs folders of tests in Triton's interpreter, each in a process of its own (see kernels/conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[2]

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def files_of(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("test_*.py"))


def interpreted() -> dict[str, str]:
    """The environment in which kernels are interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "MEDUSA_KERNEL_DEVICE"}
    return environment | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class FolderRun:
    """The tests of a folder, under way in a process of their own."""

    folder: Path
    report: Path
    process: subprocess.Popen[str]
    output: IO[str]

    @classmethod
    def start(cls, folder: Path, environment: dict[str, str]) -> FolderRun:
        place = Path(tempfile.mkdtemp(prefix="interpreted-"))
        report, output = place / "report.xml", (place / "output").open("w+")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
        process = subprocess.Popen(
            [*command, folder], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        return cls(folder, report, process, output)

    def finished(self, timeout_s: float = 600) -> tuple[dict[str, list[int]], str]:
        """[passed, failed] counts by file, and the output of the run."""
        try:
            self.process.wait(timeout_s)
        finally:
            said = self.end()
        assert self.report.exists(), said
        counts = {file: [0, 0] for file in files_of(self.folder)}
        for case in ElementTree.parse(self.report).iter("testcase"):
            file = next(
                part for part in case.get("classname").split(".") + case.get("name").split(".") if part in counts
            )
            if case.find("skipped") is None:
                counts[file][case.find("failure") is not None or case.find("error") is not None] += 1
        return counts, said

    def end(self) -> str:
        """Ends the process where it still runs; what it has said."""
        self.process.kill()
        self.process.wait()
        self.output.seek(0)
        return self.output.read()


def interpreted_results(folder: Path) -> tuple[dict[str, list[int]], str]:
    """Of the folder's tests that are not marked as slow: those are left to a run of their own."""
    return FolderRun.start(folder, interpreted() | {"PYTEST_ADDOPTS": "-m 'not slow'"}).finished()


def assert_passed(results: tuple[dict[str, list[int]], str], file: str) -> None:
    counts, output = results
    passed, failed = counts[file]
    assert failed == 0, output
    assert passed > 0, output


@dataclass(frozen=True)
class _NothingToRestore:
    def restore(self) -> None: ...


def patch_language_once() -> None:
    """Halves the time that kernels are interpreted in, in a process where all of them are.

    At each launch, and at each call of one jitted function by another, Triton goes through all names of
    `triton.language` to replace the compiler's functions by the interpreter's, and after a launch puts them back. Here
    they stay, once replaced in what a module sees as the language.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set[str]()

    def patch_once(fn: Callable[..., Any]) -> _NothingToRestore:
        if (module := fn.__globals__["__name__"]) not in patched:
            patch(fn)
            patched.add(module)
        return _NothingToRestore()

    interpreter._patch_lang = patch_once
