"""The progress line of a benchmark, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


class Progress:
    """On a terminal a passing line is rewritten; in a log it is left out."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str, passing: bool = False) -> None:
        line = f"[{time.monotonic() - self._start:6.1f} s] {text}"
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{line}", end="" if passing else "\n", file=sys.stderr, flush=True)
        elif not passing:
            print(line, file=sys.stderr, flush=True)

    def counter(self, label: str, total: int) -> Callable[[int], None]:
        """Called with how many more are done."""
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            self.say(f"{label}: {done}/{total}", passing=done < total)

        return advance
