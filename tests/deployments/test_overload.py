"""More load than the service can sustain: refusals at once and only as 429 with Retry-After, everything else whole."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import httpx
import pytest

from deployments.admission import Demand
from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from medusa import Engine
from tests.deployments.conftest import LiveServer

TOKENS = 24


@pytest.fixture(scope="module")
def running(tiny_llama, tiny_heads):
    engine = AsyncEngine(Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4), max_queued=4)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(running, tiny_llama):
    from medusa.tokenizer import ChatTokenizer

    server = LiveServer(build_api(running, ChatTokenizer.from_pretrained(tiny_llama), "tiny"))
    yield server.url
    server.close()


async def press(url, running, seconds):
    """Twice as many clients as the service holds requests; none waits before it asks again, whatever it is told."""
    outcomes, held, end = Counter(), [], time.monotonic() + seconds

    async def client(http, number):
        while time.monotonic() < end:
            is_streamed = number % 2 == 0
            body = {"prompt": f"client {number}", "max_tokens": TOKENS, "ignore_eos": True, "stream": is_streamed}
            response = await http.post("/v1/completions", json=body)
            held.append(running.held.replies)
            outcomes[response.status_code] += 1
            if response.status_code == 429:
                assert 1 <= int(response.headers["retry-after"]) <= 60
                assert response.json()["error"]["type"] == "RateLimitError"
                await asyncio.sleep(0.01)
            elif is_streamed:
                assert response.text.rstrip().endswith("data: [DONE]")
            else:
                assert response.json()["usage"]["completion_tokens"] == TOKENS

    clients = 2 * running.bounds.replies
    async with httpx.AsyncClient(base_url=url, timeout=30, limits=httpx.Limits(max_connections=clients)) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return outcomes, held


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_twice_the_sustainable_load(url, running, seconds):
    outcomes, held = asyncio.run(press(url, running, seconds))
    assert set(outcomes) == {200, 429}
    assert outcomes[200] > 8
    assert max(held) <= running.bounds.replies == 8
    deadline = time.monotonic() + 10
    while running.held != Demand(0) or running.stats().pages_used:
        assert time.monotonic() < deadline, "something stayed"
        time.sleep(0.01)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}, timeout=10).is_success
