"""What surrounds every request, in plain ASGI: its id and log line, the answer when code fails, the cap on its body."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import logs
from deployments.errors import INTERNAL, ApiError
from deployments.metrics import Metrics, clock

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable, so that it may stand in a header and a log line
_REFUSALS = frozenset({401, 408, 413, 429, 503})


class RequestIds:
    """`scope["state"]["request_id"]` is the client's X-Request-ID, or a new one, and the answer carries it.

    An exception that nobody caught becomes a 500 without its text; the log has it under the id. `send_header`
    is off behind a proxy that answers with the header itself, as Ray Serve's does.
    """

    def __init__(self, app: ASGIApp, *, send_header: bool = True, metrics: Metrics | None = None) -> None:
        self._app = app
        self._send_header = send_header
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        token = logs.request_id.set(request_id)
        started, status = clock(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._send_header:
                    MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if status:
                raise
            await ApiError(500, INTERNAL).response()(scope, receive, send_with_id)
        finally:
            self._tell(scope, status, clock() - started)
            logs.request_id.reset(token)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        if status in _REFUSALS and self._metrics is not None:
            self._metrics.refused(status)
        route = scope["path"][:128]
        fields = {"method": scope["method"], "route": route, "status": status, "seconds": round(seconds, 4)}
        fields |= scope["state"].get("log", {})
        logger.info("%s %s %d", scope["method"], route, status, extra=fields)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class BodyLimit:
    """Bodies over `max_bytes` get 413, at once where Content-Length tells, else while they are read; those that do not
    arrive within `timeout_s` get 408."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float = 60.0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > self._max_bytes):
            await ApiError(413, self._message(), headers={"Connection": "close"}).response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        received = 0
        deadline: float | None = clock() + self._timeout_s  # None once the body is whole: a reply may take its time

        async def receive_counted() -> Message:
            nonlocal received, deadline
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - clock())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, self._late(), headers={"Connection": "close"}) from None
            if not message.get("more_body", False):
                deadline = None
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._message())
            return message

        return receive_counted

    def _message(self) -> str:
        return f"The body is larger than the {self._max_bytes} bytes allowed; send less, or several requests."

    def _late(self) -> str:
        return f"The body did not arrive within {self._timeout_s:g} s; send it at once."
