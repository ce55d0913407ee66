"""The load: clients as Ray actors, each with a share of the requests, so that one of them is not what is measured."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import ray

from benchmarks.serving import varied_lengths


@dataclass(frozen=True)
class Request:
    """A prompt and how many tokens its reply is to have."""

    prompt_ids: list[int]
    reply_tokens: int


@dataclass(frozen=True)
class Answered:
    """A reply: seconds of the system's clock, to its first token, and its tokens."""

    started: float
    first_token_s: float
    ended: float
    tokens: int


class Client:
    """Keeps `concurrency` requests in flight until all are answered, or until it is told to stop."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopped = False

    async def work(self, requests: Sequence[Request], concurrency: int, *, again: bool = False) -> list[Answered]:
        """With `again` it begins anew with the requests until `stop` is called."""
        self._stopped = False
        waiting, answered = list(reversed(requests)), []
        connector = aiohttp.TCPConnector(limit=concurrency)
        async with aiohttp.ClientSession(self._url, connector=connector) as session:

            async def worker() -> None:
                while not self._stopped and (waiting or again):
                    if not waiting:
                        waiting.extend(reversed(requests))
                    request = waiting.pop()
                    started = time.time()
                    first, tokens = await ask(session, request.prompt_ids, request.reply_tokens)
                    answered.append(Answered(started, first, time.time(), tokens))

            await asyncio.gather(*(worker() for _ in range(concurrency)))
        return answered

    async def stop(self) -> None:
        self._stopped = True


class Clients:
    """One a replica."""

    def __init__(self, url: str, number: int) -> None:
        client = ray.remote(num_cpus=0)(Client)
        self._clients = [client.remote(url) for _ in range(number)]

    def answer(self, requests: Sequence[Request], concurrency: int) -> list[Answered]:
        """All requests, `concurrency` at once a client."""
        return [answered for done in ray.get(self.start(requests, concurrency)) for answered in done]

    def start(self, requests: Sequence[Request], concurrency: int, *, again: bool = False) -> list[Any]:
        """The same without waiting."""
        number = len(self._clients)
        shares = [list(requests[i::number]) for i in range(number)]
        return [
            client.work.remote(share, concurrency, again=again)
            for client, share in zip(self._clients, shares, strict=True)
        ]

    def stop(self) -> None:
        ray.get([client.stop.remote() for client in self._clients])

    def close(self) -> None:
        for client in self._clients:
            ray.kill(client)


def requests_of(prompts: Sequence[list[int]], reply_tokens: int, seed: int = 0) -> list[Request]:
    """Of varied reply lengths, `reply_tokens` on average."""
    lengths = varied_lengths(len(prompts), reply_tokens, seed)
    return [Request(ids, length) for ids, length in zip(prompts, lengths, strict=True)]


def tokens_per_second(answered: Sequence[Answered]) -> float:
    """Over all clients, from the first request's start to the last reply's end."""
    seconds = max(a.ended for a in answered) - min(a.started for a in answered)
    return sum(a.tokens for a in answered) / seconds


async def ask(session: aiohttp.ClientSession, prompt: list[int], reply_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens. Raises for a reply that is not whole."""
    body = {
        "prompt": prompt,
        "max_tokens": reply_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, last = time.perf_counter(), None, b""
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                last = line
    usage = json.loads(last[6:])["usage"]
    if first is None or usage["completion_tokens"] != reply_tokens:
        raise RuntimeError(f"a reply of {reply_tokens} tokens was asked for, its usage is {usage}")
    return first, usage["completion_tokens"]
