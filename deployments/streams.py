"""What comes back from the engine's thread: the outputs of one submission, as they come or merged while they wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

from deployments.admission import Demand
from medusa import Output


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

    Close it when done with it early: that aborts what still runs. To be used on the loop that submitted.
    """

    def __init__(self, demand: Demand, on_close: Callable[[Stream], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.demand = demand
        self.request_ids: list[str] = []  # the engine's thread writes these two, before it accepts
        self.heads = HeadsVersion()
        self._unfinished = demand.replies
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
        self._count(item[1])
        return item

    async def merged(self) -> AsyncIterator[tuple[int, Output]]:
        """The same, with what waits for a reader joined into one output a reply: a slow client gets few big ones."""
        while not self._closed:
            item = await self._receive()
            waiting: list[tuple[int, Output]] = []
            while isinstance(item, tuple):
                waiting.append(item)
                item = None if self._items.empty() else self._items.get_nowait()
            for prompt, output in _joined(waiting):
                self._count(output)
                yield prompt, output
            if isinstance(item, Exception):
                self.close()
                raise item

    async def accepted(self) -> None:
        """Returns once the engine took the prompts; raises its ValueError if it refused one."""
        await self._receive()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._on_close(self)

    def deliver(self, item: tuple[int, Output] | Exception | None) -> None:
        self._items.put_nowait(item)

    def _count(self, output: Output) -> None:
        if output.finished is not None:
            self._unfinished -= 1
            if self.is_finished:
                self.close()

    async def _receive(self) -> tuple[int, Output] | None:
        item = await self._items.get()
        if isinstance(item, Exception):
            self.close()
            raise item
        return item


def _joined(items: list[tuple[int, Output]]) -> list[tuple[int, Output]]:
    joined: dict[tuple[int, int], Output] = {}
    for prompt, output in items:
        key = (prompt, output.index)
        joined[key] = join(joined[key], output) if key in joined else output
    return [(prompt, output) for (prompt, _), output in joined.items()]


def join(first: Output, second: Output) -> Output:
    """Two outputs of one reply, one after the other, as one."""
    logprobs = None if second.logprobs is None else [*(first.logprobs or []), *second.logprobs]
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        num_draft_accepted=first.num_draft_accepted + second.num_draft_accepted,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
    )
