"""OpenAI's REST API over an AsyncEngine, as a plain FastAPI app: for Ray Serve, uvicorn, or a test.

A request's way: body checked (protocol.py, chat_protocol.py), chat template rendered and tokenised (prompts.py) off the
event loop (tokenising.py), given to the engine (async_engine.py), its outputs shaped (replies.py) and sent whole or as
events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from deployments import errors
from deployments.answers import ChatCompletion, TextCompletion
from deployments.async_engine import AsyncEngine
from deployments.auth import Authenticate
from deployments.chat_protocol import ChatCompletionRequest
from deployments.metrics import CONTENT_TYPE
from deployments.middleware import BodyLimit, RequestIds
from deployments.protocol import CompletionRequest
from deployments.service import Service, ServiceSettings
from deployments.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    describe,
)
from deployments.tool_calls import ToolNotation
from deployments.tracing import DescribeSpans, Tracing
from deployments.transport import StrictJsonRoute
from medusa import __version__
from medusa.tokenizer import ChatTokenizer

PAGE = Path(__file__).with_name("page.html")
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_ERROR = {"description": "An error in OpenAI's shape: {error: {message, type, param, code}}."}
_GENERATION_ERRORS: dict[int | str, dict[str, Any]] = {
    status: _ERROR for status in (400, 401, 404, 408, 413, 429, 500, 503)
}


def build_api(
    engine: AsyncEngine,
    tokenizer: ChatTokenizer,
    model_name: str,
    *,
    served: Mapping[str, str | None] | None = None,
    request_timeout_s: float = 600.0,
    max_body_bytes: int = 32 * 2**20,
    body_timeout_s: float = 60.0,
    api_key_hashes: Sequence[str] = (),
    tool_notation: ToolNotation | None = None,
    send_request_id: bool = True,
    tracing: Tracing | None = None,
) -> FastAPI:
    """`served` says at /version what runs (the backbone and its digest). With `api_key_hashes` (hex sha256) a request
    needs one of those keys. With `tracing` each request for replies leaves a span."""
    settings = ServiceSettings(
        model_name=model_name,
        served=served or {},
        request_timeout_s=request_timeout_s,
        tool_notation=tool_notation,
    )
    service = Service(engine, tokenizer, settings)
    api = FastAPI(
        title="Medusa on Ray",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,
        telemetry=tracing.telemetry if tracing else None,
    )
    api.router.route_class = StrictJsonRoute
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes, timeout_s=body_timeout_s)
    api.add_middleware(Authenticate, hashes=api_key_hashes)
    api.add_middleware(RequestIds, send_header=send_request_id, metrics=engine.metrics)
    if tracing:
        api.add_middleware(DescribeSpans, model_name=model_name)
    errors.install(api)
    _add_generation(api, service)
    _add_models(api, service)
    _add_tokenization(api, service)
    _add_operation(api, service)
    return api


def _add_generation(api: FastAPI, service: Service) -> None:
    @api.post("/v1/chat/completions", response_model=ChatCompletion, responses=_GENERATION_ERRORS)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @api.post("/v1/completions", response_model=TextCompletion, responses=_GENERATION_ERRORS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)


def _add_models(api: FastAPI, service: Service) -> None:
    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @api.get("/v1/models/{name:path}", responses={404: _ERROR})
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card()


def _add_tokenization(api: FastAPI, service: Service) -> None:
    bad: dict[int | str, dict[str, Any]] = {status: _ERROR for status in (400, 401, 404, 408, 413, 429)}

    @api.post("/tokenize", responses=bad, response_model_exclude_none=True)
    async def tokenize(body: TokenizeRequest, request: Request) -> TokenizeResponse:
        return await service.tokenize(body, request)

    @api.post("/detokenize", responses=bad)
    async def detokenize(body: DetokenizeRequest, request: Request) -> DetokenizeResponse:
        return DetokenizeResponse(prompt=await service.detokenize(body, request))

    @api.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return describe(service.tokenizer, service.engine.max_model_len)


def _add_operation(api: FastAPI, service: Service) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @api.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    @api.get("/health", responses={503: _ERROR})
    async def health() -> dict[str, Any]:
        return service.health()

    @api.get("/version")
    async def show_version() -> dict[str, Any]:
        return {"version": __version__} | service.version()

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(service.engine.metrics.exposition(), media_type=CONTENT_TYPE)
