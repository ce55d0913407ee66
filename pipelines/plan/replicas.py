"""Simulated engines: replies join a batch, a step takes what a batch of that size takes, a prompt stops the others.

Time goes from event to event. Between two events of an engine its batch is constant, so its replies move on by one step
every `step_seconds(batch)`; a reply ends when it has had its steps.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

StepSeconds = Callable[[int], float]


@dataclass(frozen=True)
class Reply:
    """`steps` it takes, and whose it is."""

    steps: float
    tag: Any = None


@dataclass
class Replica:
    """One engine: up to `max_batch` replies at once, the others wait their turn."""

    step_seconds: StepSeconds
    prefill_seconds: float
    max_batch: int
    version: int = 0  # of its next event; older ones in the queue are void
    _now: float = 0.0
    _progress: float = 0.0  # steps since the start
    _stall: float = 0.0  # prompts still to be read
    _running: list[tuple[float, int, Reply]] = field(default_factory=list)
    _waiting: deque[Reply] = field(default_factory=deque)
    _numbers: Any = field(default_factory=itertools.count)

    @property
    def held(self) -> int:
        return len(self._running) + len(self._waiting)

    def add(self, now: float, reply: Reply) -> None:
        self._advance(now)
        self._waiting.append(reply)
        self._fill()

    def next_end(self) -> float | None:
        """When the next reply ends if nothing comes before."""
        if not self._running:
            return None
        return self._now + self._stall + (self._running[0][0] - self._progress) * self.step_seconds(len(self._running))

    def end_next(self, now: float) -> Reply:
        """The reply that ends now; one that waits takes its place."""
        self._advance(now)
        ends, _, reply = heapq.heappop(self._running)
        self._progress = ends
        self._fill()
        return reply

    def _advance(self, now: float) -> None:
        passed = now - self._now
        stalled = min(passed, self._stall)
        self._stall -= stalled
        if self._running:
            self._progress += (passed - stalled) / self.step_seconds(len(self._running))
        self._now = now

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            reply = self._waiting.popleft()
            self._stall += self.prefill_seconds
            heapq.heappush(self._running, (self._progress + reply.steps, next(self._numbers), reply))


class Events:
    """The clock over all replicas: what happens next, in the order of time."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas
        self._queue: list[tuple[float, int, int, int, Reply | None]] = []
        self._numbers = itertools.count()

    def arrive(self, at: float, reply: Reply) -> None:
        """A reply that reaches the router then."""
        heapq.heappush(self._queue, (at, next(self._numbers), -1, 0, reply))

    def assign(self, now: float, index: int, reply: Reply) -> None:
        self.replicas[index].add(now, reply)
        self._schedule(index)

    def next(self) -> tuple[float, int, Reply] | None:
        """Time, replica and reply: one that ended there, or with replica -1 one that arrived. None at the end."""
        while self._queue:
            now, _, index, version, reply = heapq.heappop(self._queue)
            if index < 0 and reply is not None:
                return now, -1, reply
            replica = self.replicas[index]
            if version == replica.version:
                ended = replica.end_next(now)
                self._schedule(index)
                return now, index, ended
        return None

    def _schedule(self, index: int) -> None:
        replica = self.replicas[index]
        replica.version += 1
        ends = replica.next_end()
        if ends is not None:
            heapq.heappush(self._queue, (ends, next(self._numbers), index, replica.version, None))
