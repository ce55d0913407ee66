"""The streams that a replica has admitted and that have not left, and whether it admits more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.admission import Admission, Bounds, Demand
from deployments.metrics import Metrics
from deployments.streams import Stream


class EngineUnavailable(RuntimeError):
    """The engine is sick or closed; another replica, or this one once replaced, may take the request."""


class OpenStreams:
    """For event loops and the engine's thread alike: one lock, so that no stream is admitted after a failure."""

    def __init__(self, bounds: Bounds, metrics: Metrics) -> None:
        self._lock = threading.Lock()  # guards the three below
        self._admission = Admission(bounds)
        self._streams: set[Stream] = set()
        self._failure: str | None = None
        self._metrics = metrics

    def __contains__(self, stream: Stream) -> bool:
        return stream in self._streams

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def held(self) -> Demand:
        """What has been admitted and has not left."""
        return self._admission.held

    @property
    def bounds(self) -> Bounds:
        return self._admission.bounds

    def check(self) -> None:
        """Raises EngineUnavailable after a failure."""
        if self._failure is not None:
            raise EngineUnavailable(self._failure)

    @contextmanager
    def before_failure(self) -> Iterator[None]:
        """A block that no failure comes between: what it hands to the engine's thread, `fail` still finds. Raises
        EngineUnavailable, before the block, after a failure."""
        with self._lock:
            self.check()
            yield

    def admit(self, stream: Stream) -> None:
        """Raises EngineUnavailable, QueueFull, or ValueError for what would not fit into an empty replica."""
        with self.before_failure():
            self._admission.admit(stream.demand)
            self._streams.add(stream)
            self._tell()

    def began(self, stream: Stream, prompt_tokens: int) -> None:
        """A prompt of the stream waits no more."""
        with self._lock:
            if stream in self._streams:
                self._admission.began(prompt_tokens)
                stream.demand -= Demand(0, 0, prompt_tokens)
                self._tell()

    def leave(self, stream: Stream) -> None:
        with self._lock:
            if stream in self._streams:
                self._streams.discard(stream)
                self._admission.release(stream.demand)
                self._tell()

    def fail(self, reason: str) -> list[Stream]:
        """Admits nothing from now on; returns the streams that are still to be told."""
        with self._lock:
            self._failure = reason
            return list(self._streams)

    def _tell(self) -> None:
        self._metrics.queued(self._admission.held.prompt_tokens)
