"""/tokenize, /detokenize and /tokenizer_info: what clients cut prompts by."""

from __future__ import annotations

import httpx
import pytest
from tokenizers import processors

from deployments.api import build_api
from medusa.tokenizer import ChatTokenizer

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def client(async_engine, tokenizer):
    transport = httpx.ASGITransport(app=build_api(async_engine, tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


async def tokenized(client, **body):
    response = await client.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_text_there_and_back(client, tokenizer):
    text = "Two words, äöü, 🙂"
    answer = await tokenized(client, model="tiny", prompt=text, add_special_tokens=False)
    assert answer["tokens"] == tokenizer.hf.encode(text, add_special_tokens=False)
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 256
    assert "token_strs" not in answer
    back = await client.post("/detokenize", json={"tokens": answer["tokens"]})
    assert back.json() == {"prompt": text}


async def test_special_tokens_are_those_of_a_completion_prompt(client, tokenizer):
    assert (await tokenized(client, prompt="hello"))["tokens"] == tokenizer.encode("hello")


async def test_a_chat_is_rendered_as_for_a_reply(client, tokenizer):
    assert (await tokenized(client, messages=MESSAGES))["tokens"] == tokenizer.encode_chat(MESSAGES)
    without = (await tokenized(client, messages=MESSAGES, add_generation_prompt=False))["tokens"]
    assert without == tokenizer.encode_chat(MESSAGES, add_generation_prompt=False)


@pytest.fixture
def with_bos(make_tokenizer):
    """A tokenizer that begins a text with <s>, and whose template does not."""
    hf = make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", hf.bos_token_id)])
    hf.backend_tokenizer.post_processor = bos
    return ChatTokenizer(hf)


@pytest.mark.parametrize(
    ("asked", "of_text", "of_chat"), [(None, True, False), (True, True, True), (False, False, False)]
)
async def test_special_tokens_are_added_as_asked(async_engine, scripted, with_bos, asked, of_text, of_chat):
    seen = []
    add = scripted.add
    scripted.add = lambda prompt, params, **rest: seen.append(prompt) or add(prompt, params, **rest)
    texts = {"prompt": "hello", "add_special_tokens": asked}
    chat = {"messages": MESSAGES, "add_special_tokens": asked}
    transport = httpx.ASGITransport(app=build_api(async_engine, with_bos, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        counted = [(await tokenized(client, **body))["tokens"] for body in (texts, chat)]
        for path, body in (("completions", texts), ("chat/completions", chat)):
            response = await client.post(f"/v1/{path}", json=body | {"max_tokens": 1})
            assert response.status_code == 200, response.text
    plain = with_bos.hf.encode("hello", add_special_tokens=False)
    assert counted == seen == [[1, *plain] if of_text else plain, [1, *plain] if of_chat else plain]


async def test_the_text_of_each_token(client):
    answer = await tokenized(client, prompt="hello you", add_special_tokens=False, return_token_strs=True)
    assert "".join(answer["token_strs"]) == "hello you"


async def test_the_tokenizer_is_described(client, tokenizer):
    info = (await client.get("/tokenizer_info")).json()
    assert info["eos_token"] == tokenizer.hf.eos_token
    assert info["chat_template"] == tokenizer.hf.chat_template
    assert info["digest"] == tokenizer.digest
    assert not any("/" in str(value) and "home" in str(value) for value in info.values())


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, "continue_final_message"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [5, 10**30]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_bad_bodies(client, path, body, param):
    response = await client.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_another_model(client, path):
    response = await client.post(path, json={"model": "other", "prompt": "x", "tokens": [5]})
    assert response.status_code == 404
