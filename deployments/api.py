"""OpenAI's REST API over an AsyncEngine, as a plain FastAPI app: for Ray Serve, uvicorn, or a test.

A request's way: body checked (protocol.py), chat template rendered and tokenised off the event loop, given to
the engine (async_engine.py), its outputs shaped (replies.py) and sent whole or as server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.types import Receive, Scope, Send

from deployments import errors
from deployments.async_engine import AsyncEngine, EngineUnavailable, QueueFull, Stream
from deployments.errors import ApiError
from deployments.middleware import BodyLimit, RequestIds
from deployments.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from deployments.replies import (
    Answer,
    ChatCompletion,
    ChatReply,
    Tally,
    TextCompletion,
    TextReply,
    TokenTexts,
)
from medusa import Completion, SamplingParams, __version__
from medusa.tokenizer import ChatTokenizer

T = TypeVar("T")
JSON_HEADERS = {"Content-Type": "application/json"}
SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
CLIENT_GONE = 499  # nginx's number for an answer that nobody waits for


def build_api(
    engine: AsyncEngine,
    tokenizer: ChatTokenizer,
    model_name: str,
    *,
    served: Mapping[str, str | None] | None = None,
    fingerprint: str | None = None,
    max_body_bytes: int = 32 * 2**20,
    send_request_id: bool = True,
) -> FastAPI:
    """`served` says at /version what runs (backbone, heads, digests); `fingerprint` is in each answer."""
    service = Service(engine, tokenizer, model_name, fingerprint)
    api = FastAPI(
        title="Medusa on Ray",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        strict_content_type=False,
    )
    api.router.route_class = StrictJsonRoute
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_middleware(RequestIds, send_header=send_request_id)
    errors.install(api)

    @api.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @api.post("/v1/completions", response_model=TextCompletion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.complete(body, request)

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.model_card()

    @api.get("/health")
    async def health() -> dict[str, Any]:
        service.check_health()
        return {"status": "ok", "engine": asdict(engine.stats())}

    @api.get("/version")
    async def show_version() -> dict[str, Any]:
        return {"version": __version__, "model": model_name, **(served or {})}

    return api


class Service:
    """What the routes do."""

    def __init__(self, engine: AsyncEngine, tokenizer: ChatTokenizer, model_name: str, fingerprint: str | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.model_name = model_name
        self._fingerprint = fingerprint
        self._created = int(time.time())
        self._texts = TokenTexts(tokenizer.hf)
        # One thread: long prompts do not hold up the event loop, and a fast tokenizer's encode is not shared.
        self._tokenising = ThreadPoolExecutor(max_workers=1, thread_name_prefix="medusa-tokenise")

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        messages = [message.for_template() for message in body.messages]
        arguments = body.chat_template_kwargs or {}
        prompt_ids = await self._tokenise("messages", lambda: self.tokenizer.encode_chat(messages, **arguments))
        self._check_length(prompt_ids, "messages")
        room = self.engine.max_model_len - len(prompt_ids)
        params = self._sampling_params(body, default_max_tokens=room)
        reply = ChatReply(**self._head("chatcmpl", request))
        return await self._answer(request, body, reply, [prompt_ids], params, "messages")

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        prompts = await self._tokenise(
            "prompt", lambda: [self.tokenizer.encode(p) if isinstance(p, str) else p for p in body.prompt]
        )
        for prompt_ids in prompts:
            self._check_length(prompt_ids, "prompt")
        params = self._sampling_params(body, default_max_tokens=DEFAULT_COMPLETION_TOKENS)
        reply = TextReply(**self._head("cmpl", request))
        return await self._answer(request, body, reply, prompts, params, "prompt")

    def check_model(self, name: str | None) -> None:
        """A request may leave the model out: there is one."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"The model `{name}` does not exist; this service has `{self.model_name}`.",
                param="model",
            )

    def check_health(self) -> None:
        try:
            self.engine.check_health()
        except EngineUnavailable as error:
            raise errors.from_engine(error) from error

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "medusa",
            "max_model_len": self.engine.max_model_len,
        }

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        reply: ChatReply | TextReply,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        param: str,
    ) -> Response:
        try:
            stream = await self.engine.submit([(prompt_ids, params) for prompt_ids in prompts])
        except (ValueError, QueueFull, EngineUnavailable) as error:
            raise errors.from_engine(error, param=param) from error
        tally = Tally(sum(map(len, prompts)))
        if body.stream:
            return EventStream(self._events(body, reply, stream, tally, params.n), on_end=stream.close)
        try:
            completions = await _unless_disconnected(request, _collect(stream, tally, params.n))
        except EngineUnavailable as error:
            raise errors.from_engine(error) from error
        finally:
            stream.close()
        if completions is None:
            return Response(status_code=CLIENT_GONE)
        return Response(reply.whole(completions, tally.total()).to_json(), headers=JSON_HEADERS)

    async def _events(
        self, body: GenerationRequest, reply: ChatReply | TextReply, stream: Stream, tally: Tally, n: int
    ) -> AsyncIterator[str]:
        try:
            async for prompt, output in stream:
                choice = prompt * n + output.index
                tally.add(choice, output)
                for chunk in reply.chunks(choice, output):
                    if body.include_usage:
                        chunk.usage = tally.so_far() if body.continuous_usage else None
                    yield _event(chunk)
        except EngineUnavailable as error:
            yield f"data: {json.dumps(errors.from_engine(error).body())}\n\n"
            return  # no [DONE]: the reply is not whole
        if body.include_usage:
            yield _event(reply.usage_chunk(tally.total()))
        yield "data: [DONE]\n\n"

    async def _tokenise(self, param: str, encode: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenising, encode)
        except ValueError as error:  # a template that refuses these messages, among others
            raise ApiError(400, str(error), param=param) from error

    def _sampling_params(self, body: GenerationRequest, *, default_max_tokens: int) -> SamplingParams:
        for name, token_ids in (
            ("logit_bias", body.logit_bias or ()),
            ("stop_token_ids", body.stop_token_ids or ()),
        ):
            unknown = [token_id for token_id in token_ids if not 0 <= token_id < self.engine.vocab_size]
            if unknown:
                message = f"{name}: token ids {unknown[:5]} are outside the vocabulary of {self.engine.vocab_size}."
                raise ApiError(400, message, param=name)
        try:
            return body.sampling_params(default_max_tokens=default_max_tokens)
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error

    def _check_length(self, prompt_ids: Sequence[int], param: str) -> None:
        limit = self.engine.max_model_len
        if len(prompt_ids) >= limit:
            raise ApiError(
                400,
                f"The prompt has {len(prompt_ids)} tokens, but this model's context holds {limit} "
                f"with the reply; send at most {limit - 1}.",
                param=param,
            )

    def _head(self, prefix: str, request: Request) -> dict[str, Any]:
        return {
            "reply_id": f"{prefix}-{request.state.request_id}",
            "created": int(time.time()),
            "model": self.model_name,
            "fingerprint": self._fingerprint,
            "texts": self._texts,
        }


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
    """Server-sent events; `on_end` is called however it ends, also when the client left before it began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], *, on_end: Callable[[], None]) -> None:
        super().__init__(events, headers=SSE_HEADERS)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _event(answer: Answer) -> str:
    return f"data: {answer.to_json()}\n\n"


async def _collect(stream: Stream, tally: Tally, n: int) -> list[Completion]:
    """Every reply, in the order of prompts and then of their n."""
    done: dict[int, Completion] = {}
    async for prompt, output in stream:
        choice = prompt * n + output.index
        tally.add(choice, output)
        if output.finished is not None:
            done[choice] = output.finished
    return [done[choice] for choice in sorted(done)]


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
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
