"""OpenTelemetry traces: one span for each request for replies, exported by OTLP over HTTP.

FastAPI makes the span: its parent is the client's `traceparent`, and it has the route, the status and the time of the
whole answer. `DescribeSpans` adds what the service knows when the answer ends, under the names that vLLM's span has.
The SDK is loaded where a `Tracing` is made, and nowhere else.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.streams import Stream
from deployments.tally import Tally
from medusa import SamplingParams, __version__
from medusa.config import ConfigError

if TYPE_CHECKING:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

logger = logging.getLogger(__name__)

SPAN_NAME = "llm_request"
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}  # by route; others leave no span
PROTOCOL = "http/protobuf"
FLUSH_S = 5.0  # how long a service that ends waits for the collector


@dataclass(frozen=True)
class Answered:
    """A request that the engine took: what was asked for, when it came, and how much."""

    params: SamplingParams
    stream: Stream
    tally: Tally


def check_endpoint(url: str) -> None:
    """Raises ConfigError for what is no URL of HTTP, or holds a password, which configurations and logs would show."""
    try:
        parts = urlsplit(url)
        is_http = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        names_user = "@" in parts.netloc
    except ValueError:
        is_http = names_user = False
    if names_user:
        raise ConfigError(
            "otlp_traces_endpoint holds a user or a password; give the address without, and what the collector asks "
            "for in OTEL_EXPORTER_OTLP_HEADERS"
        )
    if not is_http:
        raise ConfigError(
            f"otlp_traces_endpoint {url!r} is no URL of http or https; give the whole address that takes traces by "
            "OTLP over HTTP, such as http://collector:4318/v1/traces"
        )


def exporter_class() -> type[OTLPSpanExporter]:
    """Raises ConfigError where the extra is missing, or the environment asks for another protocol than HTTP's."""
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := os.environ.get(name) or PROTOCOL) != PROTOCOL:
            raise ConfigError(f"{name} is {protocol!r}, but traces are exported by {PROTOCOL} only; set it to that")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint needs the extra `tracing` (pip install 'medusa-on-ray[tracing]'): {error}"
        ) from error
    return OTLPSpanExporter


class Tracing:
    """Where spans go: batches that a thread of the SDK sends; spans beyond its queue are dropped. The SDK's variables
    (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_BSP_*, OTEL_EXPORTER_OTLP_HEADERS, ...) hold."""

    def __init__(self, endpoint: str, *, replica: str = "local") -> None:
        make_exporter = exporter_class()
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        ours = {"service.name": "medusa", "service.version": __version__, "medusa.replica": replica}
        resource = Resource.create(ours | dict(OTELResourceDetector().detect().attributes))
        self._exporter = make_exporter(endpoint=endpoint)
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))

    @property
    def telemetry(self) -> TelemetryConfig:
        """What FastAPI is to do: the span of a request for replies, and nothing else."""
        return {
            "tracer_provider": self._provider,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": lambda scope: scope.get("path") not in OPERATIONS,
        }

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Sends what waits, and gives it up where the collector does not take it in time."""
        flushing = threading.Thread(target=self._provider.shutdown, name="medusa-traces", daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        if flushing.is_alive():
            self._exporter.shutdown()  # it retries no more
            logger.warning("the last traces did not reach the collector within %.0f s", timeout_s)


class DescribeSpans:
    """ASGI middleware around all others: writes to FastAPI's span before the answer's last part ends it."""

    def __init__(self, app: ASGIApp, *, model_name: str) -> None:
        self._app = app
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        span = trace.get_current_span()
        if scope["type"] != "http" or scope["path"] not in OPERATIONS or not span.is_recording():
            await self._app(scope, receive, send)
            return
        if scope.get("query_string"):
            span.set_attribute("url.query", "REDACTED")  # FastAPI's has it as it came; some clients put keys there
        status = 0

        async def send_and_describe(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._describe(span, scope, status)
            await send(message)

        try:
            await self._app(scope, receive, send_and_describe)
        finally:
            if span.is_recording():  # the answer was cut
                self._describe(span, scope, status)

    def _describe(self, span: trace.Span, scope: Scope, status: int) -> None:
        state = scope.get("state", {})
        answered: Answered | None = state.get("answered")
        attributes = {
            "gen_ai.operation.name": OPERATIONS[scope["path"]],
            "gen_ai.request.id": state.get("request_id"),
            "gen_ai.response.model": self._model_name,
        }
        if answered is not None:
            attributes |= _asked(answered.params) | _given(answered) | _timed(answered) | _accepted(answered)
        failure = answered.stream.failure if answered is not None else None
        if failure is not None or status >= 400:  # FastAPI itself marks those from 500 on
            span.set_status(trace.StatusCode.ERROR)
            attributes["error.type"] = type(failure).__name__ if failure is not None else str(status)
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        span.update_name(SPAN_NAME)


def _asked(params: SamplingParams) -> dict[str, Any]:
    return {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.n": params.n,
    }


def _given(answered: Answered) -> dict[str, Any]:
    """Tokens under vLLM's names and under those that the conventions have now; replies that were cut are aborted."""
    tally, heads = answered.tally, answered.stream.heads
    reasons = [completion.finish_reason for completion in tally.finished]
    return {
        "gen_ai.usage.prompt_tokens": tally.prompt_tokens,
        "gen_ai.usage.completion_tokens": tally.completion_tokens,
        "gen_ai.usage.input_tokens": tally.prompt_tokens,
        "gen_ai.usage.output_tokens": tally.completion_tokens,
        "gen_ai.response.finish_reasons": reasons + ["abort"] * answered.stream.num_unfinished,
        "medusa.heads_version": heads.version,
        "medusa.heads_digest": heads.digest,
    }


def _timed(answered: Answered) -> dict[str, Any]:
    """What the histograms of /metrics got, in seconds; the end is that of a request whose replies are whole."""
    timing, is_whole = answered.stream.timing, answered.stream.is_finished
    return {
        "gen_ai.latency.time_in_queue": timing.waited_s,
        "gen_ai.latency.time_to_first_token": timing.first_token_s,
        "gen_ai.latency.e2e": timing.ended_s if is_whole else None,
    }


def _accepted(answered: Answered) -> dict[str, Any]:
    """Of requests whose replies are whole, as a reply tells its steps when it ends."""
    if not answered.stream.is_finished:
        return {}
    finished = answered.tally.finished
    steps = sum(completion.num_steps for completion in finished)
    decoded = sum(sum(completion.accepted_per_step) for completion in finished)
    return {
        "medusa.steps": steps,
        "medusa.num_draft_tokens": sum(completion.num_drafted for completion in finished),
        "medusa.num_accepted_tokens": decoded - steps,
        "medusa.mean_acceptance_length": decoded / steps if steps else 1.0,
    }
