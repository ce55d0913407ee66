"""The synchronous engine under asyncio: one thread owns and steps it, any number of callers stream from it.

Commands reach the thread through one inbox; a step's outputs go back in one `call_soon_threadsafe` an event loop,
and under load those of several steps together. A caller that goes away takes its sequences out of the engine. An
engine that raises is sick from then on: every stream gets the error, nothing new is taken, and `check_health` tells a
supervisor to replace it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

from deployments.admission import Bounds, Demand
from deployments.engine_thread import EngineThread, Prompt, Requests
from deployments.handover import Pace
from deployments.metrics import Metrics, clock
from deployments.open_streams import EngineUnavailable, OpenStreams
from deployments.streams import FailedHeads, HeadsVersion, Stream
from medusa import Engine, EngineStats, Grammar, Output, SamplingParams
from medusa.checkpoint import Checkpoint
from medusa.engine.kv_cache import pages_for

logger = logging.getLogger(__name__)


class AsyncEngine:
    """`max_queued`: replies that may wait beyond those the engine decodes at once (`max_batch_size`).

    A step that takes longer than `stall_timeout_s` counts as sick; the first steps of a GPU engine compile. `heads`
    names what the engine was loaded with.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queued: int = 256,
        max_queued_tokens: int | None = None,
        stall_timeout_s: float = 600.0,
        metrics: Metrics | None = None,
        heads: HeadsVersion | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.max_model_len: int = engine.max_model_len
        self.vocab_size: int = engine.backbone.vocab_size
        self.metrics = metrics or Metrics("model")
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        bounds = Bounds(engine.max_batch_size, max_queued, engine.stats().pages_total, max_queued_tokens)
        self._open = OpenStreams(bounds, self.metrics)
        self._thread = EngineThread(engine, self._open, self.metrics, heads or HeadsVersion(), pace or Pace())
        self.metrics.serves(self.heads.version, self.heads.digest)
        self._thread.start()

    @property
    def heads(self) -> HeadsVersion:
        """The heads that the next request gets."""
        return self._thread.heads

    @property
    def failed_heads(self) -> FailedHeads | None:
        """The latest that could not be taken, until others are, or those in use are asked for again."""
        return self._thread.failed_heads

    @property
    def held(self) -> Demand:
        """What has been admitted and has not left."""
        return self._open.held

    @property
    def bounds(self) -> Bounds:
        return self._open.bounds

    @property
    def step_seconds(self) -> float:
        """Time of a step, averaged over the latest ones."""
        return self._thread.step_seconds

    async def generate(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Output]:
        """The outputs of one prompt's n replies as they come; leaving the loop early aborts them."""
        stream = await self.submit([(prompt, params)])
        try:
            async for _, output in stream:
                yield output
        finally:
            stream.close()

    async def submit(self, requests: Requests) -> Stream:
        """Takes all prompts or none. Raises ValueError (a bad request), QueueFull or EngineUnavailable."""
        submitted = clock()
        stream = Stream(self._demand(requests), self._thread.release)
        self.check_health()
        self._open.admit(stream)
        try:
            self._thread.add(stream, requests, submitted)
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

    async def swap_heads(self, checkpoint: Checkpoint, heads: HeadsVersion) -> None:
        """Requests submitted from now on get these heads, between two steps; running ones keep going. Where the heads
        have another shape, or tokens depend on them (typical acceptance), running replies end first and new ones wait.
        Raises the engine's ValueError (a CheckpointError is one), or EngineUnavailable."""
        self.check_health()
        await asyncio.wrap_future(self._thread.swap(checkpoint, heads))

    def heads_failed(self, heads: HeadsVersion, reason: str) -> None:
        """Those heads could not be taken: the replica goes on with the ones it has, and says so."""
        self._thread.failed_heads = FailedHeads(heads.version, heads.digest, reason)
        self.metrics.swapped("failed")

    def heads_kept(self) -> None:
        """The heads in use were asked for again: that others could not be taken matters no more."""
        self._thread.failed_heads = None

    def prepare_grammar(self, grammar: Grammar) -> None:
        """Compiles it ahead of `submit`, on the caller's thread, so that no step waits for it. Raises GrammarError."""
        self._engine.grammars.start(grammar)

    def check_health(self) -> None:
        """Raises EngineUnavailable unless the engine takes requests and its steps come to an end."""
        self._open.check()
        started = self._thread.step_started
        if started is not None and (stalled := time.monotonic() - started) > self._stall_timeout_s:
            raise EngineUnavailable(f"the engine's current step has not ended for {stalled:.0f} s")

    def stats(self) -> EngineStats:
        """The engine's counters as of its latest command or step."""
        return self._thread.stats

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the thread after its current step; streams that still run get EngineUnavailable."""
        self._thread.end()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine's thread did not end within %.0f s", timeout_s)

    def _demand(self, requests: Requests) -> Demand:
        """The pages are those of replies that run to their limit; the tokens of a text are taken to be its characters
        at most."""
        demand = Demand(0)
        for prompt, params in requests:
            length = len(prompt)
            longest = length + min(params.max_tokens, max(0, self.max_model_len - length))
            demand += Demand(params.n, params.n * pages_for(longest), length)
        return demand
