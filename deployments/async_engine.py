"""The synchronous engine under asyncio: one thread owns and steps it, any number of callers stream from it.

Commands reach the thread through one inbox; a step's outputs go back in one `call_soon_threadsafe` an event
loop. A caller that goes away takes its sequences out of the engine. An engine that raises is sick from then
on: every stream gets the error, nothing new is taken, and `check_health` tells a supervisor to replace it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from medusa import Engine, EngineStats, Output, SamplingParams

logger = logging.getLogger(__name__)

Prompt = str | Sequence[int]


class EngineUnavailable(RuntimeError):
    """The engine is sick or closed; another replica, or this one once replaced, may take the request."""


class QueueFull(RuntimeError):
    """More requests wait than allowed; the same request may be sent again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Stream:
    """(index of the prompt, Output) pairs of one submission, until every reply has finished; then it ends.

    Close it when done with it early: that aborts what still runs. To be used on the loop that submitted.
    """

    def __init__(self, num_replies: int, on_close: Callable[[Stream], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_replies = num_replies
        self.request_ids: list[str] = []  # the engine's thread writes it
        self._unfinished = num_replies
        self._items: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()
        self._on_close = on_close
        self._closed = False

    @property
    def is_finished(self) -> bool:
        return self._unfinished == 0

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if self._closed:
            raise StopAsyncIteration
        item = await self._receive()
        assert item is not None, "only the first item of a stream is empty, and submit takes it"
        if item[1].finished is not None:
            self._unfinished -= 1
            if self.is_finished:
                self.close()
        return item

    async def accepted(self) -> None:
        """Returns once the engine took the prompts; raises its ValueError if it refused one."""
        await self._receive()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._on_close(self)

    def deliver(self, item: tuple[int, Output] | Exception | None) -> None:
        self._items.put_nowait(item)

    async def _receive(self) -> tuple[int, Output] | None:
        item = await self._items.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        return item


@dataclass
class _Request:
    """One prompt inside the engine: where its outputs go, and how many of its n replies have not finished."""

    stream: Stream
    index: int
    unfinished: int


class AsyncEngine:
    """`max_queued`: replies that may wait beyond those the engine decodes at once (`max_batch_size`).

    A step that takes longer than `stall_timeout_s` counts as sick; the first steps of a GPU engine compile.
    """

    def __init__(self, engine: Engine, *, max_queued: int = 256, stall_timeout_s: float = 600.0) -> None:
        self.max_model_len: int = engine.max_model_len
        self.vocab_size: int = engine.backbone.vocab_size
        self.capacity = engine.max_batch_size + max_queued
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s
        self._ids = itertools.count()
        self._requests: dict[str, _Request] = {}  # by engine request id; touched by the engine's thread only
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the two below: no stream is admitted after a failure
        self._open: set[Stream] = set()
        self._failure: str | None = None
        self._step_started: float | None = None
        self._stats: EngineStats = engine.stats()
        self._thread = threading.Thread(target=self._run, name="medusa-engine", daemon=True)
        self._thread.start()

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
        stream = Stream(sum(params.n for _, params in requests), self._release)
        self._admit(stream)
        try:
            self._inbox.put(partial(self._add, stream, requests))
            await stream.accepted()
        except BaseException:
            stream.close()
            raise
        return stream

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

    def _admit(self, stream: Stream) -> None:
        if stream.num_replies > self.capacity:
            raise ValueError(
                f"the request asks for {stream.num_replies} replies (prompts x n), this service holds "
                f"{self.capacity} at once; split it into several requests"
            )
        with self._lock:
            self.check_health()
            taken = sum(other.num_replies for other in self._open)
            if taken + stream.num_replies > self.capacity:
                raise QueueFull(
                    f"{taken} of {self.capacity} places are taken and the request needs "
                    f"{stream.num_replies}; send it again in a moment",
                    retry_after_s=1,
                )
            self._open.add(stream)

    def _release(self, stream: Stream) -> None:
        with self._lock:
            self._open.discard(stream)
        if not stream.is_finished:
            self._inbox.put(partial(self._abort, stream))

    # From here on: the engine's thread.

    def _run(self) -> None:
        reason = "the engine was closed"
        try:
            while self._obey_inbox():
                self._stats = self._engine.stats()
                if self._engine.has_unfinished():
                    self._publish(self._step())
                    self._stats = self._engine.stats()
        except Exception:
            logger.exception("the engine failed; this process takes no more requests")
            reason = "the engine stopped after an internal error; send the request again"
        self._fail(reason)

    def _obey_inbox(self) -> bool:
        """Runs the commands that wait, sleeping while there is nothing to decode; False asks to stop."""
        must_wait = not self._engine.has_unfinished()
        while must_wait or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            command()
            must_wait = False
        return True

    def _step(self) -> list[Output]:
        self._step_started = time.monotonic()
        outputs = self._engine.step()
        self._step_started = None
        return outputs

    def _add(self, stream: Stream, requests: Sequence[tuple[Prompt, SamplingParams]]) -> None:
        for index, (prompt, params) in enumerate(requests):
            request_id = str(next(self._ids))
            try:
                self._engine.add(prompt, params, request_id=request_id)
            except ValueError as error:
                self._abort(stream)
                where = f"prompt {index}: " if len(requests) > 1 else ""
                self._post([(stream, ValueError(f"{where}{error}"))])
                return
            stream.request_ids.append(request_id)
            self._requests[request_id] = _Request(stream, index, params.n)
        self._post([(stream, None)])

    def _abort(self, stream: Stream) -> None:
        for request_id in stream.request_ids:
            if self._requests.pop(request_id, None) is not None:
                self._engine.abort(request_id)

    def _publish(self, outputs: Iterable[Output]) -> None:
        items: list[tuple[Stream, tuple[int, Output]]] = []
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:  # aborted since
                continue
            items.append((request.stream, (request.index, output)))
            request.unfinished -= output.finished is not None
            if request.unfinished == 0:
                del self._requests[output.request_id]
        self._post(items)

    def _post(self, items: Iterable[tuple[Stream, tuple[int, Output] | Exception | None]]) -> None:
        by_loop = defaultdict(list)
        for stream, item in items:
            by_loop[stream.loop].append((stream, item))
        for loop, batch in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:  # the loop was closed under its callers: nobody is left to read
                for stream, _ in batch:
                    self._release(stream)

    def _fail(self, reason: str) -> None:
        with self._lock:
            self._failure = reason
            streams = list(self._open)
        self._post([(stream, EngineUnavailable(reason)) for stream in streams])


def _deliver(batch: Iterable[tuple[Stream, tuple[int, Output] | Exception | None]]) -> None:
    for stream, item in batch:
        stream.deliver(item)
