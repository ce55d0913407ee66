"""The REST API on an engine that follows a script: shapes, streams, errors, limits, clients that leave."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import pytest

import medusa
from deployments.api import build_api
from deployments.async_engine import AsyncEngine

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def api(async_engine, tokenizer):
    return build_api(async_engine, tokenizer, "tiny", served={"backbone_digest": "sha256:0123456789abcdef"})


@pytest.fixture
async def client(api):
    transport = httpx.ASGITransport(app=api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def events(response):
    """The JSON of each event; the stream must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


def fail_after(scripted, steps):
    step = scripted.step

    def fails_later():
        if scripted.stats().steps == steps:
            scripted.fault = RuntimeError("/secret/path")
        return step()

    scripted.step = fails_later


# Answers


async def test_a_chat_completion(client, scripted):
    response = await client.post("/v1/chat/completions", json=HELLO | {"max_tokens": 20, "seed": 5})
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["model"] == "tiny"
    assert body["system_fingerprint"] == "medusa-0123456789ab"
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": scripted.tokenizer.decode(scripted.script[:20]),
            "refusal": None,
        },
        "logprobs": None,
        "finish_reason": "length",
        "seed": 5,
    }


async def test_the_prompt_is_the_rendered_template_with_one_bos(client, scripted):
    seen = []
    add = scripted.add
    scripted.add = lambda prompt, params, **rest: seen.append(prompt) or add(prompt, params, **rest)
    body = {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]}
    response = await client.post("/v1/chat/completions", json=body | {"max_tokens": 1})
    (prompt,) = seen
    assert prompt == scripted.tokenizer.encode_chat(body["messages"])
    assert prompt.count(scripted.tokenizer.hf.bos_token_id) == 1
    assert response.json()["usage"]["prompt_tokens"] == len(prompt)


async def test_usage_counts_tokens_and_tells_what_speculation_gained(client):
    body = (await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 12})).json()
    usage = body["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12
    # The prefill gives 1 token, steps 3 each, and the last step counts only the 2 kept.
    assert usage["medusa"] == {
        "steps": 4,
        "accepted_tokens": 11,
        "mean_acceptance_length": 2.75,
        "accepted_per_depth": [4, 3],
        "heads_version": None,
    }


async def test_a_chat_without_a_limit_runs_to_the_end_of_the_context(client, scripted):
    usage = (await client.post("/v1/chat/completions", json=HELLO)).json()["usage"]
    assert usage["total_tokens"] == scripted.max_model_len


async def test_plain_completions_default_to_16_tokens(client):
    body = (await client.post("/v1/completions", json={"prompt": "hi"})).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


async def test_choices_are_numbered_by_prompt_then_by_reply(client, scripted):
    prompts = [[5, 6, 7], [8]]
    body = {"prompt": prompts, "n": 2, "max_tokens": 4}
    choices = (await client.post("/v1/completions", json=body)).json()
    assert [choice["index"] for choice in choices["choices"]] == [0, 1, 2, 3]
    assert choices["usage"]["prompt_tokens"] == 4  # each prompt once
    assert choices["usage"]["completion_tokens"] == 16
    streamed = events(await client.post("/v1/completions", json=body | {"stream": True}))
    assert {chunk["choices"][0]["index"] for chunk in streamed} == {0, 1, 2, 3}


async def test_logprobs_of_a_chat(client, scripted):
    body = HELLO | {"max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 5
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == choice["message"]["content"]
    assert content[0]["logprob"] == -0.25
    assert [entry["logprob"] for entry in content[0]["top_logprobs"]] == [-0.25, -9999.0]
    assert content[0]["top_logprobs"][1]["token"] == "<pad>"


async def test_logprobs_of_a_plain_completion(client):
    body = {"prompt": "hi", "max_tokens": 5, "logprobs": 1}
    choice = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [-0.25] * 5
    assert logprobs["top_logprobs"] == [{token: -0.25} for token in logprobs["tokens"]]
    assert [choice["text"][offset:][:1] for offset in logprobs["text_offset"]] == [t[:1] for t in logprobs["tokens"]]


async def test_bytes_of_tokens_that_are_part_of_a_character(client, scripted, tokenizer):
    scripted.script = tokenizer.hf.encode("🙂" * 5, add_special_tokens=False)
    assert len(scripted.script) > 5
    body = HELLO | {"max_tokens": len(scripted.script), "logprobs": True}
    choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "🙂" * 5
    assert content[0]["token"].startswith("bytes:\\xf0")


# Streams


@pytest.mark.parametrize("width", [1, 3, 7])
async def test_a_streamed_chat_equals_the_whole_one(client, scripted, width):
    scripted.width = width
    body = HELLO | {"max_tokens": 60}
    whole = (await client.post("/v1/chat/completions", json=body)).json()
    chunks = events(await client.post("/v1/chat/completions", json=body | {"stream": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    texts = [choice["delta"]["content"] for choice in choices[1:-1]]
    assert "".join(texts) == whole["choices"][0]["message"]["content"]
    assert not any("\ufffd" in text for text in texts)
    assert choices[-1]["delta"] == {}
    assert choices[-1]["finish_reason"] == "length"
    assert choices[-1]["seed"] == 7
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)
    assert len(texts) <= 60 // width + 2  # a delta carries what a step brought


async def test_a_streamed_completion_equals_the_whole_one(client):
    body = {"prompt": "hi", "max_tokens": 30, "logprobs": 0}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]
    chunks = events(await client.post("/v1/completions", json=body | {"stream": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == "length"
    for key in ("tokens", "token_logprobs", "text_offset"):
        streamed = [item for choice in choices[:-1] for item in choice["logprobs"][key]]
        assert streamed == whole["logprobs"][key]


async def test_every_reply_of_a_stream_opens_with_its_role(client):
    chunks = events(await client.post("/v1/chat/completions", json=HELLO | {"n": 3, "max_tokens": 4, "stream": True}))
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "length"


async def test_usage_of_a_stream_comes_last_with_no_choices(client):
    body = HELLO | {"max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(await client.post("/v1/chat/completions", json=body))
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 12  # tokens, though there are fewer chunks
    assert len(chunks) < 12
    assert last["usage"]["medusa"]["accepted_tokens"] == 11


async def test_continuous_usage_grows_chunk_by_chunk(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "hi", "max_tokens": 10, "stream": True, "stream_options": options}
    chunks = events(await client.post("/v1/completions", json=body))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 10
    steps = [chunk["usage"]["medusa"]["steps"] for chunk in chunks]
    assert steps == sorted(steps)
    assert steps[-1] == 3


@pytest.mark.parametrize("width", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("stop", ["Umlaute: ä", "Stop here", "rds, u", "€"])
async def test_a_stop_string_cuts_text_tokens_logprobs_and_usage_alike(client, scripted, width, stop):
    """The string may begin in one step and end in another, or both inside one step's accepted run."""
    scripted.width = width
    body = {"prompt": "hi", "max_tokens": 60, "stop": ["never there", stop], "logprobs": 0}
    whole = (await client.post("/v1/completions", json=body)).json()
    (choice,) = whole["choices"]
    full = scripted.tokenizer.decode(scripted.script)
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == full[: full.index(stop)]
    tokens = whole["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["tokens"]) == tokens
    assert stop in scripted.tokenizer.decode(scripted.script[:tokens])
    assert stop not in scripted.tokenizer.decode(scripted.script[: tokens - 1])
    assert whole["usage"]["medusa"]["accepted_tokens"] == tokens - 1
    chunks = events(await client.post("/v1/completions", json=body | {"stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


async def test_eos_inside_an_accepted_run_ends_the_reply(client, scripted, tokenizer):
    scripted.script = [*tokenizer.encode("ab"), tokenizer.hf.eos_token_id, *tokenizer.encode("never")]
    scripted.width = 50
    body = {"prompt": "hi", "max_tokens": 30}
    whole = (await client.post("/v1/completions", json=body)).json()
    assert whole["choices"][0]["text"] == "ab"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == len(tokenizer.encode("ab")) + 1
    ignoring = (await client.post("/v1/completions", json=body | {"ignore_eos": True})).json()
    assert ignoring["usage"]["completion_tokens"] == 30


# Models, health, version


async def test_models_health_and_version(client):
    (card,) = (await client.get("/v1/models")).json()["data"]
    assert card["id"] == "tiny"
    assert card["max_model_len"] == 256
    assert (await client.get("/v1/models/tiny")).json() == card
    assert error_of(await client.get("/v1/models/other"), 404)["param"] == "model"
    health = (await client.get("/health")).json()
    assert health["status"] == "ok"
    assert health["engine"]["running"] == 0
    assert health["heads"] == {"version": None, "digest": None}
    assert (await client.get("/version")).json() == {
        "version": medusa.__version__,
        "model": "tiny",
        "heads_version": None,
        "heads_digest": None,
        "backbone_digest": "sha256:0123456789abcdef",
    }


async def test_the_description_of_the_api_names_the_fields(client):
    schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
    assert {"messages", "max_completion_tokens", "top_k"} <= set(schemas["ChatCompletionRequest"]["properties"])


async def test_request_ids_are_echoed_or_drawn(client):
    for path in ("/health", "/nowhere"):
        assert (await client.get(path, headers={"X-Request-ID": "abc-1"})).headers["x-request-id"] == "abc-1"
        drawn = (await client.get(path)).headers["x-request-id"]
        assert len(drawn) == 32
    for bad in ("x" * 129, "a b", "ü".encode()):
        assert len((await client.get("/health", headers={"X-Request-ID": bad})).headers["x-request-id"]) == 32


# Errors


async def test_an_unknown_model(client):
    error = error_of(await client.post("/v1/chat/completions", json=HELLO | {"model": "gpt-9"}), 404)
    assert error["type"] == "NotFoundError"
    assert error["param"] == "model"
    assert "`gpt-9` does not exist" in error["message"]
    assert (await client.post("/v1/chat/completions", json=HELLO | {"model": "tiny", "max_tokens": 1})).is_success


async def test_unknown_routes_and_methods(client):
    error = error_of(await client.get("/v1/embeddings"), 404)
    assert error["type"] == "NotFoundError"
    assert "GET /v1/embeddings" in error["message"]
    response = await client.get("/v1/chat/completions")
    assert "allowed: POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"
    error_of(await client.get("/v1/models/"), 404)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"[]", "one JSON object"),
        (b"null", "one JSON object"),
        (b'"text"', "one JSON object"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": "x", "n": 1' + b"0" * 10_000 + b"}", "not valid JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature: Input should be a finite number"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature: Input should be a finite number"),
        (b"{}", "prompt: required but absent"),
        (b'{"prompt": 5}', "prompt: must be a string"),
    ],
)
async def test_bodies_that_are_no_request(client, body, words):
    for headers in ({"Content-Type": "application/json"}, {}):
        error = error_of(await client.post("/v1/completions", content=body, headers=headers), 400)
        assert error["type"] == "BadRequestError"
        assert words in error["message"]


async def test_a_body_of_another_type(client):
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    error = error_of(await client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers), 400)
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", HELLO | {"temperature": -1}, "temperature", "got -1"),
        ("chat/completions", HELLO | {"tools": [TOOL]}, "tools", "chat template has no place for tools"),
        ("chat/completions", HELLO | {"min_tokens": 9, "max_tokens": 5}, "min_tokens", "0 to max_tokens"),
        ("completions", {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "[99999] are outside"),
        ("completions", {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids", "[-1] are outside"),
        ("completions", {"prompt": [5, -1], "echo": True}, "prompt", "token ids [-1] are outside"),
        ("completions", {"prompt": [5, 10**30]}, "prompt", "token ids [1000000000000000000000000000000] are outside"),
        ("completions", {"prompt": [[5], [10**30]], "echo": True}, "prompt", "are outside the vocabulary of 512"),
        ("completions", {"prompt": [512] * 10_000, "echo": True}, "prompt", "[512, 512"),
        ("completions", {"prompt": "x" * 2000}, "prompt", "but this model's context holds 256"),
        ("completions", {"prompt": [5] * 300}, "prompt", "The prompt has 300 tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, "messages", "holds 256"),
        ("completions", {"prompt": "x", "n": 100}, "prompt", "asks for 100 replies"),
    ],
)
async def test_bad_requests_name_the_field(client, path, body, param, words):
    for stream in (False, True):
        error = error_of(await client.post(f"/v1/{path}", json=body | {"stream": stream}), 400)
        assert error["param"] == param
        assert words in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": ["x", "x" * 10_000]}, "prompt"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 10_000}]}, "messages"),
    ],
)
async def test_texts_that_cannot_fit_are_not_tokenised(client, tokenizer, monkeypatch, path, body, param):
    read, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **rest: read.append(text) or encode(text, **rest))
    error = error_of(await client.post(f"/v1/{path}", json=body), 400)
    assert error["param"] == param
    assert "characters, which 255 tokens cannot hold, but this model's context holds 256" in error["message"]
    assert max(map(len, read), default=0) < 10_000


async def test_the_longest_prompt_that_fits(client):
    body = (await client.post("/v1/completions", json={"prompt": [5] * 255})).json()
    assert body["usage"]["completion_tokens"] == 1
    assert body["choices"][0]["finish_reason"] == "length"


async def test_a_template_that_refuses(async_engine, make_tokenizer):
    from medusa.tokenizer import ChatTokenizer

    for template, words in (("{{ raise_exception('no system') }}", "no system"), (None, "no chat template")):
        tokenizer = ChatTokenizer(make_tokenizer(chat_template=template))
        transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            error = error_of(await client.post("/v1/chat/completions", json=HELLO), 400)
        assert words in error["message"]
        assert error["param"] == "messages"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(
    ("value", "words"), [("x", "can only concatenate"), (0, "division by zero"), (10**9, "Range too big")]
)
async def test_values_that_a_template_cannot_use(async_engine, make_tokenizer, path, value, words):
    from medusa.tokenizer import ChatTokenizer

    template = "{{ 1 / (depth + 0) }}{% for _ in range(depth) %}x{% endfor %}"
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=template))
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post(path, json=HELLO | {"chat_template_kwargs": {"depth": value}})
        assert words in error_of(response, 400)["message"]
        response = await client.post(path, json=HELLO | {"chat_template_kwargs": {"self": 1}})
        assert error_of(response, 400)["param"] == "chat_template_kwargs.self"


async def test_unexpected_exceptions_keep_their_text_to_themselves(client, scripted, monkeypatch, caplog):
    def broken(*_, **__):
        raise KeyError("/secret/path")

    monkeypatch.setattr(scripted.tokenizer, "render_chat", broken)
    response = await client.post("/v1/chat/completions", json=HELLO, headers={"X-Request-ID": "me"})
    error = error_of(response, 500)
    assert error["type"] == "InternalServerError"
    assert "secret" not in response.text and "Traceback" not in response.text
    assert response.headers["x-request-id"] == "me"
    assert "request me failed" in caplog.text and "/secret/path" in caplog.text


async def test_a_body_over_the_cap(async_engine, tokenizer):
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny", max_body_bytes=1000))

    async def chunks():
        for _ in range(20):
            yield b"x" * 100

    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for content in (b"x" * 2000, chunks()):
            response = await client.post("/v1/completions", content=content, headers={"Content-Type": "text/x"})
            error = error_of(response, 413)
            assert "1000 bytes" in error["message"]
            assert "x-request-id" in response.headers
        assert (await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1})).is_success


async def test_a_full_queue_says_when_to_come_back(client, scripted, async_engine):
    scripted.gate.clear()
    running = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "x", "n": 8, "max_tokens": 4}))
    while not async_engine._open:
        await asyncio.sleep(0.005)
    for stream in (False, True):
        response = await client.post("/v1/completions", json={"prompt": "x", "stream": stream})
        assert error_of(response, 429)["type"] == "RateLimitError"
        assert int(response.headers["retry-after"]) >= 1
    scripted.gate.set()
    assert (await running).is_success


async def test_a_sick_engine(client, scripted):
    scripted.fault = RuntimeError("CUDA error at /secret/path")
    response = await client.post("/v1/completions", json={"prompt": "x"})
    assert error_of(response, 503)["type"] == "ServiceUnavailableError"
    assert "secret" not in response.text
    for answer in (await client.get("/health"), await client.post("/v1/chat/completions", json=HELLO)):
        error_of(answer, 503)
    assert (await client.get("/version")).is_success


async def test_an_engine_that_fails_in_a_stream_ends_it_with_an_error_and_no_done(client, scripted):
    fail_after(scripted, 3)
    response = await client.post("/v1/completions", json={"prompt": "x", "stream": True, "max_tokens": 99})
    lines = [json.loads(line[6:]) for line in response.text.split("\n\n") if line]
    assert lines[0]["choices"][0]["text"]
    assert lines[-1]["error"]["type"] == "ServiceUnavailableError"
    assert "secret" not in response.text


# Over a socket


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_sequence(api, scripted, async_engine, serve_live, stream):
    url = serve_live(api)
    scripted.gate.clear()
    body = {"prompt": "x", "stream": stream, "max_tokens": 200, "n": 2}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=0.5)
    assert scripted.has_unfinished()
    wait_until(lambda: not async_engine._open)
    scripted.gate.set()
    wait_until(lambda: scripted.aborted and not scripted.has_unfinished())
    wait_until(lambda: httpx.get(f"{url}/health").json()["engine"]["running"] == 0)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).is_success


def test_events_arrive_as_the_engine_makes_them(api, scripted, serve_live):
    url = serve_live(api)
    step = scripted.step

    def one_at_a_time():
        scripted.gate.clear()
        return step()

    body = {"prompt": "x", "stream": True, "max_tokens": 10}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=10) as response:
        lines = (line for line in response.iter_lines() if line)
        scripted.step = one_at_a_time
        seen = []
        for line in lines:  # each step waits until the last one's text has arrived
            seen.append(line)
            scripted.gate.set()
    assert seen[-1] == "data: [DONE]"


def test_the_openai_client(api, scripted, serve_live):
    client = openai.OpenAI(base_url=f"{serve_live(api)}/v1", api_key="none", max_retries=0)
    text = scripted.tokenizer.decode(scripted.script[:25])
    messages = [{"role": "user", "content": "hello"}]
    assert [model.id for model in client.models.list()] == ["tiny"]

    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=25, logprobs=True)
    assert chat.choices[0].message.content == text
    assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens == 25
    assert chat.usage.medusa["steps"] == 8

    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=25, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.completion_tokens == 25

    plain = client.completions.create(model="tiny", prompt="hello", max_tokens=25, extra_body={"top_k": 5})
    assert plain.choices[0].text == text
    stream = client.completions.create(model="tiny", prompt="hello", max_tokens=25, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text

    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny", messages=messages, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=messages)
    scripted.fault = RuntimeError("broken")
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="tiny", prompt="hello")


def test_a_stream_that_breaks_is_an_error_for_the_openai_client(api, scripted, serve_live):
    client = openai.OpenAI(base_url=f"{serve_live(api)}/v1", api_key="none", max_retries=0)
    fail_after(scripted, 3)
    stream = client.completions.create(model="tiny", prompt="hello", max_tokens=99, stream=True)
    assert next(iter(stream)).choices[0].text
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass


def test_many_clients_at_once(tokenizer, scripted, serve_live):
    engine = AsyncEngine(scripted, max_queued=64)
    url = serve_live(build_api(engine, tokenizer, "tiny"))

    async def load():
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            bodies = [{"prompt": "x", "max_tokens": 5 + i, "stream": bool(i % 2)} for i in range(30)]
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    responses = asyncio.run(load())
    assert [response.status_code for response in responses] == [200] * 30
    for i, response in enumerate(responses):
        text = tokenizer.decode(scripted.script[: 5 + i])
        if i % 2:
            assert "".join(e["choices"][0]["text"] for e in events(response)) == text
        else:
            assert response.json()["choices"][0]["text"] == text
    engine.close()
