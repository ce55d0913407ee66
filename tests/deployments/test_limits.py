"""Time limits, what logs say, and what no answer and no log may hold."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time

import httpx
import openai
import pytest

from deployments import logs
from deployments.api import build_api


def url_of(async_engine, tokenizer, serve_live, **options):
    return serve_live(build_api(async_engine, tokenizer, "tiny", **options))


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_that_takes_too_long_is_ended_and_its_pages_given_back(
    async_engine, tokenizer, scripted, serve_live, stream
):
    scripted.pause_after = 2
    url = url_of(async_engine, tokenizer, serve_live, request_timeout_s=0.3)
    body = {"prompt": "x", "max_tokens": 200, "stream": stream}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=10)
    if stream:
        lines = [line[6:] for line in response.text.split("\n\n") if line]
        assert "choices" in json.loads(lines[0])
        error = json.loads(lines[-1])["error"]
        assert "[DONE]" not in lines
    else:
        assert response.status_code == 408
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
    assert (error["type"], error["code"]) == ("RequestTimeoutError", 408)
    scripted.gate.set()
    deadline = time.monotonic() + 10
    while not scripted.aborted or scripted.has_unfinished():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_openai_client_does_not_send_a_late_request_again(async_engine, tokenizer, scripted, serve_live):
    scripted.gate.clear()
    seen = []
    add = scripted.add
    scripted.add = lambda *args, **rest: seen.append(1) or add(*args, **rest)
    url = url_of(async_engine, tokenizer, serve_live, request_timeout_s=0.3)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2)
    # The engine is held, so the first command waits in its inbox or in its first step.
    with pytest.raises(openai.APIStatusError) as late:
        client.completions.create(model="tiny", prompt="x", max_tokens=100)
    assert late.value.status_code == 408
    assert len(seen) <= 1
    scripted.gate.set()


@pytest.fixture
def held_tokenising(tokenizer, monkeypatch):
    """Tokenising waits for the event; what was read is listed."""
    event, read, encode = threading.Event(), [], tokenizer.encode

    def wait_and_encode(text, **rest):
        assert event.wait(30)
        read.append(text)
        return encode(text, **rest)

    monkeypatch.setattr(tokenizer, "encode", wait_and_encode)
    yield event, read
    event.set()


@pytest.mark.parametrize("path", ["v1/completions", "tokenize"])
def test_tokenising_counts_against_the_time_of_a_request(async_engine, tokenizer, serve_live, held_tokenising, path):
    event, read = held_tokenising
    url = url_of(async_engine, tokenizer, serve_live, request_timeout_s=0.3)
    for text in ("first", "second"):  # the second waits behind the first
        response = httpx.post(f"{url}/{path}", json={"prompt": text}, timeout=10)
        assert response.status_code == 408
        assert response.headers["x-should-retry"] == "false"
    event.set()
    assert httpx.post(f"{url}/{path}", json={"prompt": "third"}, timeout=10).is_success
    assert read == ["first", "third"]  # what nobody waited for any more was not tokenised


async def test_no_more_wait_to_be_tokenised_than_could_be_admitted(async_engine, tokenizer, held_tokenising):
    event, read = held_tokenising
    api = build_api(async_engine, tokenizer, "tiny")
    most = async_engine.bounds.replies
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        asked = [client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}) for _ in range(most + 2)]
        waiting = {asyncio.ensure_future(each) for each in asked}
        refused = set()
        while len(refused) < 2:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=10)
            assert done
            refused |= done
        for each in refused:
            assert each.result().status_code == 429
            assert each.result().json()["error"]["message"].startswith(f"{most} requests wait to be tokenised")
            assert each.result().headers["retry-after"] == "1"
        event.set()
        assert all(response.is_success for response in await asyncio.gather(*waiting))
        assert (await client.post("/v1/completions", json={"prompt": "y", "max_tokens": 1})).is_success
    assert len(read) == most + 1


def test_a_body_that_trickles_in_is_not_waited_for(async_engine, tokenizer, serve_live):
    url = httpx.URL(url_of(async_engine, tokenizer, serve_live, body_timeout_s=0.3))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        connection.sendall(head + b'{"prompt": ')
        answer = connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 408")
    assert "did not arrive within 0.3 s" in answer


def test_a_reply_may_take_longer_than_a_body(async_engine, tokenizer, scripted, serve_live):
    url = url_of(async_engine, tokenizer, serve_live, body_timeout_s=0.2)
    step = scripted.step

    def slow_step():
        time.sleep(0.1)
        return step()

    scripted.step = slow_step
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 16}, timeout=10)
    assert response.json()["usage"]["completion_tokens"] == 16


async def ask(async_engine, tokenizer, body, **headers):
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/completions", json=body, headers=headers)


async def test_a_line_for_each_request_with_its_id_and_what_it_cost(async_engine, tokenizer, caplog):
    with caplog.at_level(logging.INFO, "deployments"):
        for stream in (False, True):
            body = {"prompt": "the secret prompt", "max_tokens": 12, "stream": stream}
            await ask(async_engine, tokenizer, body, **{"X-Request-ID": f"id-{stream}"})
    lines = [record for record in caplog.records if hasattr(record, "route")]
    assert len(lines) == 2
    for line in lines:
        assert (line.method, line.route, line.status) == ("POST", "/v1/completions", 200)
        assert (line.completion_tokens, line.steps, line.finish_reasons) == (12, 4, ["length"])
        assert line.seconds >= 0
    assert "secret" not in caplog.text


@pytest.mark.usefixtures("logs_as_before")
async def test_logs_are_json_with_the_request_id(async_engine, tokenizer, scripted, capsys, monkeypatch):
    logs.install(requests=True)
    scripted.fault = RuntimeError("CUDA error in /some/where")
    await ask(async_engine, tokenizer, {"prompt": "x"}, **{"X-Request-ID": "one"})
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: 1 / 0)
    await ask(async_engine, tokenizer, {"prompt": "x"}, **{"X-Request-ID": "two"})
    entries = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    by_id = {entry["request_id"]: entry for entry in entries if "status" in entry}
    assert by_id["one"]["status"] == 503
    assert by_id["two"]["status"] == 500
    failures = [entry for entry in entries if "exception" in entry]
    assert any("CUDA error" in entry["exception"] for entry in failures)
    assert any("ZeroDivisionError" in entry["exception"] and entry["request_id"] == "two" for entry in failures)
    assert all(set(entry) >= {"time", "level", "logger", "message"} for entry in entries)
