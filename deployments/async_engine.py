"""The synchronous engine under asyncio: one thread owns and steps it, any number of callers stream from it.

Commands reach the thread through one inbox; a step's outputs go back in one `call_soon_threadsafe` an event loop,
and under load those of several steps together. A caller that goes away takes its sequences out of the engine. An
engine that raises is sick from then on: every stream gets the error, nothing new is taken, and `check_health` tells a
supervisor to replace it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from deployments.admission import Admission, Bounds, Demand
from deployments.handover import Handover, Pace
from deployments.holding import Holding
from deployments.metrics import Metrics, StepTokens, clock
from deployments.recorder import RequestRecord, StepSpan
from deployments.streams import FailedHeads, HeadsVersion, Stream
from medusa import Engine, EngineStats, Grammar, Output, SamplingParams
from medusa.checkpoint import Checkpoint
from medusa.engine.kv_cache import pages_for

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


class EngineUnavailable(RuntimeError):
    """The engine is sick or closed; another replica, or this one once replaced, may take the request."""


@dataclass
class _Request:
    """One prompt inside the engine: where its outputs go, and how many of its n replies have not finished."""

    stream: Stream
    index: int
    unfinished: int
    record: RequestRecord


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
        self._ids = itertools.count()
        self._heads = heads or HeadsVersion()
        self.failed_heads: FailedHeads | None = None  # the latest that could not be taken, until others are
        self._requests: dict[str, _Request] = {}  # by engine request id; touched by the engine's thread only
        self._handover = Handover(pace or Pace(), self._release)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._postponed: list[Callable[[], None]] = []  # while new heads wait for running replies to end
        self._lock = threading.Lock()  # guards the three below: no stream is admitted after a failure
        bounds = Bounds(engine.max_batch_size, max_queued, engine.stats().pages_total, max_queued_tokens)
        self._admission = Admission(bounds)
        self._open: set[Stream] = set()
        self._failure: str | None = None
        self._step_started: float | None = None
        self._stats: EngineStats = engine.stats()
        self._step_seconds = 0.0
        self._holding = Holding()
        self._held_s = 0.0  # of the step that comes, by the holding
        self.metrics.serves(self._heads.version, self._heads.digest)
        self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)
        self._thread.start()

    @property
    def heads(self) -> HeadsVersion:
        """The heads that the next request gets."""
        return self._heads

    @property
    def held(self) -> Demand:
        """What has been admitted and has not left."""
        return self._admission.held

    @property
    def bounds(self) -> Bounds:
        return self._admission.bounds

    @property
    def step_seconds(self) -> float:
        """Time of a step, averaged over the latest ones."""
        return self._step_seconds

    async def generate(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Output]:
        """The outputs of one prompt's n replies as they come; leaving the loop early aborts them."""
        stream = await self.submit([(prompt, params)])
        try:
            async for _, output in stream:
                yield output
        finally:
            stream.close()

    async def submit(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> Stream:
        """Takes all prompts or none. Raises ValueError (a bad request), QueueFull or EngineUnavailable."""
        submitted = clock()
        stream = Stream(self._demand(requests), self._release)
        self._admit(stream)
        try:
            self._inbox.put(partial(self._add, stream, requests, submitted))
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

    async def swap_heads(self, checkpoint: Checkpoint, heads: HeadsVersion) -> None:
        """Requests submitted from now on get these heads, between two steps; running ones keep going. Where the heads
        have another shape, or tokens depend on them (typical acceptance), running replies end first and new ones wait.
        Raises the engine's ValueError (a CheckpointError is one), or EngineUnavailable."""
        done: Future[None] = Future()
        with self._lock:  # what is put before a failure is answered by it
            self.check_health()
            self._inbox.put(partial(self._swap, checkpoint, heads, done))
        await asyncio.wrap_future(done)

    def heads_failed(self, heads: HeadsVersion, reason: str) -> None:
        """Those heads could not be taken: the replica goes on with the ones it has, and says so."""
        self.failed_heads = FailedHeads(heads.version, heads.digest, reason)
        self.metrics.swapped("failed")

    def prepare_grammar(self, grammar: Grammar) -> None:
        """Compiles it ahead of `submit`, on the caller's thread, so that no step waits for it. Raises GrammarError."""
        self._engine.grammars.start(grammar)

    def check_health(self) -> None:
        """Raises EngineUnavailable unless the engine takes requests and its steps come to an end."""
        if self._failure is not None:
            raise EngineUnavailable(self._failure)
        started = self._step_started
        if started is not None and (stalled := time.monotonic() - started) > self._stall_timeout_s:
            raise EngineUnavailable(f"the engine's current step has not ended for {stalled:.0f} s")

    def stats(self) -> EngineStats:
        """The engine's counters as of its latest command or step."""
        return self._stats

    def close(self, timeout_s: float = 30.0) -> None:
        """Ends the thread after its current step; streams that still run get EngineUnavailable."""
        self._inbox.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the engine's thread did not end within %.0f s", timeout_s)

    def _demand(self, requests: Sequence[tuple[Prompt, SamplingParams]]) -> Demand:
        """The pages are those of replies that run to their limit; the tokens of a text are taken to be its characters
        at most."""
        demand = Demand(0)
        for prompt, params in requests:
            length = len(prompt)
            longest = length + min(params.max_tokens, max(0, self.max_model_len - length))
            demand += Demand(params.n, params.n * pages_for(longest), length)
        return demand

    def _admit(self, stream: Stream) -> None:
        with self._lock:
            self.check_health()
            self._admission.admit(stream.demand)
            self._open.add(stream)
            self.metrics.queued(self._admission.held.prompt_tokens)

    def _began(self, stream: Stream, prompt_tokens: int) -> None:
        """A prompt waits no more."""
        with self._lock:
            if stream in self._open:
                self._admission.began(prompt_tokens)
                stream.demand -= Demand(0, 0, prompt_tokens)
                self.metrics.queued(self._admission.held.prompt_tokens)

    def _release(self, stream: Stream) -> None:
        with self._lock:
            if stream in self._open:
                self._open.discard(stream)
                self._admission.release(stream.demand)
                self.metrics.queued(self._admission.held.prompt_tokens)
        if not stream.is_finished:
            self._inbox.put(partial(self._abort, stream))

    # From here on: the engine's thread.

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._obey_inbox():
                self._stats = self._engine.stats()
                self.metrics.idle(self._stats)
                if self._engine.has_unfinished():
                    self._step()
                elif self._postponed:
                    self._resume()
        except Exception:
            logger.exception("the engine failed; this process takes no more requests")
            reason = "the engine stopped after an internal error; send the request again"
        self._fail(reason)
        self._engine.close()

    def _obey_inbox(self) -> bool:
        """Runs the commands that wait. Sleeps for one while there is nothing to decode, and for more while the next
        launch may be held for requests to join it. False asks to stop."""
        is_idle = not self._engine.has_unfinished() and not self._postponed
        began = clock()
        held_until = began if is_idle else began + self._holding.seconds
        while True:
            try:
                command = self._inbox.get(timeout=None if is_idle else self._patience(held_until))
            except queue.Empty:
                break
            if command is None:
                return False
            command()
            is_idle = False
        self._held_s = max(0.0, min(clock(), held_until) - began)
        return True

    def _patience(self, held_until: float) -> float:
        """How long to wait for a command: not at all where a request that comes could not run in the next step."""
        left = held_until - clock()
        if left <= 0:
            return 0.0
        stats = self._engine.stats()
        has_place = 0 < stats.running + stats.waiting < self._engine.max_batch_size
        return left if has_place else 0.0

    def _step(self) -> None:
        before, started = self._stats, clock()
        self._step_started = time.monotonic()
        outputs = self._engine.step()
        self._step_started = None
        step = StepSpan(started, clock(), before, self._engine.stats())
        self._stats = step.after
        seconds = step.ended - step.started
        self._step_seconds += 0.1 * (seconds - self._step_seconds) if self._step_seconds else seconds
        self._holding.stepped(seconds, self._held_s, step.after.waited_s - before.waited_s)
        self.metrics.stepped(step.before, step.after, seconds)
        self._publish(outputs, step)

    def _add(self, stream: Stream, requests: Sequence[tuple[Prompt, SamplingParams]], submitted: float) -> None:
        if self._postponed:
            self._postponed.append(partial(self._add, stream, requests, submitted))
            return
        if stream not in self._open:  # its caller left while it waited
            return
        stream.heads = self._heads
        for index, (prompt, params) in enumerate(requests):
            request_id = str(next(self._ids))
            try:
                self._engine.add(prompt, params, request_id=request_id)
            except ValueError as error:
                self._abort(stream)
                where = f"prompt {index}: " if len(requests) > 1 else ""
                self._handover.post([(stream, ValueError(f"{where}{error}"))])
                return
            stream.request_ids.append(request_id)
            record = RequestRecord(submitted, len(prompt), stream.timing)
            self._requests[request_id] = _Request(stream, index, params.n, record)
        self._handover.post([(stream, None)])

    def _abort(self, stream: Stream) -> None:
        for request_id in stream.request_ids:
            request = self._requests.pop(request_id, None)
            if request is not None:
                self._engine.abort(request_id)
                self.metrics.aborted(request.unfinished)

    def _swap(self, checkpoint: Checkpoint, heads: HeadsVersion, done: Future[None]) -> None:
        try:
            must_wait = self._engine.must_be_idle_for(checkpoint) and self._engine.has_unfinished()
        except ValueError as error:  # the checkpoint's fault; the engine goes on with the heads it has
            _refuse(done, error)
            return
        if self._postponed or must_wait:
            self._postponed.append(partial(self._swap, checkpoint, heads, done))
            return
        if not done.set_running_or_notify_cancel():  # its caller left while it waited
            return
        try:
            self._engine.swap_heads(checkpoint)
        except ValueError as error:
            done.set_exception(error)
            return
        self._heads, self.failed_heads = heads, None
        self.metrics.serves(heads.version, heads.digest)
        self.metrics.swapped("taken")
        done.set_result(None)

    def _resume(self) -> None:
        """Nothing runs: the heads that waited for that are taken, and then the requests that waited for them."""
        postponed, self._postponed = self._postponed, []
        for command in postponed:
            command()

    def _publish(self, outputs: Iterable[Output], step: StepSpan) -> None:
        tokens = StepTokens()
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:  # aborted since
                continue
            begins = not request.record.has_begun
            request.record.output(output, step, self.metrics, tokens)
            if begins and request.record.has_begun:
                self._began(request.stream, request.record.prompt_tokens)
            is_urgent = begins or output.finished is not None
            self._handover.hold(request.stream, (request.index, output), is_urgent=is_urgent)
            request.unfinished -= output.finished is not None
            if request.unfinished == 0:
                del self._requests[output.request_id]
        self.metrics.generated(tokens)
        if self._handover.is_due(step.after.running) or not self._engine.has_unfinished():
            self._handover.flush()
        else:
            self._handover.flush_urgent()

    def _fail(self, reason: str) -> None:
        self._handover.flush()
        with self._lock:
            self._failure = reason
            streams = list(self._open)
        self.metrics.sick()
        self._handover.post([(stream, EngineUnavailable(reason)) for stream in streams])
        self._refuse_what_waits(EngineUnavailable(reason))

    def _refuse_what_waits(self, error: EngineUnavailable) -> None:
        """Heads that were to be taken never will be; their caller is told."""
        waiting = [*self._postponed]
        while not self._inbox.empty():
            command = self._inbox.get()
            waiting += [command] if command is not None else []
        for command in waiting:
            if isinstance(command, partial) and command.func == self._swap:
                _refuse(command.args[2], error)


def _refuse(done: Future[None], error: Exception) -> None:
    if done.set_running_or_notify_cancel():
        done.set_exception(error)
