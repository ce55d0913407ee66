"""What surrounds every request, in plain ASGI: its id, the answer when code fails, the cap on its body."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import INTERNAL, ApiError

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[!-~]{1,128}")  # printable, so that it may stand in a header and a log line


class RequestIds:
    """`scope["state"]["request_id"]` is the client's X-Request-ID, or a new one, and the answer carries it.

    An exception that nobody caught becomes a 500 without its text; the log has it under the id. `send_header`
    is off behind a proxy that answers with the header itself, as Ray Serve's does.
    """

    def __init__(self, app: ASGIApp, *, send_header: bool = True) -> None:
        self._app = app
        self._send_header = send_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._send_header:
                    MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if started:
                raise
            await ApiError(500, INTERNAL).response()(scope, receive, send_with_id)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


class BodyLimit:
    """Bodies over `max_bytes` get 413, at once where Content-Length tells, else while they are read."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > self._max_bytes):
            await ApiError(413, self._message(), headers={"Connection": "close"}).response()(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._message())
            return message

        await self._app(scope, receive_counted, send)

    def _message(self) -> str:
        return f"The body is larger than the {self._max_bytes} bytes allowed; send less, or several requests."
