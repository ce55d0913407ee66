"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.admission import QueueFull
from deployments.fields import explain
from deployments.open_streams import EngineUnavailable

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
INTERNAL = "Internal error; the service's log has the details under this request's id."


class ApiError(Exception):
    """An answer that is not 200; `param` names the field of the body that is at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def from_engine(error: Exception, *, param: str | None = None) -> ApiError:
    """The answer to what AsyncEngine raises: ValueError, QueueFull or EngineUnavailable."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, EngineUnavailable):
        return ApiError(503, str(error), headers={"Retry-After": "1"})
    return ApiError(400, str(error), param=param)


def install(api: FastAPI) -> None:
    """Every error that FastAPI answers, in this shape. What nobody caught is middleware.py's."""

    @api.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        message, param = explain(error.errors()[0])
        return ApiError(400, message, param=param).response()

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return ApiError(error.status_code, _describe(request, error), headers=error.headers).response()


def _describe(request: Request, error: HTTPException) -> str:
    route = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return f"{route}: no such route; the API's routes are listed at /openapi.json."
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "see /openapi.json")
        return f"{route}: method not allowed; allowed: {allowed}."
    return str(error.detail)
