"""The thread that owns the engine: it takes requests and new heads between two steps, steps, and hands outputs over."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from deployments.handover import Handover, Pace
from deployments.holding import Holding
from deployments.metrics import Metrics, StepTokens, clock
from deployments.open_streams import EngineUnavailable, OpenStreams
from deployments.recorder import RequestRecord, StepSpan
from deployments.streams import FailedHeads, HeadsVersion, Stream
from medusa import Engine, EngineStats, Output, SamplingParams
from medusa.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Requests = Sequence[tuple[Prompt, SamplingParams]]


@dataclass
class _Request:
    """One prompt inside the engine: where its outputs go, and how many of its n replies have not finished."""

    stream: Stream
    index: int
    unfinished: int
    record: RequestRecord


class EngineThread(threading.Thread):
    """Commands come by one inbox, from any thread; all that touches the engine runs in this one.

    `stats` are the engine's counters as of the latest command or step, `step_seconds` the time of a step, averaged over
    the latest ones; `step_started` is None between two steps.
    """

    def __init__(self, engine: Engine, streams: OpenStreams, metrics: Metrics, heads: HeadsVersion, pace: Pace) -> None:
        super().__init__(name="medusa-engine", daemon=True)
        self._metrics = metrics
        self.heads = heads  # that the next request gets
        self.failed_heads: FailedHeads | None = None  # the latest that could not be taken, until others are
        self.stats: EngineStats = engine.stats()
        self.step_seconds = 0.0
        self.step_started: float | None = None
        self._engine = engine
        self._streams = streams
        self._ids = itertools.count()
        self._requests: dict[str, _Request] = {}  # by engine request id
        self._handover = Handover(pace, self.release)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._postponed: list[Callable[[], None]] = []  # while new heads wait for running replies to end
        self._holding = Holding()
        self._held_s = 0.0  # of the step that comes, by the holding

    def add(self, stream: Stream, requests: Requests, submitted: float) -> None:
        """Takes all prompts of an admitted stream or none; the stream's first item tells."""
        self._inbox.put(partial(self._add, stream, requests, submitted))

    def release(self, stream: Stream) -> None:
        """The stream's reader has gone: its place is free, and what still runs of it is aborted."""
        self._streams.leave(stream)
        if not stream.is_finished:
            self._inbox.put(partial(self._abort, stream))

    def swap(self, checkpoint: Checkpoint, heads: HeadsVersion) -> Future[None]:
        """Done when requests get these heads; fails with the engine's ValueError. Raises EngineUnavailable."""
        done: Future[None] = Future()
        with self._streams.before_failure():
            self._inbox.put(partial(self._swap, checkpoint, heads, done))
        return done

    def end(self) -> None:
        """After the step that runs; streams that are open then get EngineUnavailable."""
        self._inbox.put(None)

    # From here on: the thread's own.

    def run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._obey_inbox():
                self.stats = self._engine.stats()
                self._metrics.idle(self.stats)
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
        before, started = self.stats, clock()
        self.step_started = time.monotonic()
        outputs = self._engine.step()
        self.step_started = None
        step = StepSpan(started, clock(), before, self._engine.stats())
        self.stats = step.after
        seconds = step.ended - step.started
        self.step_seconds += 0.1 * (seconds - self.step_seconds) if self.step_seconds else seconds
        self._holding.stepped(seconds, self._held_s, step.after.waited_s - before.waited_s)
        self._metrics.stepped(step.before, step.after, seconds)
        self._publish(outputs, step)

    def _add(self, stream: Stream, requests: Requests, submitted: float) -> None:
        if self._postponed:
            self._postponed.append(partial(self._add, stream, requests, submitted))
            return
        if stream not in self._streams:  # its caller left while it waited
            return
        stream.heads = self.heads
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
                self._metrics.aborted(request.unfinished)

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
        self.heads, self.failed_heads = heads, None
        self._metrics.serves(heads.version, heads.digest)
        self._metrics.swapped("taken")
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
            request.record.output(output, step, self._metrics, tokens)
            if begins and request.record.has_begun:
                self._streams.began(request.stream, request.record.prompt_tokens)
            is_urgent = begins or output.finished is not None
            self._handover.hold(request.stream, (request.index, output), is_urgent=is_urgent)
            request.unfinished -= output.finished is not None
            if request.unfinished == 0:
                del self._requests[output.request_id]
        self._metrics.generated(tokens)
        if self._handover.is_due(step.after.running) or not self._engine.has_unfinished():
            self._handover.flush()
        else:
            self._handover.flush_urgent()

    def _fail(self, reason: str) -> None:
        self._handover.flush()
        streams = self._streams.fail(reason)
        self._metrics.sick()
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
