"""A steady load of one engine: as soon as a request ends the next of a queue takes its place, so N run all the time.

A wave of requests ends with its slowest reply. Under speculation that is the one whose guesses were kept least, while
in plain decoding all replies advance alike: waves understate what speculation gives those who keep a server at N.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.hardware import synchronize
from benchmarks.workload import Request
from medusa import Engine, SamplingParams
from medusa.engine.sequence import Output
from medusa.grammar import Grammar

MIN_WAVES = 2  # whose requests make a queue, at least: with fewer most of the time would be the start and the end


@dataclass
class Steady:
    """`tokens` were given in the `seconds` from when the first N requests had all been prefilled until a place stayed
    empty; each request's first token, its prefill's, is not counted, but the time of those prefills is. The whole run
    took `whole_seconds`."""

    tokens: int = 0
    seconds: float = 0.0
    whole_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """None where a place stayed empty before the first N had been prefilled."""
        return self.tokens / self.seconds if self.tokens else None


def takes_at_least(concurrency: int) -> int:
    """The requests that a steady run of so many at once needs."""
    return MIN_WAVES * concurrency


def run_steady(
    engine: Engine, queue: Sequence[Request], concurrency: int, temperature: float, grammar: Grammar | None = None
) -> Steady:
    """Decodes the queue in its order on an idle engine, `concurrency` requests at once for as long as it lasts. With a
    `grammar` one of them has it: the first place's, and then whichever takes that place. Raises ValueError for a
    shorter queue than `takes_at_least`, and RuntimeError where a reply has not its length."""
    if len(queue) < takes_at_least(concurrency):
        raise ValueError(
            f"a steady run of {concurrency} at once takes at least {takes_at_least(concurrency)} requests, "
            f"got {len(queue)}; give more, or fewer at once"
        )
    synchronize(engine.backbone.device)
    steady = Steady()
    start = time.perf_counter()
    places = _Places(engine, queue, temperature, [grammar, *[None] * (concurrency - 1)])
    full_since: float | None = None
    while engine.has_unfinished():
        were_full = not places.stays_empty
        tokens = sum(places.take(output) for output in engine.step())
        now = time.perf_counter()
        if full_since is None:
            full_since = now if places.first_are_filled else None
        elif were_full:
            steady.tokens += tokens
            steady.seconds = now - full_since
    steady.whole_seconds = time.perf_counter() - start
    return steady


class _Places:
    """Places for requests of a queue; the next takes a place, and its grammar, as soon as its request ends."""

    def __init__(
        self, engine: Engine, queue: Sequence[Request], temperature: float, grammars: Sequence[Grammar | None]
    ) -> None:
        self._engine = engine
        self._temperature = temperature
        self._queue = deque(queue)
        self._asked: dict[str, SamplingParams] = {}  # of the requests that have a place
        self._unfilled: set[str] = set()  # those of them without a token
        self.stays_empty = False
        for grammar in grammars:
            self._add_next(grammar)
        self._first = set(self._asked)

    @property
    def first_are_filled(self) -> bool:
        return self._first.isdisjoint(self._unfilled)

    def take(self, output: Output) -> int:
        """The tokens that it gave after its request's first one."""
        tokens = len(output.token_ids)
        if output.request_id in self._unfilled:
            self._unfilled.remove(output.request_id)
            tokens -= 1
        if output.finished is not None:
            self._end(output.request_id, len(output.finished.token_ids))
        return tokens

    def _end(self, request_id: str, length: int) -> None:
        asked = self._asked.pop(request_id)
        if length != asked.max_tokens:
            raise RuntimeError(f"a reply of {length} tokens ended, {asked.max_tokens} were asked for")
        if self._queue:
            self._add_next(asked.grammar)
        else:
            self.stays_empty = True

    def _add_next(self, grammar: Grammar | None) -> None:
        request = self._queue.popleft()
        params = request.params(self._temperature, grammar=grammar)
        request_id = self._engine.add(request.prompt_ids, params)
        self._asked[request_id] = params
        self._unfilled.add(request_id)
