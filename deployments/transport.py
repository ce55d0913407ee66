"""HTTP as this service speaks it: strict JSON in, server-sent events out, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

T = TypeVar("T")
JSON_HEADERS = {"Content-Type": "application/json"}
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_GONE = 499  # nginx's number for an answer that nobody waits for


class StrictJsonRequest(Request):
    """Python's own parser takes half surrogates, which no tokenizer can read, and nests without a limit."""

    async def json(self) -> Any:
        try:
            return from_json(await self.body())
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from error


class StrictJsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictJsonRequest(request.scope, request.receive))

        return handle_strictly


class EventStream(StreamingResponse):
    """Server-sent events; `on_end` is called however it ends, also when the client left before it began.

    `limit_s` ends it whatever the client does: one that never reads would hold its connection for ever.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], *, on_end: Callable[[], None], limit_s: float) -> None:
        super().__init__(events, headers=SSE_HEADERS)
        self._on_end = on_end
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a stream was cut after %.0f s: its client did not read it", self._limit_s)
        finally:
            self._on_end()


def event(body: str) -> str:
    return f"data: {body}\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None, with `work` cancelled, when the client leaves first."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
