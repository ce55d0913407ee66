"""How `make test` shares the tests out among processes (pytest-xdist).

A file's tests stay together, as they share what its fixtures make. All files that need Ray run in one process: two
clusters at a time would be slow to start and to answer. Those come first and then the longest ones, so that none of
them is left over at the end.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = "ray_cluster"  # the fixture; what starts a cluster of its own is marked as `ray`
LONGEST = [
    "tests/medusa/engine/test_interpreted.py",
    "tests/medusa/kernels/test_interpreted.py",
    "tests/medusa/engine/test_paging.py",
    "tests/medusa/kernels/test_aot.py",
]


@cache
def needs_ray(file: str) -> bool:
    return re.search(rf"\b{CLUSTER}\b|\bmark\.ray\b", (ROOT / file).read_text(encoding="utf-8")) is not None


def place(nodeid: str) -> int:
    """By which the tests are sorted before they are shared out."""
    file = file_of(nodeid)
    if needs_ray(file):
        return 0
    return 1 + (LONGEST.index(file) if file in LONGEST else len(LONGEST))


def file_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


class FilesAndRay(LoadScopeScheduling):
    """Each process takes the next file, or all files that need Ray."""

    def _split_scope(self, nodeid: str) -> str:
        file = file_of(nodeid)
        return "what needs Ray" if needs_ray(file) else file
