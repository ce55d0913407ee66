"""The REST API on the real engine with a tiny model: what it answers is what the engine generates."""

from __future__ import annotations

import asyncio
import json
import shutil

import httpx
import pytest

from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from deployments.config import HeadsConfig
from deployments.heads_slot import HeadsSlot
from deployments.token_texts import TokenTexts
from medusa import Engine, Grammar, SamplingParams

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = ["The quick brown fox", "def fibonacci(n):", "Water boils at", "Explain step by step"]


@pytest.fixture(scope="module")
def plain(tiny_llama):
    """The oracle: the same weights, one token a step."""
    return Engine.from_pretrained(tiny_llama, max_batch_size=4)


@pytest.fixture(scope="module")
def api(tiny_llama, tiny_heads):
    engine = Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4)
    running = AsyncEngine(engine)
    yield build_api(running, engine.tokenizer, "tiny")
    running.close()


@pytest.fixture
async def client(api):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        yield client


async def complete(client, prompt, **fields):
    response = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 32} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_chat_is_what_the_engine_generates(client, plain):
    prompt = plain.tokenizer.encode_chat(MESSAGES)
    (expected,) = plain.generate([prompt], SamplingParams(max_tokens=32, temperature=0.0))
    body = {"messages": MESSAGES, "max_tokens": 32, "temperature": 0}
    answer = (await client.post("/v1/chat/completions", json=body)).json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["choices"][0]["finish_reason"] == expected.finish_reason
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_requests_that_share_a_batch_get_what_they_would_get_alone(client, plain, temperature):
    params = [SamplingParams(max_tokens=20 + i, temperature=temperature, seed=i) for i in range(len(PROMPTS))]
    expected = [plain.generate([prompt], p)[0].text for prompt, p in zip(PROMPTS, params, strict=True)]
    answers = await asyncio.gather(
        *(
            complete(client, prompt, max_tokens=p.max_tokens, temperature=temperature, seed=p.seed)
            for prompt, p in zip(PROMPTS, params, strict=True)
        )
    )
    assert [answer["choices"][0]["text"] for answer in answers] == expected


async def test_several_prompts_and_replies_in_one_request(client, plain):
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=3, n=2)
    expected = [completion.text for completion in plain.generate(PROMPTS[:2], params)]
    answer = await complete(client, PROMPTS[:2], max_tokens=16, temperature=1.0, seed=3, n=2)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert len(set(expected)) == 4


async def test_the_seed_that_was_drawn_draws_the_same_reply_again(client):
    first, second = [await complete(client, PROMPTS[0], temperature=1.0) for _ in range(2)]
    assert first["choices"][0]["text"] != second["choices"][0]["text"]  # not the argmax each time
    seed = first["choices"][0]["seed"]
    again = await complete(client, PROMPTS[0], temperature=1.0, seed=seed)
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


async def test_logprobs_are_those_of_plain_decoding(client, plain):
    params = SamplingParams(max_tokens=24, temperature=0.0, logprobs=3)
    (expected,) = plain.generate([PROMPTS[0]], params)
    answer = await complete(client, PROMPTS[0], max_tokens=24, temperature=0, logprobs=3)
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == answer["usage"]["completion_tokens"]
    assert logprobs["token_logprobs"] == pytest.approx([e.logprob for e in expected.logprobs], abs=1e-4)
    # At temperature 0 the token drawn is the best of its alternatives: the rows are aligned.
    for token, alternatives in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert alternatives[token] == max(alternatives.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_reply_as_in_plain_decoding(client, plain, stream):
    params = SamplingParams(max_tokens=40, temperature=0.0)
    (free,) = plain.generate([PROMPTS[1]], params)
    stop = free.text[15:19]
    (expected,) = plain.generate([PROMPTS[1]], SamplingParams(max_tokens=40, temperature=0.0, stop=(stop,)))
    body = {"prompt": PROMPTS[1], "max_tokens": 40, "temperature": 0, "stop": stop, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    if stream:
        lines = [line[6:] for line in response.text.split("\n\n") if line]
        chunks = [httpx.Response(200, content=line).json() for line in lines[:-1]]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (expected.text, "stop")
        assert response.json()["usage"]["completion_tokens"] == len(expected.token_ids)


async def test_min_tokens_and_stop_token_ids_hold_inside_a_step(client, plain):
    (free,) = plain.generate([PROMPTS[2]], SamplingParams(max_tokens=40, temperature=0.0))
    stop = free.token_ids[2]
    answer = await complete(client, PROMPTS[2], temperature=0, stop_token_ids=[stop])
    assert answer["usage"]["completion_tokens"] == free.token_ids.index(stop) + 1
    assert answer["choices"][0]["finish_reason"] == "stop"
    params = SamplingParams(max_tokens=32, temperature=0.0, stop_token_ids=(stop,), min_tokens=9)
    (later,) = plain.generate([PROMPTS[2]], params)
    answer = await complete(client, PROMPTS[2], temperature=0, stop_token_ids=[stop], min_tokens=9)
    assert answer["usage"]["completion_tokens"] == len(later.token_ids) >= 9
    assert answer["choices"][0]["text"] == later.text


async def test_penalties_and_biases_reach_every_node_of_the_tree(client, plain):
    fields = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {"70": 4.0}}
    params = SamplingParams(max_tokens=32, temperature=0.0, **(fields | {"logit_bias": {70: 4.0}}))
    (expected,) = plain.generate([PROMPTS[3]], params)
    answer = await complete(client, PROMPTS[3], temperature=0, **fields)
    assert answer["choices"][0]["text"] == expected.text


async def test_the_reply_ends_at_the_end_of_the_context(client, plain):
    prompt = [5 + i % 50 for i in range(plain.max_model_len - 7)]
    answer = await complete(client, prompt, max_tokens=100, temperature=0, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "length"
    (expected,) = plain.generate([prompt], SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True))
    assert answer["choices"][0]["text"] == expected.text


async def test_acceptance_is_told_for_each_request_and_depth(client):
    usage = (await complete(client, PROMPTS[0], max_tokens=64, temperature=0, ignore_eos=True))["usage"]
    medusa = usage["medusa"]
    assert medusa["accepted_tokens"] == usage["completion_tokens"] - 1 == 63
    assert medusa["mean_acceptance_length"] == medusa["accepted_tokens"] / medusa["steps"] > 1
    assert medusa["accepted_tokens"] == medusa["steps"] + sum(medusa["accepted_per_depth"])


async def test_an_echo_has_the_prompt_and_its_logprobs_as_lm_eval_asks_for_them(client, plain):
    prompts = [plain.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    expected = plain.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, prompt_logprobs=1))
    fields = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    answer = await complete(client, prompts, **fields)
    for choice, prompt, completion in zip(answer["choices"], prompts, expected, strict=True):
        logprobs = choice["logprobs"]
        whole = [*completion.prompt_logprobs, *completion.logprobs]
        assert choice["text"] == plain.tokenizer.decode(prompt, skip_special_tokens=False) + completion.text
        assert len(logprobs["tokens"]) == len(prompt) + 1
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx([entry.logprob for entry in whole], abs=1e-4)
        best = [max(alternatives.values()) for alternatives in logprobs["top_logprobs"][1:]]
        assert best == pytest.approx([entry.top[0][1] for entry in whole], abs=1e-4)
        places = list(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))[:-1]
        assert all(choice["text"][offset:].startswith(token) for offset, token in places)


@pytest.mark.parametrize("logprobs", [None, 0])
async def test_a_streamed_echo_begins_with_the_prompt(client, logprobs):
    body = {"prompt": [PROMPTS[0], PROMPTS[1]], "n": 2, "max_tokens": 8, "seed": 1, "echo": True, "logprobs": logprobs}
    whole = (await complete(client, **body))["choices"]
    response = await client.post("/v1/completions", json=body | {"stream": True})
    chunks = [httpx.Response(200, content=line[6:]).json() for line in response.text.split("\n\n")[:-2]]
    for choice in whole:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert choice["text"].startswith(PROMPTS[choice["index"] // 2])
        if logprobs is not None:
            tokens = [token for part in own if part["logprobs"] for token in part["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


async def test_a_reply_of_a_given_form_is_what_plain_decoding_gives_under_it(client, plain):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 22, 333]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    grammar = Grammar("json_schema", json.dumps(schema))
    params = SamplingParams(max_tokens=200, temperature=0.8, seed=4, grammar=grammar)
    (expected,) = plain.generate([plain.tokenizer.encode_chat(MESSAGES)], params)
    body = {"messages": MESSAGES, "max_tokens": 200, "temperature": 0.8, "seed": 4, "response_format": form}
    answer = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
    assert answer["message"]["content"] == expected.text
    assert answer["finish_reason"] == expected.finish_reason == "stop"
    assert json.loads(expected.text)["a"] in (1, 22, 333)
    answer = await complete(client, PROMPTS[0], structured_outputs={"choice": ["one way", "another"]}, temperature=0)
    assert answer["choices"][0]["text"] in ("one way", "another")


async def test_a_json_object_always_parses_and_is_what_plain_decoding_gives_token_for_token(client, plain):
    """Quotes, brackets and the end are made likely, so that a model of random weights comes to an end."""
    pytest.importorskip("llguidance")
    texts = TokenTexts(plain.tokenizer.hf)
    bias = {plain.tokenizer.hf.convert_tokens_to_ids(token): 4.0 for token in ('"', "}", "]", ":", "</s>")}
    found = []
    for seed in (1, 3, 6, 8, 9, 10):
        fields = {"temperature": 1.0, "seed": seed, "max_tokens": 200, "logit_bias": bias}
        params = SamplingParams(**fields, grammar=Grammar("json_schema", '{"type": "object"}'))
        (expected,) = plain.generate([plain.tokenizer.encode_chat(MESSAGES)], params)
        fields |= {"logit_bias": {str(token): value for token, value in bias.items()}, "logprobs": True}
        body = {"messages": MESSAGES, "response_format": {"type": "json_object"}} | fields
        choice = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert choice["finish_reason"] == expected.finish_reason == "stop"
        assert choice["message"]["content"] == expected.text
        tokens = [entry["bytes"] for entry in choice["logprobs"]["content"]]
        assert tokens == [list(texts.to_bytes(token)) for token in expected.token_ids]
        found.append(json.loads(choice["message"]["content"]))
    assert all(isinstance(value, dict) and value for value in found)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"structured_outputs": {"regex": "[a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
async def test_a_form_that_cannot_be_used_is_refused(client, fields, param):
    response = await client.post("/v1/completions", json={"prompt": "x"} | fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_an_urgent_request_overtakes_what_waits(client):
    """Four rows are taken; of those that wait the last to come is the first to run."""
    finished = []

    async def ask(name, **fields):
        await complete(client, PROMPTS[0], temperature=0, ignore_eos=True, **fields)
        finished.append(name)

    async def until(key, count):
        while (await client.get("/health")).json()["engine"][key] != count:
            await asyncio.sleep(0.005)  # asking without a pause would keep the interpreter from the engine's thread

    running = [asyncio.ensure_future(ask(f"running {i}", max_tokens=450)) for i in range(4)]
    await until("running", 4)
    patient = asyncio.ensure_future(ask("patient", max_tokens=40, priority=1))
    await until("waiting", 1)
    urgent = asyncio.ensure_future(ask("urgent", max_tokens=4, priority=-1))
    await until("waiting", 2)
    await asyncio.gather(*running, patient, urgent)
    assert finished.index("urgent") < finished.index("patient")


async def test_heads_that_change_under_load_change_no_reply(tiny_llama, tiny_heads, tmp_path, plain):
    """Six clients ask without a pause while the heads change ten times, in a replica's own way of changing them."""
    folders = [tmp_path / name for name in ("a", "b")]
    for i, folder in enumerate(folders):
        shutil.copytree(tiny_heads, folder)
        (folder / "README.md").write_text(f"version {i}")
    engine = Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4)
    running = AsyncEngine(engine)
    slot = HeadsSlot(running, engine.backbone)
    params = [SamplingParams(max_tokens=24 + i, temperature=0.8, seed=i, ignore_eos=True) for i in range(6)]
    expected = [plain.generate([PROMPTS[0]], p)[0].text for p in params]
    versions, stop = set(), asyncio.Event()

    async def ask(client, i):
        p = params[i]
        while not stop.is_set():
            fields = {"max_tokens": p.max_tokens, "temperature": 0.8, "seed": p.seed, "ignore_eos": True}
            answer = await complete(client, PROMPTS[0], **fields)
            assert answer["choices"][0]["text"] == expected[i]
            versions.add(answer["usage"]["medusa"]["heads_version"])

    api = build_api(running, engine.tokenizer, "tiny")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        asking = [asyncio.ensure_future(ask(client, i)) for i in range(6)]
        for change in range(10):
            await slot.take(HeadsConfig(heads=str(folders[change % 2]), heads_version=str(change)))
            assert running.failed_heads is None
            await asyncio.sleep(0.1)
        stop.set()
        await asyncio.gather(*asking)
    assert len(versions) > 3
    assert running.stats().pages_used == 0
    running.close()
