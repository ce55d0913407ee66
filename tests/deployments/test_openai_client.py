"""Each feature by OpenAI's own client, against the real engine with a tree: what comes is what plain decoding gives."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from medusa import Engine, SamplingParams
from tests.deployments.conftest import LiveServer

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PROMPT = "The quick brown fox"


@pytest.fixture(scope="module")
def plain(tiny_llama):
    return Engine.from_pretrained(tiny_llama, max_batch_size=4)


@pytest.fixture(scope="module")
def client(tiny_llama, tiny_heads):
    engine = Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4)
    running = AsyncEngine(engine)
    server = LiveServer(build_api(running, engine.tokenizer, "tiny"))
    yield openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=30)
    server.close()
    running.close()


def complete(client, prompt=PROMPT, **fields):
    return client.completions.create(model="tiny", prompt=prompt, **({"temperature": 0, "max_tokens": 24} | fields))


def chat(client, **fields):
    given = {"temperature": 0, "max_completion_tokens": 24} | fields
    return client.chat.completions.create(model="tiny", messages=MESSAGES, **given)


def expected(plain, prompt=PROMPT, **params):
    return plain.generate([prompt], SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | params)))


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({}, {}),
        ({"seed": 3, "temperature": 0.9, "top_p": 0.8}, {"seed": 3, "temperature": 0.9, "top_p": 0.8}),
        ({"frequency_penalty": 0.7, "presence_penalty": 0.4}, {"frequency_penalty": 0.7, "presence_penalty": 0.4}),
        ({"logit_bias": {"70": 5, "71": -100}}, {"logit_bias": {70: 5.0, 71: -100.0}}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"extra_body": {"min_tokens": 20, "top_k": 4}}, {"min_tokens": 20, "top_k": 4}),
        (
            {"extra_body": {"ignore_eos": True, "repetition_penalty": 1.3}},
            {"ignore_eos": True, "repetition_penalty": 1.3},
        ),
        ({"extra_body": {"min_p": 0.2}, "temperature": 1, "seed": 1}, {"min_p": 0.2, "temperature": 1.0, "seed": 1}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_sampling(client, plain, fields, params, stream):
    (reply,) = expected(plain, **params)
    answer = complete(client, **fields, stream=stream)
    text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
    assert text == reply.text


def test_several_replies_and_prompts_as_text_and_as_tokens(client, plain):
    texts = [PROMPT, "def fibonacci(n):"]
    ids = [plain.tokenizer.encode(text) for text in texts]
    params = SamplingParams(temperature=0.8, seed=2, max_tokens=12, n=2)
    wanted = [completion.text for completion in plain.generate(texts, params)]
    for prompt in (texts, ids):
        answer = complete(client, prompt, temperature=0.8, seed=2, max_tokens=12, n=2)
        assert [choice.text for choice in answer.choices] == wanted
    assert complete(client, ids[0]).choices[0].text == complete(client, texts[0]).choices[0].text


def test_stops(client, plain):
    (free,) = expected(plain)
    stops = ["never there", free.text[9:12], free.text[14:17]]
    (reply,) = expected(plain, stop=tuple(stops))
    choice = complete(client, stop=stops).choices[0]
    assert (choice.text, choice.finish_reason) == (reply.text, "stop")


@pytest.mark.parametrize("place", range(4))
def test_each_of_four_stops_ends_a_reply(client, plain, place):
    (free,) = expected(plain)
    stop = free.text[9:12]
    stops = [f"never there {i}" for i in range(4)]
    stops[place] = stop
    choice = complete(client, stop=stops).choices[0]
    assert (choice.text, choice.finish_reason) == (free.text[: free.text.index(stop)], "stop")
    chunks = [chunk.choices[0] for chunk in complete(client, stop=stops, stream=True)]
    assert ("".join(chunk.text for chunk in chunks), chunks[-1].finish_reason) == (choice.text, "stop")
    (free,) = expected(plain, plain.tokenizer.encode_chat(MESSAGES))
    stops[place] = stop = free.text[9:12]
    choice = chat(client, stop=stops).choices[0]
    assert (choice.message.content, choice.finish_reason) == (free.text[: free.text.index(stop)], "stop")


def test_a_fifth_stop_is_one_too_many(client):
    for ask in (complete, chat):
        with pytest.raises(openai.BadRequestError, match="at most 4 stop strings are allowed, got 5") as raised:
            ask(client, stop=[*"abcde"])
        assert raised.value.param == "stop"


def test_logprobs_of_both_apis(client, plain):
    (reply,) = expected(plain, logprobs=2)
    logprobs = complete(client, logprobs=2).choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx([entry.logprob for entry in reply.logprobs], abs=1e-4)
    (reply,) = expected(plain, plain.tokenizer.encode_chat(MESSAGES), logprobs=3)
    content = chat(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert [entry.logprob for entry in content] == pytest.approx([entry.logprob for entry in reply.logprobs], abs=1e-4)
    assert all(len(entry.top_logprobs) == 3 for entry in content)
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == reply.text


def test_an_echo(client, plain):
    answer = complete(client, echo=True, logprobs=1, max_tokens=1)
    choice = answer.choices[0]
    assert choice.text.startswith(PROMPT)
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens + 1
    assert choice.logprobs.token_logprobs[0] is None


def test_usage_while_a_stream_runs_and_when_it_has_ended(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    whole = chat(client)
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.medusa == whole.usage.medusa
    assert whole.usage.medusa["accepted_tokens"] == whole.usage.completion_tokens - 1


class Answer(BaseModel):
    kind: Literal["city", "country"]
    known: bool


def test_a_parsed_reply(client, plain):
    pytest.importorskip("llguidance")
    answer = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Answer, max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Answer)
    likely = plain.tokenizer.hf.convert_tokens_to_ids(['"', "}", "]", ":", "</s>"])  # else random weights never end
    fields = {"temperature": 1, "seed": 8, "logit_bias": {str(token): 4 for token in likely}}
    (free,) = chat(client, response_format={"type": "json_object"}, max_completion_tokens=300, **fields).choices
    assert free.finish_reason == "stop"
    assert json.loads(free.message.content).keys()


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"n": 500}, openai.BadRequestError, "n"),
        ({"prompt": "x" * 9000}, openai.BadRequestError, "prompt"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix"),
        ({"model": "other"}, openai.NotFoundError, "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_errors(client, fields, error, param):
    with pytest.raises(error) as raised:
        client.completions.create(**({"model": "tiny", "prompt": "x"} | fields))
    assert raised.value.param == param
    assert raised.value.body["code"] == raised.value.status_code
