"""What a replica takes and refuses: on a clock of the test's own, and over a real engine with few pages."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from deployments.admission import Admission, Bounds, Demand, QueueFull
from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from medusa import Engine, SamplingParams
from tests.deployments.conftest import HeldSteps

NUM_PAGES = 8
LONG = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)  # after 400 tokens: 7 pages of 64


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_replies_beyond_batch_and_queue_are_refused():
    admission = Admission(Bounds(batch=4, queue=2, pages=100))
    for _ in range(6):
        admission.admit(Demand(1))
    with pytest.raises(QueueFull, match="6 of 6 places are taken and the request needs 1"):
        admission.admit(Demand(1))
    admission.release(Demand(2))
    admission.admit(Demand(2))
    assert admission.held == Demand(6)


def test_long_requests_are_bounded_by_pages():
    """A queue half as long as the batch may need half as many pages again as there are."""
    admission = Admission(Bounds(batch=4, queue=2, pages=100))
    admission.admit(Demand(1, pages=100))
    admission.admit(Demand(1, pages=50))
    with pytest.raises(QueueFull, match="150 of 150 pages"):
        admission.admit(Demand(1, pages=1))
    admission.release(Demand(1, pages=100))
    admission.admit(Demand(1, pages=100))


def test_a_request_larger_than_the_bound_runs_alone():
    """The engine itself refuses what can never run; what it can run is not refused for ever."""
    admission = Admission(Bounds(batch=1, queue=0, pages=10, prompt_tokens=10))
    admission.admit(Demand(1, pages=10, prompt_tokens=50))
    admission.release(Demand(1, pages=10, prompt_tokens=50))
    assert admission.held == Demand(0)


def test_prompt_tokens_count_until_their_reply_begins():
    admission = Admission(Bounds(batch=8, queue=8, pages=1000, prompt_tokens=100))
    admission.admit(Demand(1, prompt_tokens=80))
    with pytest.raises(QueueFull, match="80 of 100 prompt tokens"):
        admission.admit(Demand(1, prompt_tokens=30))
    admission.began(80)
    admission.admit(Demand(1, prompt_tokens=30))
    assert admission.held == Demand(2, 0, 30)


def test_more_than_an_empty_replica_holds_is_no_matter_of_time():
    admission = Admission(Bounds(batch=4, queue=2, pages=100))
    with pytest.raises(ValueError, match="asks for 7 replies .* holds 6 at once"):
        admission.admit(Demand(7))
    assert admission.held == Demand(0)


def test_the_time_to_come_back_follows_the_rate_of_replies(clock):
    admission = Admission(Bounds(batch=1, queue=0, pages=10), clock)
    assert admission.retry_after_s(1) == 1  # nothing known yet
    for _ in range(5):
        admission.admit(Demand(1))
        clock.now += 4.0
        admission.release(Demand(1))
    assert admission.retry_after_s(1) == 4
    assert admission.retry_after_s(5) == 16
    clock.now += 10_000
    assert admission.retry_after_s(1) == 60  # never further than a client may care to wait


def test_a_refusal_changes_nothing():
    admission = Admission(Bounds(batch=1, queue=1, pages=10, prompt_tokens=5))
    admission.admit(Demand(1, 5, 5))
    for demand in (Demand(2), Demand(1, 16), Demand(1, 0, 1)):
        with pytest.raises(QueueFull):
            admission.admit(demand)
    assert admission.held == Demand(1, 5, 5)


@pytest.fixture
def few_pages(tiny_llama):
    """A real engine of four rows and a cache of 8 pages, its steps held back, and no queue."""
    page_bytes = 2 * 2 * 64 * 2 * 16 * 4  # keys and values, layers, tokens, heads, their size, float32
    room = (NUM_PAGES + 1) * page_bytes / 2**30  # one is the trash page
    engine = Engine.from_pretrained(tiny_llama, max_batch_size=4, kv_cache_gb=room)
    assert engine.stats().pages_total == NUM_PAGES
    steps = HeldSteps(engine)
    running = AsyncEngine(engine, max_queued=0)
    yield running, steps, engine.tokenizer
    steps.open()
    running.close()


async def num_tokens(engine, prompt, params):
    return sum([len(output.token_ids) async for output in engine.generate(prompt, params)])


async def test_what_the_pages_cannot_take_is_refused_though_the_batch_has_room(few_pages):
    engine, steps, _ = few_pages
    first = await engine.submit([([5] * 400, LONG)])
    assert engine.held == Demand(1, pages=7, prompt_tokens=400)
    with pytest.raises(QueueFull, match="7 of 8 pages are taken and the request needs 7") as refusal:
        await engine.submit([([6] * 400, LONG)])
    assert refusal.value.retry_after_s >= 1
    assert engine.held == Demand(1, pages=7, prompt_tokens=400)
    short = asyncio.ensure_future(num_tokens(engine, [6] * 20, SamplingParams(max_tokens=4, ignore_eos=True)))
    await asyncio.sleep(0)
    assert engine.held == Demand(2, pages=8, prompt_tokens=420)
    first.close()
    steps.open()
    assert await num_tokens(engine, [6] * 400, LONG) == 20
    assert await short == 4
    assert engine.held == Demand(0)


async def test_a_client_learns_that_the_pages_are_taken_and_when_to_come_back(few_pages):
    engine, steps, tokenizer = few_pages
    body = {"prompt": [5] * 400, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}
    transport = httpx.ASGITransport(app=build_api(engine, tokenizer, "tiny"))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        first = asyncio.ensure_future(client.post("/v1/completions", json=body))
        while engine.held == Demand(0):
            await asyncio.sleep(0.005)
        for path, refused in (
            ("completions", body),
            ("completions", body | {"stream": True}),
            ("chat/completions", chat),
        ):
            response = await client.post(f"/v1/{path}", json=refused)
            assert response.status_code == 429
            assert 1 <= int(response.headers["retry-after"]) <= 60
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert (error["type"], error["param"], error["code"]) == ("RateLimitError", None, 429)
            assert "7 of 8 pages are taken and the request needs 7" in error["message"]
        steps.open()
        assert (await first).json()["usage"]["completion_tokens"] == 20
        again = await client.post("/v1/completions", json=body)
        assert again.json()["usage"]["completion_tokens"] == 20
