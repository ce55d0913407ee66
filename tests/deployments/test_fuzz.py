"""schemathesis makes requests from /openapi.json, valid and not: none may end in a 5xx, and errors keep their shape."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from medusa import Engine
from tests.deployments.conftest import LiveServer, ScriptedEngine

OPERATIONS = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/tokenizer_info"),
    ("GET", "/health"),
    ("GET", "/version"),
    ("GET", "/metrics"),
}
patiently = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.fixture(scope="module", params=["scripted", "real"])
def schema(request, tokenizer, tiny_llama, tiny_heads):
    if request.param == "scripted":
        engine = AsyncEngine(ScriptedEngine(tokenizer))
    else:
        engine = AsyncEngine(Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4))
    server = LiveServer(build_api(engine, tokenizer, "tiny", request_timeout_s=10))
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    engine.check_health()  # whatever came, it still takes requests
    server.close()
    engine.close()


def test_every_operation_is_fuzzed(schema):
    found = {(operation.method.upper(), operation.path) for operation in operations(schema)}
    assert found == OPERATIONS


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", sorted(path for method, path in OPERATIONS if method == "POST"))
def test_no_body_ends_in_a_server_error(schema, path, mode):
    check(schema, "POST", path, mode)


@pytest.mark.parametrize("path", sorted(path for method, path in OPERATIONS if method == "GET"))
def test_no_question_ends_in_a_server_error(schema, path):
    check(schema, "GET", path, schemathesis.GenerationMode.POSITIVE)  # in what they take nothing can be wrong


def check(schema, method, path, mode):
    (operation,) = [o for o in operations(schema) if (o.method.upper(), o.path) == (method, path)]

    @patiently
    @given(operation.as_strategy(generation_mode=mode))
    def holds(case):
        response = case.call(timeout=30)
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == response.status_code

    holds()


def operations(schema):
    return [result.ok() for result in schema.get_all_operations()]
