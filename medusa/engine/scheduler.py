"""Which sequences run: first come, first served, each admitted once its whole reply is sure to fit."""

from __future__ import annotations

from collections import deque

from medusa.engine.kv_cache import KVCache
from medusa.engine.sequence import Sequence


class Scheduler:
    """Sequences wait in order, take a row of the batch and pages for the longest reply they may give, and leave."""

    def __init__(self, cache: KVCache, max_batch_size: int, max_nodes: int) -> None:
        self._cache = cache
        self._max_nodes = max_nodes  # a step writes that many positions past the committed tokens
        self._rows = list(range(max_batch_size - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def unfinished(self) -> list[Sequence]:
        """The running sequences that decode on; a reply may have ended with its first token."""
        return [sequence for sequence in self.running if sequence.finish_reason is None]

    def holds(self, request_id: str) -> bool:
        return any(sequence.request_id == request_id for sequence in (*self.running, *self.waiting))

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences into the batch while rows and pages last; returns the new ones, to be prefilled."""
        admitted: list[Sequence] = []
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            if not self._cache.allocate(self._rows[-1], sequence.num_reserved + self._max_nodes):
                break
            sequence.row = self._rows.pop()
            admitted.append(self.waiting.popleft())
        self.running.extend(admitted)
        return admitted

    def retire(self) -> None:
        """Frees the rows and pages of sequences that have finished."""
        for sequence in self.running:
            if sequence.finish_reason is not None:
                self._release(sequence)
        self.running = [sequence for sequence in self.running if sequence.row >= 0]

    def remove(self, request_id: str) -> list[Sequence]:
        """Takes a request's sequences out, running or waiting, and returns them."""
        removed = [s for s in (*self.running, *self.waiting) if s.request_id == request_id]
        for sequence in removed:
            if sequence.row >= 0:
                self._release(sequence)
        self.running = [s for s in self.running if s.request_id != request_id]
        self.waiting = deque(s for s in self.waiting if s.request_id != request_id)
        return removed

    def clear(self) -> None:
        """Forgets everything, running and waiting."""
        for sequence in self.running:
            self._release(sequence)
        self.running.clear()
        self.waiting.clear()

    def _release(self, sequence: Sequence) -> None:
        self._cache.free(sequence.row)
        self._rows.append(sequence.row)
        sequence.row = -1
