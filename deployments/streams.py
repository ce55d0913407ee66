"""What comes back from the engine's thread: the outputs of one submission, as they come or merged while they wait."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from deployments.admission import Demand
from deployments.recorder import Timing
from medusa import Output

Item = tuple[int, Output] | Exception | None  # the first of a stream is None: its prompts were taken


@dataclass(frozen=True)
class HeadsVersion:
    """Which heads answer: as the registry names them, and the digest of their folder; both None without heads."""

    version: str | None = None
    digest: str | None = None


@dataclass(frozen=True)
class FailedHeads:
    """Heads that were to be served and could not be, and why."""

    version: str | None
    digest: str | None
    reason: str


class Stream:
    """(index of the prompt, Output) pairs of one submission, until every reply has finished; then it ends.

    Close it when done with it early: that aborts what still runs. To be used on the loop that submitted, by one reader.
    """

    def __init__(self, demand: Demand, on_close: Callable[[Stream], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.demand = demand
        self.request_ids: list[str] = []  # the engine's thread writes these two, before it accepts
        self.heads = HeadsVersion()
        self.timing = Timing()
        self.failure: Exception | None = None  # what reading it raised
        self._unfinished = demand.replies
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None  # while it waits
        self._expiry: asyncio.TimerHandle | None = None
        self._on_close = on_close
        self._closed = False

    @property
    def is_finished(self) -> bool:
        return self._unfinished == 0

    @property
    def num_unfinished(self) -> int:
        """Replies whose end has not been read."""
        return self._unfinished

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> tuple[int, Output]:
        if self._closed:
            raise StopAsyncIteration
        item = await self._receive()
        assert item is not None, "only the first item of a stream is empty, and submit takes it"
        self._count(item[1])
        return item

    async def merged(self) -> AsyncIterator[tuple[int, Output]]:
        """The same, with what waits for a reader joined into one output a reply: a slow client gets few big ones."""
        while not self._closed:
            await self._filled()
            waiting: list[tuple[int, Output]] = []
            while self._items and isinstance(self._items[0], tuple):
                waiting.append(self._items.popleft())
            for prompt, output in _joined(waiting):
                self._count(output)
                yield prompt, output
            if self._items and isinstance(self._items[0], Exception):
                await self._receive()

    async def accepted(self) -> None:
        """Returns once the engine took the prompts; raises its ValueError if it refused one."""
        await self._receive()

    def expire_at(self, deadline: float) -> None:
        """From then on (the loop's time) reading raises TimeoutError, after what came before. One timer a stream, as
        one for each output would cost more than the output."""
        if not self._closed:
            self._expiry = self.loop.call_at(deadline, self.deliver, TimeoutError())

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._expiry is not None:
                self._expiry.cancel()
            self._on_close(self)

    def deliver(self, item: Item) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _count(self, output: Output) -> None:
        if output.finished is not None:
            self._unfinished -= 1
            if self.is_finished:
                self.close()

    async def _receive(self) -> tuple[int, Output] | None:
        await self._filled()
        item = self._items.popleft()
        if isinstance(item, Exception):
            self.failure = item
            self.close()
            raise item
        return item

    async def _filled(self) -> None:
        """Returns once something waits to be read."""
        while not self._items:
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None


def _joined(items: list[tuple[int, Output]]) -> list[tuple[int, Output]]:
    if len(items) == 1:
        return items
    joined: dict[tuple[int, int], Output] = {}
    for prompt, output in items:
        key = (prompt, output.index)
        joined[key] = join(joined[key], output) if key in joined else output
    return [(prompt, output) for (prompt, _), output in joined.items()]


def join(first: Output, second: Output) -> Output:
    """Two outputs of one reply, one after the other, as one."""
    return Output(
        request_id=second.request_id,
        index=second.index,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        num_draft_accepted=first.num_draft_accepted + second.num_draft_accepted,
        logprobs=None if second.logprobs is None else [*(first.logprobs or []), *second.logprobs],
        finished=second.finished,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )
