"""A client of streamed replies that costs little itself: one connection, no parsing beyond what ends a reply."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HEAD_END = b"\r\n\r\n"
_BODY_END = b"0\r\n\r\n"  # of a chunked body
_DONE = b"data: [DONE]"
_TAIL = 8192  # of a body, kept for its last events


class Refused(RuntimeError):
    """The service answered with another status than 200."""

    def __init__(self, status: int, head: str, body: str) -> None:
        super().__init__(f"{status}: {body[-300:]}")
        self.status, self.head = status, head


@dataclass(frozen=True)
class Streamed:
    """A reply that came whole: seconds to its first event and to its end, and its last event but [DONE]."""

    first_s: float
    total_s: float
    last: dict[str, Any]


class Connection(asyncio.Protocol):
    """One kept-alive connection; it asks one thing at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._head = self._body = b""
        self._received = 0  # bytes of the body, of which `_body` is the end
        self._length: int | None = None
        self._first: float | None = None

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    async def ask(self, path: str, body: Mapping[str, Any]) -> Streamed:
        """Raises Refused for an error, RuntimeError for an answer that is not a whole stream."""
        assert self._transport is not None
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        )
        self._head, self._body, self._received, self._first = b"", b"", 0, None
        self._done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._transport.write(head.encode() + _HEAD_END + content)
        await self._done
        ended = time.perf_counter()
        if (status := int(self._head.split(None, 2)[1])) != 200:
            raise Refused(status, self._head.decode("latin-1"), self._body.decode("utf-8", "replace"))
        events = [line for line in self._body.splitlines() if line.startswith(b"data: ")]
        if self._first is None or len(events) < 2 or not events[-1].startswith(_DONE):
            raise RuntimeError(f"{path} did not give a whole stream: {self._head[:80]!r} ... {self._body[-300:]!r}")
        return Streamed(self._first - started, ended - started, json.loads(events[-2][6:]))

    @property
    def is_open(self) -> bool:
        """False once either end has closed it: a server closes what is idle for some seconds."""
        return self._transport is not None and not self._transport.is_closing()

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
            self._head, _, data = self._head.partition(_HEAD_END)
            self._head += _HEAD_END
            length = re.search(rb"(?i)content-length: *(\d+)", self._head)
            self._length = int(length[1]) if length else None  # None: chunked
        if self._first is None and data:
            self._first = time.perf_counter()
        self._body = (self._body + data)[-_TAIL:]
        self._received += len(data)
        if self._body.endswith(_BODY_END) if self._length is None else self._received >= self._length:
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
