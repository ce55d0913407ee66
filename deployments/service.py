"""What the routes do: a body becomes prompts and sampling parameters, the engine's outputs become an answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from deployments import errors
from deployments.admission import QueueFull
from deployments.async_engine import AsyncEngine
from deployments.chat_protocol import ChatCompletionRequest
from deployments.errors import ApiError
from deployments.open_streams import EngineUnavailable
from deployments.prompts import Prompts
from deployments.protocol import DEFAULT_COMPLETION_TOKENS, CompletionRequest, GenerationRequest
from deployments.replies import ChatReply, Head, TextReply
from deployments.streams import HeadsVersion, Stream
from deployments.tally import Tally
from deployments.token_texts import TokenTexts
from deployments.tokenising import Tokenising
from deployments.tokenization import DetokenizeRequest, TokenizeRequest, TokenizeResponse, tokenize
from deployments.tool_calls import ToolNotation, call_grammar, reader_for
from deployments.tracing import Answered
from deployments.transport import CLIENT_GONE, JSON_HEADERS, EventStream, event, unless_disconnected
from medusa import Completion, Grammar, Output, SamplingParams
from medusa.tokenizer import ChatTokenizer

Reply = ChatReply | TextReply
SLOW_READER_S = 10.0  # beyond a request's own limit, so that its last event can still be read


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """`served` is what /version tells beside the versions: the backbone and its digest. `request_timeout_s` bounds a
    request from its body to its last token."""

    model_name: str
    served: Mapping[str, str | None] = field(default_factory=dict)
    request_timeout_s: float = 600.0
    tool_notation: ToolNotation | None = None


class Service:
    def __init__(self, engine: AsyncEngine, tokenizer: ChatTokenizer, settings: ServiceSettings) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.settings = settings
        self._created = int(time.time())
        self._texts = TokenTexts(tokenizer.hf)
        self._prompts = Prompts(tokenizer, engine)
        self._tokenising = Tokenising(max_requests=engine.bounds.replies)  # no more could be admitted behind it

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        async with self._in_time(request):
            prompt_ids = await self._tokenising.run("messages", lambda: self._prompts.of_chat(body))
            params = await self._sampling_params(body, default_max_tokens=self.engine.max_model_len - len(prompt_ids))
            must_call = await self._tokenising.run("tools", lambda: call_grammar(body))
            if must_call is not None:
                params = replace(params, grammar=await self._prepared("tools", must_call))
        readers = [reader_for(body, self.settings.tool_notation) for _ in range(params.n)]
        return await self._answer(
            request, body, lambda head: ChatReply(head, readers), [prompt_ids], params, "messages"
        )

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        async with self._in_time(request):
            prompts = await self._tokenising.run("prompt", lambda: self._prompts.of_completion(body))
            params = await self._sampling_params(body, default_max_tokens=DEFAULT_COMPLETION_TOKENS)
            echoed = await self._tokenising.run("prompt", lambda: self._prompts.echoed(body, prompts))
        return await self._answer(
            request, body, lambda head: TextReply(head, echoed, params.n), prompts, params, "prompt"
        )

    async def tokenize(self, body: TokenizeRequest, request: Request) -> TokenizeResponse:
        self.check_model(body.model)
        param = "prompt" if body.prompt is not None else "messages"
        async with self._in_time(request):
            ids = await self._tokenising.run(param, lambda: tokenize(self.tokenizer, body))
        texts = [self._texts.to_text(token_id) for token_id in ids] if body.return_token_strs else None
        return TokenizeResponse(count=len(ids), max_model_len=self.engine.max_model_len, tokens=ids, token_strs=texts)

    async def detokenize(self, body: DetokenizeRequest, request: Request) -> str:
        self.check_model(body.model)
        self._prompts.check_ids("tokens", body.tokens)
        async with self._in_time(request):
            return await self._tokenising.run(
                "tokens", lambda: self.tokenizer.decode(body.tokens, skip_special_tokens=False)
            )

    def check_model(self, name: str | None) -> None:
        """A request may leave the model out: there is one."""
        served = self.settings.model_name
        if name is not None and name != served:
            raise ApiError(404, f"The model `{name}` does not exist; this service has `{served}`.", param="model")

    def health(self) -> dict[str, Any]:
        try:
            self.engine.check_health()
        except EngineUnavailable as error:
            raise errors.from_engine(error) from error
        failed = self.engine.failed_heads
        return {
            "status": "ok",
            "engine": asdict(self.engine.stats()),
            "heads": asdict(self.engine.heads),
            "failed_heads": asdict(failed) if failed else None,
        }

    def version(self) -> dict[str, Any]:
        heads = self.engine.heads
        return {"model": self.settings.model_name, "heads_version": heads.version, "heads_digest": heads.digest} | dict(
            self.settings.served
        )

    def model_card(self) -> dict[str, Any]:
        return {
            "id": self.settings.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "medusa",
            "max_model_len": self.engine.max_model_len,
        }

    async def _answer(
        self,
        request: Request,
        body: GenerationRequest,
        make_reply: Callable[[Head], Reply],
        prompts: Sequence[list[int]],
        params: SamplingParams,
        param: str,
    ) -> Response:
        try:
            async with self._in_time(request):
                stream = await self.engine.submit([(prompt_ids, params) for prompt_ids in prompts])
        except (ValueError, QueueFull, EngineUnavailable) as error:
            raise errors.from_engine(error, param=param) from error
        log = request.scope["state"].setdefault("log", {})
        tally = Tally(sum(map(len, prompts)), stream.heads, log)
        request.scope["state"]["answered"] = Answered(params, stream, tally)
        reply = make_reply(self._head("chatcmpl" if param == "messages" else "cmpl", request, stream.heads))
        if body.stream:
            events = self._events(body, reply, stream, tally, params.n, self._deadline(request))
            limit_s = self.settings.request_timeout_s + SLOW_READER_S
            return EventStream(events, on_end=stream.close, limit_s=limit_s)
        try:
            async with self._in_time(request):
                completions = await unless_disconnected(request, _collect(stream, tally, params.n))
        except EngineUnavailable as error:
            raise errors.from_engine(error) from error
        finally:
            stream.close()
        if completions is None:
            return Response(status_code=CLIENT_GONE)
        return Response(reply.whole(completions, tally.total()).to_json(), headers=JSON_HEADERS)

    async def _events(
        self, body: GenerationRequest, reply: Reply, stream: Stream, tally: Tally, n: int, deadline: float
    ) -> AsyncIterator[str]:
        # Where each step is to be told apart, outputs that wait for a slow reader stay apart as well.
        outputs: AsyncIterator[tuple[int, Output]] = stream if body.include_acceptance else stream.merged()
        null_usage, continuous, told = body.include_usage, body.continuous_usage, body.include_acceptance
        is_told_each = continuous or told
        stream.expire_at(deadline)
        events = ""  # what is to be sent together
        try:
            async for prompt, output in outputs:
                choice = prompt * n + output.index
                tally.add(choice, output)
                text = None if is_told_each else reply.text_chunk(choice, output, null_usage=null_usage)
                if text is not None:
                    if text:
                        yield event(text)
                    continue
                for chunk in reply.chunks(choice, output, include_acceptance=told):
                    if null_usage:
                        chunk.usage = tally.so_far() if continuous else None
                    events += event(chunk.to_json())
                if not stream.is_finished:  # the last goes with what ends the stream
                    yield events
                    events = ""
        except (EngineUnavailable, TimeoutError) as error:
            answer = self._too_late() if isinstance(error, TimeoutError) else errors.from_engine(error)
            yield event(json.dumps(answer.body()))
            return  # no [DONE]: the reply is not whole
        usage = tally.total()
        if null_usage:
            events += event(reply.usage_chunk(usage).to_json())
        yield events + event("[DONE]")

    def _deadline(self, request: Request) -> float:
        """When the time of a request is over, from the first call on."""
        now = asyncio.get_running_loop().time()
        deadline: float = request.scope["state"].setdefault("deadline", now + self.settings.request_timeout_s)
        return deadline

    @asynccontextmanager
    async def _in_time(self, request: Request) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout_at(self._deadline(request)):
                yield
        except TimeoutError:
            raise self._too_late() from None

    def _too_late(self) -> ApiError:
        seconds = self.settings.request_timeout_s
        message = f"The answer was not whole after {seconds:g} s; ask for fewer tokens or send a shorter prompt."
        return ApiError(408, message, headers={"x-should-retry": "false"})  # OpenAI's client would send it again

    async def _sampling_params(self, body: GenerationRequest, *, default_max_tokens: int) -> SamplingParams:
        self._prompts.check_ids("logit_bias", body.logit_bias or ())
        self._prompts.check_ids("stop_token_ids", body.stop_token_ids or ())
        form = "response_format" if body.response_format else "structured_outputs"
        if (grammar := await self._tokenising.run(form, body.grammar)) is not None:
            await self._prepared(form, grammar)
        try:
            return body.sampling_params(default_max_tokens=default_max_tokens)
        except ValueError as error:
            raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from error

    async def _prepared(self, param: str, grammar: Grammar) -> Grammar:
        await self._tokenising.run(param, lambda: self.engine.prepare_grammar(grammar))
        return grammar

    def _head(self, prefix: str, request: Request, heads: HeadsVersion) -> Head:
        digest = heads.digest or self.settings.served.get("backbone_digest")
        return Head(
            reply_id=f"{prefix}-{request.state.request_id}",
            created=int(time.time()),
            model=self.settings.model_name,
            fingerprint=self._fingerprint(digest),
            texts=self._texts,
        )

    def _fingerprint(self, digest: str | None) -> str | None:
        """Names what decides the tokens: the weights, and how they are held."""
        if digest is None:
            return None
        quantization = self.settings.served.get("quantization")
        return "-".join(filter(None, (f"medusa-{digest.removeprefix('sha256:')[:12]}", quantization)))


async def _collect(stream: Stream, tally: Tally, n: int) -> list[Completion]:
    """Every reply, in the order of prompts and then of their n."""
    done: dict[int, Completion] = {}
    async for prompt, output in stream.merged():
        choice = prompt * n + output.index
        tally.add(choice, output)
        if output.finished is not None:
            done[choice] = output.finished
    return [done[choice] for choice in sorted(done)]
