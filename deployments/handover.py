"""Outputs on their way from the engine's thread to event loops: a callback a loop, and under load for several steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from deployments.metrics import clock
from deployments.streams import Item, Stream
from medusa import Output


@dataclass(frozen=True, kw_only=True)
class Pace:
    """While `from_running` replies or more are decoded, outputs are handed over at most every `seconds`: fewer, larger
    chunks leave the interpreter to the engine. First and last tokens never wait, nor does what their stream held."""

    seconds: float = 0.02
    from_running: int = 4


class Handover:
    """For one thread, the engine's. `on_gone` hears of streams whose loop was closed under them."""

    def __init__(self, pace: Pace, on_gone: Callable[[Stream], None]) -> None:
        self._pace = pace
        self._on_gone = on_gone
        self._held: defaultdict[Stream, list[Item]] = defaultdict(list)
        self._urgent: dict[Stream, None] = {}
        self._flushed = clock()

    def hold(self, stream: Stream, item: tuple[int, Output], *, is_urgent: bool) -> None:
        self._held[stream].append(item)
        if is_urgent:
            self._urgent[stream] = None

    def is_due(self, num_running: int) -> bool:
        """Whether all that is held should be handed over, with so many replies being decoded."""
        return num_running < self._pace.from_running or clock() - self._flushed >= self._pace.seconds

    def flush_urgent(self) -> None:
        """Of the streams with something urgent alone: the others' readers do not stand in its way."""
        self.post(self._take_urgent())

    def flush(self) -> None:
        """All that is held, the urgent first."""
        items = self._take_urgent()
        items += [(stream, item) for stream, held in self._held.items() for item in held]
        self._held.clear()
        self._flushed = clock()
        self.post(items)

    def _take_urgent(self) -> list[tuple[Stream, Item]]:
        items = [(stream, item) for stream in self._urgent for item in self._held.pop(stream)]
        self._urgent.clear()
        return items

    def post(self, items: Iterable[tuple[Stream, Item]]) -> None:
        """At once."""
        by_loop = defaultdict(list)
        for stream, item in items:
            by_loop[stream.loop].append((stream, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop was closed under its callers: nobody is left to read
                for stream, _ in batch:
                    self._on_gone(stream)


def _deliver(batch: Iterable[tuple[Stream, Item]]) -> None:
    for stream, item in batch:
        stream.deliver(item)
