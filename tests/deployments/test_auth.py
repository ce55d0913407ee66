"""Bearer keys: who is let in, what is stored, and what a refusal says."""

from __future__ import annotations

import hashlib

import httpx
import openai
import pytest

from deployments import auth
from deployments.api import build_api
from deployments.config import ServerConfig
from medusa.config import ConfigError

KEY = "sk-medusa-test"


@pytest.fixture
def api(async_engine, tokenizer):
    hashes = [auth.hash_of("another"), auth.hash_of(KEY)]
    return build_api(async_engine, tokenizer, "tiny", api_key_hashes=hashes)


@pytest.fixture
async def client(api):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://test") as client:
        yield client


@pytest.mark.parametrize("key", [KEY, "another"])
async def test_a_known_key_is_let_in(client, key):
    headers = {"Authorization": f"Bearer {key}"}
    response = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer", f"Bearer {auth.hash_of(KEY)}", "Bearer ü"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/nowhere"])
async def test_others_get_401_before_their_body_is_read(client, path, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    response = await client.post(path, content=b"{", headers=headers)
    assert response.status_code == 401
    error = response.json()["error"]
    assert error["type"] == "AuthenticationError"
    assert error["code"] == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


async def test_probes_and_the_page_need_no_key(client):
    for path in ("/", "/health", "/metrics", "/version", "/openapi.json"):
        assert (await client.get(path)).status_code == 200
    for path in ("/v1/models", "/tokenizer_info"):
        assert (await client.get(path)).status_code == 401


def test_the_openai_client_sends_its_key(api, serve_live):
    url = f"{serve_live(api)}/v1"
    assert [model.id for model in openai.OpenAI(base_url=url, api_key=KEY).models.list()] == ["tiny"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()


def test_every_hash_is_compared_whichever_matches(monkeypatch):
    compared = []
    monkeypatch.setattr(auth, "compare_digest", lambda a, b: compared.append(b) or a == b)
    check = auth.Authenticate(None, hashes=[auth.hash_of(KEY), auth.hash_of("another"), auth.hash_of("third")])
    assert check._is_known({"type": "http", "headers": [(b"authorization", f"Bearer {KEY}".encode())]})
    assert len(compared) == 3


def test_a_file_of_hashes(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# a colleague\n{auth.hash_of('a')}\n\n  {auth.hash_of('b')}\n")
    config = ServerConfig(model="m", api_key_file=str(file), api_key_hashes=[auth.hash_of("c")])
    assert set(config.all_key_hashes()) == {hashlib.sha256(key).hexdigest() for key in (b"a", b"b", b"c")}


@pytest.mark.parametrize("content", ["", "# nobody\n", KEY, "A" * 64])
def test_a_file_that_holds_no_hashes_is_refused_without_showing_it(tmp_path, content):
    (tmp_path / "keys").write_text(content)
    with pytest.raises(ConfigError) as refusal:
        auth.read_hashes(tmp_path / "keys")
    assert "hash" in str(refusal.value) and KEY not in str(refusal.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        auth.read_hashes(tmp_path / "missing")


def test_a_plain_key_in_the_configuration_is_refused_without_showing_it():
    with pytest.raises(ConfigError, match="entry 1 is no hex sha256") as refusal:
        ServerConfig(model="m", api_key_hashes=[KEY])
    assert KEY not in str(refusal.value)


def test_new_keys_differ_and_are_long():
    first, second = auth.new_key(), auth.new_key()
    assert first != second
    assert len(first) > 40
