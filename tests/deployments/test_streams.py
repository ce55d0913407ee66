"""How outputs come back: joined for slow readers, handed over together under load, first and last ones at once."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from deployments.admission import Demand
from deployments.api import build_api
from deployments.async_engine import AsyncEngine
from deployments.handover import Handover, Pace
from deployments.open_streams import EngineUnavailable
from deployments.streams import Stream, join
from medusa import Output, SamplingParams, TokenLogprob


def output(index, tokens, text, **more):
    return Output("r", index, tokens, text, **more)


async def test_what_waits_is_joined_reply_by_reply_in_order():
    stream = Stream(Demand(2), lambda _: None)
    for index, tokens, text in ((0, [1], "a"), (1, [9], "x"), (0, [2, 3], "bc"), (1, [8], "y"), (0, [4], "d")):
        stream.deliver((0, output(index, tokens, text, num_draft_accepted=len(tokens) - 1)))
    merged = stream.merged()
    first, second = [await anext(merged) for _ in range(2)]
    assert (first[1].index, first[1].token_ids, first[1].text) == (0, [1, 2, 3, 4], "abcd")
    assert first[1].num_draft_accepted == 1
    assert (second[1].index, second[1].token_ids, second[1].text) == (1, [9, 8], "xy")


def test_joining_keeps_logprobs_and_the_end():
    logprobs = [TokenLogprob(1, -0.5)], [TokenLogprob(2, -0.25)]
    joined = join(output(0, [1], "a", logprobs=logprobs[0]), output(0, [2], "b", logprobs=logprobs[1]))
    assert joined.logprobs == [*logprobs[0], *logprobs[1]]
    assert join(output(0, [1], "a"), output(0, [2], "b")).logprobs is None


async def test_an_error_comes_after_what_came_before_it():
    stream = Stream(Demand(1), lambda _: None)
    stream.deliver((0, output(0, [1], "a")))
    stream.deliver(EngineUnavailable("broken"))
    merged = stream.merged()
    assert (await anext(merged))[1].text == "a"
    with pytest.raises(EngineUnavailable):
        await anext(merged)


async def test_time_that_is_up_is_told_after_what_came_before_it():
    closed = []
    stream = Stream(Demand(1), closed.append)
    stream.deliver((0, output(0, [1], "a")))
    stream.expire_at(asyncio.get_running_loop().time())
    await asyncio.sleep(0.01)
    merged = stream.merged()
    assert (await anext(merged))[1].text == "a"
    with pytest.raises(TimeoutError):
        await anext(merged)
    assert closed == [stream]


async def test_a_stream_that_ended_expires_no_more():
    stream = Stream(Demand(1), lambda _: None)
    stream.expire_at(asyncio.get_running_loop().time() + 0.01)
    stream.close()
    await asyncio.sleep(0.03)
    assert not stream._items


async def test_what_comes_while_an_output_is_read_is_not_lost():
    stream = Stream(Demand(1), lambda _: None)
    texts = ["a", "b", "c"]
    stream.deliver((0, output(0, [1], "a")))
    merged, got = stream.merged(), []
    for following in ("b", "c", None):
        got.append((await anext(merged))[1].text)
        if following:
            stream.deliver((0, output(0, [1], following)))
    assert got == texts


async def test_a_first_token_takes_only_its_own_stream_along():
    loop, posted = asyncio.get_running_loop(), []
    streams = [Stream(Demand(1), lambda _: None) for _ in range(3)]
    handover = Handover(Pace(seconds=60), lambda _: None)
    post = loop.call_soon_threadsafe
    loop.call_soon_threadsafe = lambda call, batch: posted.append([(s, item[1].text) for s, item in batch])
    try:
        for text in ("a", "b"):
            for stream in streams:
                handover.hold(stream, (0, output(0, [1], text)), is_urgent=stream is streams[1] and text == "b")
        handover.flush_urgent()
        assert posted == [[(streams[1], "a"), (streams[1], "b")]]
        handover.hold(streams[2], (0, output(0, [2], "c")), is_urgent=True)
        handover.flush()
        first, second, third = streams
        assert posted[1:] == [[(third, "a"), (third, "b"), (third, "c"), (first, "a"), (first, "b")]]
    finally:
        loop.call_soon_threadsafe = post
    assert second not in handover._held


async def hand_overs(scripted, num_replies, pace):
    """How often outputs reached the event loop while so many replies of 31 tokens ran."""
    engine = AsyncEngine(scripted, max_queued=64, pace=pace)
    loop, posts = asyncio.get_running_loop(), []
    post = loop.call_soon_threadsafe

    def counted(call, batch):
        posts.extend([batch] if batch[0][1] is not None else [])
        return post(call, batch)

    loop.call_soon_threadsafe = counted
    try:
        stream = await engine.submit([("hello", SamplingParams(max_tokens=31, n=num_replies))])
        texts = [""] * num_replies
        async for _, item in stream:
            texts[item.index] += item.text
        assert texts == [scripted.tokenizer.decode(scripted.script[:31])] * num_replies
    finally:
        del loop.call_soon_threadsafe
        await asyncio.to_thread(engine.close)
    return len(posts), scripted._steps


async def test_under_load_several_steps_are_handed_over_together(scripted):
    scripted.max_batch_size = 8
    posts, steps = await hand_overs(scripted, 8, Pace(seconds=60, from_running=8))
    assert steps == 11
    assert posts == 2  # the first tokens and the last


async def test_below_that_load_every_step_is(scripted):
    scripted.max_batch_size = 8
    posts, steps = await hand_overs(scripted, 7, Pace(seconds=60, from_running=8))
    assert posts == steps == 11


def test_a_client_that_reads_slowly_delays_nobody_and_gets_everything(async_engine, tokenizer, scripted, serve_live):
    scripted.script = tokenizer.encode("word " * 20)
    url = serve_live(build_api(async_engine, tokenizer, "tiny"))
    body = {"prompt": "x", "max_tokens": 250, "stream": True, "logprobs": 5}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as slow:
        for _ in range(5):
            quick = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 20}, timeout=10)
            assert quick.json()["usage"]["completion_tokens"] == 20
        time.sleep(0.2)
        lines = [line[6:] for line in slow.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    tokens = sum(len(c["choices"][0]["logprobs"]["tokens"]) for c in chunks if c["choices"][0]["logprobs"])
    assert tokens >= 250 - 8  # the prompt leaves less room than asked for
    assert not async_engine._open


def test_a_client_that_never_reads_is_cut_off(async_engine, tokenizer, scripted, serve_live, monkeypatch):
    monkeypatch.setattr("deployments.service.SLOW_READER_S", 0.2)
    scripted.max_model_len = async_engine.max_model_len = 100_000
    url = serve_live(build_api(async_engine, tokenizer, "tiny", request_timeout_s=0.5))
    body = {"prompt": "x", "max_tokens": 99_000, "stream": True, "logprobs": 5, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30):
        deadline = time.monotonic() + 20
        while async_engine._open or scripted.has_unfinished():
            assert time.monotonic() < deadline, "its pages were not given back"
            time.sleep(0.05)


def test_disconnects_by_the_hundred_leave_nothing_behind(tokenizer, scripted, serve_live):
    engine = AsyncEngine(scripted, max_queued=400)
    step = scripted.step

    def slow_step():
        time.sleep(0.002)
        return step()

    scripted.step = slow_step
    url = serve_live(build_api(engine, tokenizer, "tiny"))

    async def leave(client, i):
        body = {"prompt": "x", "max_tokens": 250, "stream": i % 2 == 0, "n": 1 + i % 3}
        try:
            async with asyncio.timeout(0.02 * (1 + i % 7)):
                async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                    async for _ in response.aiter_lines():
                        pass
        except TimeoutError:
            return 1
        return 0

    async def leave_all():
        limits = httpx.Limits(max_connections=300)
        async with httpx.AsyncClient(timeout=30, limits=limits) as client:
            return sum(await asyncio.gather(*(leave(client, i) for i in range(200))))

    assert asyncio.run(leave_all()) > 100
    deadline = time.monotonic() + 20
    while engine._open or scripted.has_unfinished() or engine.stats().pages_used:
        assert time.monotonic() < deadline, "something stayed"
        time.sleep(0.02)
    assert engine.held == Demand(0)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 3}).is_success
    engine.close()
