"""A client of streamed replies that costs little itself: one connection, no parsing beyond what ends a reply."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HEAD_END = b"\r\n\r\n"
_BODY_END = b"0\r\n\r\n"  # of a chunked body
_DONE = b"data: [DONE]"
_TAIL = 8192  # of a body, kept for its last events


@dataclass(frozen=True)
class Streamed:
    """A reply that came whole: seconds to its first event, and its last event but [DONE]."""

    first_s: float
    last: dict[str, Any]


class Connection(asyncio.Protocol):
    """One kept-alive connection; it asks one thing at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._head = self._body = b""
        self._first: float | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def ask(self, path: str, body: Mapping[str, Any]) -> Streamed:
        """Raises RuntimeError for an answer that is not a whole stream."""
        assert self._transport is not None
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        self._head, self._body, self._first = b"", b"", None
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._transport.write(head.encode() + _HEAD_END + content)
        await self._done
        events = [line for line in self._body.splitlines() if line.startswith(b"data: ")]
        if self._first is None or len(events) < 2 or not events[-1].startswith(_DONE):
            raise RuntimeError(f"{path} did not give a whole stream: {self._head[:80]!r} ... {self._body[-300:]!r}")
        return Streamed(self._first - started, json.loads(events[-2][6:]))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if _HEAD_END not in self._head:
            self._head += data
            if _HEAD_END not in self._head:
                return
            data = self._head.partition(_HEAD_END)[2]
        if self._first is None and data:
            self._first = time.perf_counter()
        self._body = (self._body + data)[-_TAIL:]
        if self._body.endswith(_BODY_END) or b"chunked" not in self._head:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionResetError("the server closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is not None:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
