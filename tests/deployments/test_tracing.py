"""Traces as a collector receives them: by OTLP over HTTP, from the service as it runs."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from deployments import tracing as tracing_module
from deployments.api import build_api
from deployments.config import ServerConfig
from deployments.loading import load_service
from deployments.local import local_service
from deployments.one_process import free_port
from deployments.server import build_app
from deployments.tracing import Tracing
from medusa.config import ConfigError
from tests.deployments.conftest import LiveServer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
CHAT = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 12, "temperature": 0}


class Collector:
    """Takes what an OpenTelemetry collector takes at /v1/traces, and keeps it."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self._came = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with collector._came:
                    collector.requests.append(ExportTraceServiceRequest.FromString(body))
                    collector._came.notify_all()
                self.send_response(200 if self.path == "/v1/traces" else 404)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def spans(self) -> list[Span]:
        resources = [resource for request in self.requests for resource in request.resource_spans]
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]

    def find(self, request_id: str) -> Span:
        """The span of that request, once it is there."""
        with self._came:
            assert self._came.wait_for(lambda: request_id in map(id_of, self.spans()), 30), request_id
        (span,) = [span for span in self.spans() if id_of(span) == request_id]
        return span

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def read(value):
    """An attribute's value in Python."""
    kind = value.WhichOneof("value")
    return [read(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes_of(carrier) -> dict:
    return {pair.key: read(pair.value) for pair in carrier.attributes}


def id_of(span: Span) -> str | None:
    return attributes_of(span).get("gen_ai.request.id")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module", autouse=True)
def quick_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("OTEL_")]:
            patch.delenv(name)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield


@pytest.fixture(scope="module")
def served(collector, tiny_llama, tiny_heads) -> Iterator[str]:
    """The URL of the one-process service with the real engine."""
    config = ServerConfig(
        model=str(tiny_llama),
        heads=str(tiny_heads),
        heads_version="7",
        model_name="tiny",
        device="cpu",
        speculation=6,
        max_batch_size=4,
        otlp_traces_endpoint=collector.url,
    )
    service = load_service(config)
    server = LiveServer(service.api)
    yield server.url
    server.close()
    service.close()


@contextmanager
def exporting(endpoint: str) -> Iterator[Tracing]:
    tracing = Tracing(endpoint)
    yield tracing
    tracing.close(timeout_s=0.2)


@pytest.fixture
def scripted_url(async_engine, tokenizer, serve_live, collector) -> Iterator[str]:
    with exporting(collector.url) as tracing:
        yield serve_live(build_api(async_engine, tokenizer, "tiny", tracing=tracing))


def figures(url: str) -> dict[str, float]:
    """What /metrics has, without labels."""
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if not line.startswith("#")]
    return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}


def usage_of(response: httpx.Response, *, stream: bool) -> dict:
    if not stream:
        return response.json()["usage"]
    events = [line[6:] for line in response.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return json.loads(events[-2])["usage"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_one_span_with_the_figures_of_its_answer_and_of_the_metrics(served, collector, stream):
    request_id = f"real-{stream}"
    body = CHAT | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})
    headers = {"traceparent": SAMPLED, "X-Request-ID": request_id}
    before, started = figures(served), time.time_ns()
    response = httpx.post(f"{served}/v1/chat/completions", json=body, headers=headers, timeout=30)
    ended, now = time.time_ns(), figures(served)
    usage = usage_of(response, stream=stream)

    span = collector.find(request_id)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.name, span.kind) == ("llm_request", Span.SPAN_KIND_SERVER)
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert started <= span.start_time_unix_nano < span.end_time_unix_nano <= ended

    told = attributes_of(span)
    assert told["http.route"] == "/v1/chat/completions" and told["http.response.status_code"] == 200
    assert (told["gen_ai.operation.name"], told["gen_ai.response.model"]) == ("chat", "tiny")
    assert told["gen_ai.request.max_tokens"] == 12 and told["gen_ai.request.temperature"] == 0
    assert told["gen_ai.request.n"] == 1 and told["gen_ai.request.top_p"] == 1
    for name, old in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
        assert told[f"gen_ai.usage.{name}"] == told[f"gen_ai.usage.{old}"] == usage[name]
    assert told["gen_ai.response.finish_reasons"] == ["length"]
    assert told["medusa.heads_version"] == "7" and len(told["medusa.heads_digest"]) >= 64
    assert told["medusa.steps"] == usage["medusa"]["steps"] > 0
    assert told["medusa.mean_acceptance_length"] == usage["medusa"]["mean_acceptance_length"]

    gained = {name: value - before.get(name, 0.0) for name, value in now.items()}
    assert told["medusa.num_draft_tokens"] == gained["medusa_spec_decode_num_draft_tokens_total"] > 0
    assert told["medusa.num_accepted_tokens"] == gained["medusa_spec_decode_num_accepted_tokens_total"]
    for attribute, metric in (
        ("time_in_queue", "request_queue_time"),
        ("time_to_first_token", "time_to_first_token"),
        ("e2e", "e2e_request_latency"),
    ):
        assert told[f"gen_ai.latency.{attribute}"] == pytest.approx(gained[f"medusa_{metric}_seconds_sum"], abs=1e-6)
    assert "Paris" not in str(span) and "capital" not in str(span)  # no prompt, no reply


@pytest.mark.parametrize(("path", "status"), [("/v1/completions", 200), ("/v1/chat/completions", 400)])
def test_what_a_client_puts_into_the_address_is_not_told(scripted_url, collector, path, status):
    headers = {"X-Request-ID": f"query-{status}"}
    answer = httpx.post(f"{scripted_url}{path}?api_key=sk-hidden&x=capital", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == status
    span = collector.find(f"query-{status}")
    assert attributes_of(span)["url.query"] == "REDACTED"
    assert "sk-hidden" not in str(span) and "capital" not in str(span)


def test_several_prompts_and_replies_are_one_span(served, collector):
    body = {"prompt": ["one", "two"], "n": 2, "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(f"{served}/v1/completions", json=body, headers={"X-Request-ID": "many"}, timeout=30).json()
    told = attributes_of(collector.find("many"))
    assert (told["gen_ai.operation.name"], told["gen_ai.request.n"]) == ("text_completion", 2)
    assert told["gen_ai.usage.completion_tokens"] == answer["usage"]["completion_tokens"] == 20
    assert told["gen_ai.response.finish_reasons"] == ["length"] * 4
    assert 0 <= told["gen_ai.latency.time_in_queue"] < told["gen_ai.latency.time_to_first_token"]
    assert told["gen_ai.latency.time_to_first_token"] < told["gen_ai.latency.e2e"]


def test_only_requests_for_replies_leave_spans_and_only_where_the_caller_samples(served, collector):
    before = len(collector.spans())
    for path in ("/health", "/metrics", "/v1/models", "/nowhere"):
        httpx.get(served + path, headers={"traceparent": SAMPLED})
    httpx.post(f"{served}/tokenize", json={"prompt": "x"})
    headers = {"traceparent": NOT_SAMPLED, "X-Request-ID": "unsampled"}
    assert httpx.post(f"{served}/v1/chat/completions", json=CHAT, headers=headers, timeout=30).status_code == 200
    httpx.post(f"{served}/v1/chat/completions", json=CHAT, headers={"X-Request-ID": "last"}, timeout=30)
    span = collector.find("last")
    assert not span.parent_span_id and span.trace_id.hex() != TRACE
    assert len(collector.spans()) == before + 1


def test_the_spans_name_their_service(collector, monkeypatch):
    with exporting(collector.url) as tracing:
        assert tracing.telemetry["tracer_provider"].resource.attributes["service.name"] == "medusa"
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=language")
    with exporting(collector.url) as tracing:
        found = tracing.telemetry["tracer_provider"].resource.attributes
    assert (found["service.name"], found["team"], found["medusa.replica"]) == ("chat", "language", "local")


# Requests that are refused, or fail


@pytest.mark.parametrize(
    ("body", "status"),
    [({"prompt": "x", "temperature": -1}, 400), ({"model": "other", "prompt": "x"}, 404), ({"prompt": "x"}, 429)],
)
def test_a_refused_request_is_an_error(scripted_url, collector, async_engine, scripted, body, status):
    scripted.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        full = pool.submit(httpx.post, f"{scripted_url}/v1/completions", json={"prompt": ["x"] * 8, "max_tokens": 1})
        while async_engine.held.replies < 8:
            time.sleep(0.01)
        span = refused_span(scripted_url, collector, body, status)
        scripted.gate.set()
        assert full.result().status_code == 200
    told = attributes_of(span)
    assert (span.status.code, span.parent_span_id.hex()) == (Status.STATUS_CODE_ERROR, PARENT)
    assert (told["http.response.status_code"], told["error.type"]) == (status, str(status))
    assert "gen_ai.usage.completion_tokens" not in told


def refused_span(url: str, collector: Collector, body: dict, status: int) -> Span:
    headers = {"traceparent": SAMPLED, "X-Request-ID": f"refused-{status}"}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == status
    return collector.find(f"refused-{status}")


def test_an_engine_that_fails_makes_errors_of_what_it_ran_and_of_what_comes(scripted_url, collector, scripted):
    scripted.pause_after = 2
    body, url = {"prompt": "x", "max_tokens": 200, "stream": True}, f"{scripted_url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers={"X-Request-ID": "cut"}, timeout=30) as response:
        events = response.iter_lines()
        assert "choices" in next(events)
        scripted.fault = RuntimeError("a secret of the engine")
        scripted.gate.set()
        assert "[DONE]" not in "".join(events)
    span = collector.find("cut")
    told = attributes_of(span)
    assert (span.status.code, told["error.type"]) == (Status.STATUS_CODE_ERROR, "EngineUnavailable")
    assert told["http.response.status_code"] == 200 and told["gen_ai.usage.completion_tokens"] > 0
    assert told["gen_ai.response.finish_reasons"] == ["abort"]
    assert "gen_ai.latency.e2e" not in told and "medusa.steps" not in told

    assert httpx.post(url, json={"prompt": "x"}, headers={"X-Request-ID": "sick"}).status_code == 503
    span = collector.find("sick")
    assert (span.status.code, attributes_of(span)["http.response.status_code"]) == (Status.STATUS_CODE_ERROR, 503)
    assert "secret" not in str(collector.spans())


def test_a_client_that_leaves_makes_an_error_of_its_span(scripted_url, collector, scripted):
    scripted.pause_after = 3
    body = {"prompt": "x", "max_tokens": 200, "stream": True}
    headers = {"X-Request-ID": "left"}
    with httpx.stream("POST", f"{scripted_url}/v1/completions", json=body, headers=headers, timeout=30) as response:
        next(response.iter_lines())
    span = collector.find("left")
    told = attributes_of(span)
    assert (span.name, span.status.code) == ("llm_request", Status.STATUS_CODE_ERROR)
    assert told["gen_ai.response.finish_reasons"] == ["abort"]
    assert told["gen_ai.usage.completion_tokens"] > 0


def test_a_client_that_leaves_before_a_whole_answer_is_told_by_its_status(scripted_url, collector, scripted):
    scripted.pause_after = 3
    body, headers = {"prompt": "x", "max_tokens": 200}, {"X-Request-ID": "gone"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{scripted_url}/v1/completions", json=body, headers=headers, timeout=0.3)
    span = collector.find("gone")
    told = attributes_of(span)
    assert (span.status.code, told["error.type"]) == (Status.STATUS_CODE_ERROR, "499")
    assert told["gen_ai.response.finish_reasons"] == ["abort"]


def test_an_exception_that_nobody_caught_is_an_error_without_its_text(scripted_url, collector, scripted, monkeypatch):
    monkeypatch.setattr("deployments.service.Service.complete", lambda *_: 1 / 0)
    headers = {"X-Request-ID": "broken"}
    assert httpx.post(f"{scripted_url}/v1/completions", json={"prompt": "x"}, headers=headers).status_code == 500
    span = collector.find("broken")
    assert (span.status.code, span.status.message, list(span.events)) == (Status.STATUS_CODE_ERROR, "", [])
    assert attributes_of(span)["http.response.status_code"] == 500


# Collectors that do not take them


@contextmanager
def deaf_endpoint(kind: str) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "hanging":  # connections open, and nobody reads or answers
            listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"


@pytest.mark.parametrize("kind", ["refusing", "hanging"])
def test_a_collector_that_is_not_there_harms_no_request_and_no_end(
    async_engine, tokenizer, serve_live, monkeypatch, caplog, kind
):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "2")
    body = {"prompt": "x", "max_tokens": 5, "stream": True}
    with deaf_endpoint(kind) as endpoint:
        tracing = Tracing(endpoint)
        url = serve_live(build_api(async_engine, tokenizer, "tiny", tracing=tracing))
        with httpx.Client() as client, ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: client.post(f"{url}/v1/completions", json=body), range(20)))
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
        with caplog.at_level(logging.WARNING, logger="deployments.tracing"):
            tracing.close(timeout_s=0.2)
        assert "did not reach the collector" in caplog.text


def test_what_waits_is_sent_when_the_service_ends(async_engine, tokenizer, serve_live, collector, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
    tracing = Tracing(collector.url)
    url = serve_live(build_api(async_engine, tokenizer, "tiny", tracing=tracing))
    httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, headers={"X-Request-ID": "late"})
    assert "late" not in map(id_of, collector.spans())
    tracing.close()
    assert "late" in map(id_of, collector.spans())


# Off, or asked for in vain


@pytest.mark.parametrize(
    "url", ["collector:4317", "grpc://collector:4317", "http://", "http://collector:port/v1/traces"]
)
def test_an_endpoint_that_is_no_url_is_refused(url):
    with pytest.raises(ConfigError, match="otlp_traces_endpoint .* such as http://collector:4318/v1/traces"):
        ServerConfig(model="m", otlp_traces_endpoint=url)


def test_a_missing_extra_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    config = ServerConfig(model="nowhere", device="cpu", otlp_traces_endpoint="http://collector:4318/v1/traces")
    for start in (load_service, build_app):
        with pytest.raises(ConfigError, match="needs the extra `tracing`"):
            start(config)


def test_another_protocol_is_refused(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc', .* http/protobuf only"):
        tracing_module.exporter_class()


def test_an_endpoint_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_HEADERS") as refused:
        ServerConfig(model="m", otlp_traces_endpoint="http://me:secret@collector:4318/v1/traces")
    assert "secret" not in str(refused.value)


def test_without_an_endpoint_the_sdk_is_not_even_imported(tiny_llama):
    script = (
        "import sys\n"
        "from fastapi.testclient import TestClient\n"
        "from deployments.config import ServerConfig\n"
        "from deployments.loading import load_service\n"
        "import deployments.one_process\n"
        f"service = load_service(ServerConfig(model={str(tiny_llama)!r}, device='cpu', speculation='off'))\n"
        f"headers = {{'traceparent': {SAMPLED!r}}}\n"
        "answer = TestClient(service.api).post('/v1/completions', json={'prompt': 'x'}, headers=headers)\n"
        "service.close()\n"
        "names = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print(answer.status_code, [name for name in sys.modules if name.startswith(names)])\n"
    )
    variables = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}  # says where, not that
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-2] == "200 []"


# In a replica


@pytest.mark.ray
@pytest.mark.slow
def test_a_replica_on_ray_exports_and_sends_the_last_when_it_ends(ray_cluster, tiny_llama, collector):
    config = ServerConfig(
        model=str(tiny_llama), device="cpu", port=free_port(), otlp_traces_endpoint=collector.url, num_cpus=1
    )
    headers = {"traceparent": SAMPLED, "X-Request-ID": "on-ray"}
    with local_service(config) as url:
        body = {"prompt": "x", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    span = collector.find("on-ray")
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
    assert attributes_of(span)["gen_ai.usage.completion_tokens"] == 4
