"""Calls of tools: read from text in any pieces, asked for by a grammar, shown by the chat template."""

from __future__ import annotations

import json
import random
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from deployments.tool_calls import HermesReader, NamedReader, RequiredReader
from medusa import Engine
from medusa.tokenizer import ChatTokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "maxLength": 20}},
            "required": ["place"],
        },
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Paris"}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HELLO = {"messages": [{"role": "user", "content": "hello"}], "tools": [WEATHER], "max_tokens": 250}


def read(reader, text, pieces):
    """Everything that `reader` makes of `text` cut into so many pieces."""
    cuts = sorted(random.Random(pieces).sample(range(1, len(text)), min(pieces, len(text)) - 1))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    content, calls = "", []
    for i, part in enumerate(parts):
        more, found = reader.push(part, is_last=i == len(parts) - 1)
        content += more
        calls += found
    return content, [(call.index, call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("pieces", [1, 2, 5, 40, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call at all", "no call at all", []),
        (CALL, "", [(0, "weather", '{"place": "Paris"}')]),
        (f"I look.\n{CALL}", "I look.", [(0, "weather", '{"place": "Paris"}')]),
        (f"{CALL}\n{OTHER}", "", [(0, "weather", '{"place": "Paris"}'), (1, "time", "{}")]),
        ("a < b and <tool", "a < b and <tool", []),
        (f"{CALL[:-5]}", CALL[:-5], []),
        ("<tool_call>no JSON</tool_call> more", "<tool_call>no JSON</tool_call> more", []),
        (f"<tool_call>[1]</tool_call>{OTHER}", "<tool_call>[1]</tool_call>", [(0, "time", "{}")]),
    ],
)
def test_hermes_calls_in_any_pieces(text, content, calls, pieces):
    found, its_calls = read(HermesReader(), text, pieces)
    assert its_calls == calls
    assert found.strip() == content.strip()


@pytest.mark.parametrize("pieces", [1, 3, 20])
def test_forced_calls(pieces):
    arguments = '{"place": "Paris"}'
    content, calls = read(NamedReader("weather"), arguments, pieces)
    assert content == "" and calls[0][:2] == (0, "weather")
    assert "".join(part for _, _, part in calls) == arguments
    both = '[{"name": "weather", "arguments": {"place": "Rome"}}, {"name": "time", "arguments": {}}]'
    assert read(RequiredReader(), both, pieces) == ("", [(0, "weather", '{"place": "Rome"}'), (1, "time", "{}")])
    assert read(RequiredReader(), both[:30], pieces) == (both[:30], [])


@pytest.fixture
def tool_tokenizer(make_tokenizer):
    return ChatTokenizer(make_tokenizer(chat_template=TEMPLATE))


@pytest.fixture
def api(async_engine, tool_tokenizer, scripted):
    scripted.max_model_len = async_engine.max_model_len = 2000
    scripted.script = [*scripted.tokenizer.hf.encode(f"I look.\n{CALL}", add_special_tokens=False), 2]
    return build_api(async_engine, tool_tokenizer, "tiny", tool_notation="hermes")


@pytest.fixture
async def client(api):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        yield client


async def prompt_of(client, scripted, body):
    seen = []
    add = scripted.add
    scripted.add = lambda prompt, params, **rest: seen.append((prompt, params)) or add(prompt, params, **rest)
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return scripted.tokenizer.decode(seen[0][0]), seen[0][1], response.json()


async def test_the_template_shows_tools_unless_none_are_to_be_called(client, scripted):
    prompt, params, _ = await prompt_of(client, scripted, HELLO)
    assert '"name": "weather"' in prompt and params.grammar is None
    prompt, _, answer = await prompt_of(client, scripted, HELLO | {"tool_choice": "none"})
    assert "weather" not in prompt
    assert answer["choices"][0]["message"]["content"] == f"I look.\n{CALL}"


async def test_a_conversation_with_calls_and_answers_reaches_the_template(client, scripted):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
    messages = [
        *HELLO["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    prompt, _, _ = await prompt_of(client, scripted, HELLO | {"messages": messages})
    assert '"arguments": {"place": "Rome"}' in prompt and "tool: sunny" in prompt


async def test_templates_walk_through_the_arguments_of_a_call(async_engine, make_tokenizer, scripted):
    template = (
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{% for k, v in call.function.arguments | items %}{{ k }}={{ v }};{% endfor %}{% endfor %}{% endfor %}"
    )
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=template))
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome", "days": 3}'}}
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        prompt, _, _ = await prompt_of(client, scripted, {"messages": messages, "max_tokens": 2})
    assert prompt == "helloplace=Rome;days=3;"


def test_the_openai_client_gets_the_call(api, serve_live):
    client = openai.OpenAI(base_url=f"{serve_live(api)}/v1", api_key="none", max_retries=0)
    asked = {"model": "tiny", **HELLO}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call-")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"place": "Paris"})
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks).strip() == "I look."
    (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (streamed.index, streamed.function.name) == (0, "weather")
    assert json.loads(streamed.function.arguments) == {"place": "Paris"}
    assert chunks[-1].finish_reason == "tool_calls"


async def test_without_a_notation_calls_stay_text(async_engine, tool_tokenizer, scripted, api):
    transport = httpx.ASGITransport(app=build_api(async_engine, tool_tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        choice = (await client.post("/v1/chat/completions", json=HELLO)).json()["choices"][0]
    assert choice["message"]["content"] == f"I look.\n{CALL}"
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "stop"


async def test_a_call_that_must_be_made_is_written_under_a_grammar(client, scripted):
    pytest.importorskip("llguidance")
    named = {"type": "function", "function": {"name": "weather"}}
    for choice, words in ((named, "place"), ("required", '"const": "weather"')):
        _, params, _ = await prompt_of(client, scripted, HELLO | {"tool_choice": choice})
        assert words in params.grammar.definition


class Forecast(BaseModel):
    """The arguments of a function: what a model of random weights writes is one of these only if it has to."""

    model_config = ConfigDict(extra="forbid", strict=True)

    place: Literal["Paris", "Rome"]
    days: int = Field(ge=1, le=14)
    hourly: bool


NAMES = ("forecast", "archive")
FORECASTS = [{"type": "function", "function": {"name": n, "parameters": Forecast.model_json_schema()}} for n in NAMES]
NAMED = {"type": "function", "function": {"name": "archive"}}


@pytest.fixture(scope="module")
def real(tiny_llama, tiny_heads, make_tokenizer):
    """(The app over a real engine with a tree, a bias that ends a list of calls after the first)"""
    pytest.importorskip("llguidance")
    names_of_tools = "{% for tool in tools or () %}{{ tool.function.name }} {% endfor %}"
    tokenizer = ChatTokenizer(make_tokenizer(chat_template=names_of_tools + TEMPLATE.partition("{% endif %}")[2]))
    engine = AsyncEngine(Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4))
    (bracket,) = tokenizer.hf.encode("]", add_special_tokens=False)
    yield build_api(engine, tokenizer, "tiny"), {str(bracket): 100}
    engine.close()


def check_call(call, names):
    assert call["function"]["name"] in names
    assert call["type"] == "function" and call["id"].startswith("call-")
    return Forecast.model_validate_json(call["function"]["arguments"])


@pytest.mark.parametrize(("choice", "names"), [("required", NAMES), (NAMED, NAMES[1:])], ids=["required", "named"])
async def test_a_call_that_must_be_made_is_made_and_obeys_its_schema(real, choice, names):
    api, bias = real
    body = HELLO | {"tools": FORECASTS, "tool_choice": choice, "max_tokens": 480, "temperature": 1, "logit_bias": bias}
    written = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        for seed in range(3):
            answer = (await client.post("/v1/chat/completions", json=body | {"seed": seed})).json()["choices"][0]
            assert answer["finish_reason"] == "tool_calls"
            assert answer["message"]["content"] is None
            (call,) = answer["message"]["tool_calls"]
            written.append(check_call(call, names))
    assert len({forecast.model_dump_json() for forecast in written}) > 1  # the model chose


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_the_openai_client_gets_a_call_that_must_be_made(real, serve_live, choice):
    api, bias = real
    client = openai.OpenAI(base_url=f"{serve_live(api)}/v1", api_key="none", max_retries=0, timeout=60)
    asked = {"model": "tiny", "messages": HELLO["messages"], "tools": FORECASTS, "tool_choice": choice}
    asked |= {"max_tokens": 480, "temperature": 1, "seed": 1, "logit_bias": bias}
    whole = client.chat.completions.create(**asked).choices[0]
    (call,) = whole.message.tool_calls
    arguments = check_call(call.model_dump(), NAMES)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert {part.index for part in parts} == {0}
    assert [part.function.name for part in parts if part.function.name] == [call.function.name]
    assert Forecast.model_validate_json("".join(part.function.arguments for part in parts)) == arguments
    assert chunks[-1].finish_reason == whole.finish_reason == "tool_calls"
