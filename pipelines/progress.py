"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
Advance = Callable[[int], None]
LOG_EVERY_S = 15.0


@contextmanager
def bar(label: str, total: int, console: Console) -> Iterator[Advance]:
    """Yields `advance(n)`. Off a terminal (a Job's log) the count is printed every LOG_EVERY_S seconds instead."""
    if not console.is_terminal:
        yield _log_lines(label, total, console)
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=total)
        yield lambda n: progress.advance(task, n)


def track(iterable: Iterable[T], label: str, total: int, console: Console) -> Iterator[T]:
    """The items as they are, counted on a bar."""
    with bar(label, total, console) as advance:
        for item in iterable:
            yield item
            advance(1)


def _log_lines(label: str, total: int, console: Console) -> Advance:
    done, printed = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, printed
        done += n
        if done >= total > done - n or time.monotonic() - printed > LOG_EVERY_S:
            printed = time.monotonic()
            console.print(f"{label}: {done}/{total}", highlight=False)

    return advance
