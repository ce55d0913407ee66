"""The engine's thread: streams, refusals, disconnects, and an engine that fails."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from deployments.admission import Demand, QueueFull
from deployments.async_engine import AsyncEngine
from deployments.handover import Pace
from deployments.open_streams import EngineUnavailable
from medusa import Engine, SamplingParams
from tests.deployments.conftest import HeldSteps

GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
LONG = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        await asyncio.sleep(0.005)


async def collect(engine, prompt="hello", params=GREEDY):
    return [output async for output in engine.generate(prompt, params)]


async def test_a_stream_carries_what_the_engine_wrote(async_engine, scripted):
    outputs = await collect(async_engine)
    assert [len(output.token_ids) for output in outputs] == [1, 3, 3, 3, 3, 3, 3, 1]
    completion = outputs[-1].finished
    assert completion.token_ids == scripted.script[:20]
    assert "".join(output.text for output in outputs) == completion.text


async def test_all_engine_calls_come_from_one_thread(async_engine, scripted):
    await asyncio.gather(*(collect(async_engine) for _ in range(4)))
    assert len(scripted.threads) == 1
    assert threading.get_ident() not in scripted.threads


async def test_replies_of_one_submission_end_together_with_the_last(async_engine):
    params = [SamplingParams(max_tokens=3, n=2), SamplingParams(max_tokens=9)]
    stream = await async_engine.submit([("a", params[0]), ("b", params[1])])
    ends = [(prompt, output.index) async for prompt, output in stream if output.finished]
    assert sorted(ends) == [(0, 0), (0, 1), (1, 0)]
    assert ends[-1] == (1, 0)


async def test_one_callback_a_step_serves_every_stream_of_the_loop(async_engine, scripted, monkeypatch):
    loop = asyncio.get_running_loop()
    posts = []
    post = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call, batch: posts.append(batch) or post(call, batch))
    scripted.gate.clear()
    running = [asyncio.ensure_future(collect(async_engine)) for _ in range(3)]
    await until(lambda: async_engine._thread.step_started)
    scripted.gate.set()
    await asyncio.gather(*running)
    with_outputs = [batch for batch in posts if batch[0][1] is not None]
    assert len(with_outputs) == scripted._steps
    assert max(map(len, with_outputs)) == 3


async def test_a_refused_prompt_disturbs_nobody_else(async_engine, scripted):
    scripted.gate.clear()
    other = asyncio.ensure_future(collect(async_engine))
    await until(lambda: scripted.threads)
    refused = asyncio.ensure_future(collect(async_engine, prompt=[]))
    scripted.gate.set()
    with pytest.raises(ValueError, match="prompt is empty"):
        await refused
    assert (await other)[-1].finished.finish_reason == "length"
    async_engine.check_health()


async def test_a_submission_is_taken_whole_or_not_at_all(async_engine, scripted):
    with pytest.raises(ValueError, match="prompt 1: the prompt is empty"):
        await async_engine.submit([("good", GREEDY), ([], GREEDY)])
    assert len(scripted.aborted) == 1
    assert not scripted.has_unfinished()
    assert await collect(async_engine)


async def test_leaving_a_stream_early_frees_its_sequences(async_engine, scripted):
    scripted.pause_after = 2  # else the replies may end before their reader leaves
    endless = SamplingParams(max_tokens=250, n=3)
    async with aclosing(async_engine.generate("hello", endless)) as outputs:
        async for _ in outputs:
            break
    scripted.gate.set()
    await until(lambda: len(scripted.aborted) == 1 and async_engine.stats().running == 0)
    assert not async_engine._open


async def test_a_cancelled_caller_frees_its_sequences(async_engine, scripted):
    scripted.gate.clear()
    task = asyncio.ensure_future(collect(async_engine))
    await until(scripted.has_unfinished)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    scripted.gate.set()
    await until(lambda: len(scripted.aborted) == 1 and async_engine.stats().running == 0)
    assert not async_engine._open


async def test_a_caller_cancelled_before_the_engine_answered_frees_its_place(async_engine, scripted):
    scripted.gate.clear()
    first = asyncio.ensure_future(collect(async_engine))
    await until(lambda: async_engine._thread.step_started)
    second = asyncio.ensure_future(async_engine.submit([("hello", GREEDY)]))
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    scripted.gate.set()
    assert await first
    await until(lambda: async_engine._thread._inbox.empty() and async_engine.stats().running == 0)
    assert not scripted.has_unfinished()
    assert not async_engine._open


@pytest.fixture
def real(tiny_llama, tiny_heads):
    """The thread over a real engine with a tree, and the steps of that engine."""
    engine = Engine.from_pretrained(tiny_llama, tiny_heads, speculation=6, max_batch_size=4)
    steps = HeldSteps(engine)
    running = AsyncEngine(engine, max_queued=200, pace=Pace(seconds=0.0))
    yield running, steps
    steps.open()
    running.close()


async def test_the_step_after_a_caller_left_has_its_pages(real):
    engine, steps = real
    staying = asyncio.ensure_future(collect(engine))
    await until(lambda: len(steps.found) == 1)
    leaving = asyncio.ensure_future(collect(engine, [5] * 150, LONG))
    await asyncio.sleep(0)
    steps.let_go(3)
    await until(lambda: len(steps.found) == 4)
    leaving.cancel()  # the fourth step has begun
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert engine.held.replies == 1
    steps.let_go(1)
    await until(lambda: len(steps.found) == 5)
    with_it, without_it = steps.found[3:]
    assert (with_it.running, with_it.pages) == (2, 1 + 3)
    assert (without_it.running, without_it.pages) == (1, 1)
    assert without_it.steps == with_it.steps + 1
    steps.open()
    assert (await staying)[-1].finished.finish_reason == "length"
    await until(lambda: engine.stats().pages_used == 0)


async def test_a_hundred_callers_that_leave_leave_no_page_behind(real):
    """Some leave while they wait, others in the midst of their reply."""
    engine, steps = real

    async def leave_after(outputs, number):
        async with aclosing(engine.generate([5 + number] * 70, LONG)) as stream:
            for _ in range(outputs):
                await anext(stream)

    callers = [asyncio.ensure_future(leave_after(1 + i % 4, i)) for i in range(80)]
    impatient = [asyncio.ensure_future(collect(engine, [300 + i] * 70, LONG)) for i in range(20)]
    await until(lambda: steps.found)
    assert engine.held.replies == 100
    for caller in impatient:
        caller.cancel()
    while not all(caller.done() for caller in callers):
        seen = len(steps.found)
        steps.let_go(1)
        await until(lambda seen=seen: len(steps.found) > seen or all(caller.done() for caller in callers))
        for _ in range(8):  # who has enough of what that step gave leaves before the next
            await asyncio.sleep(0)
    steps.open()
    ends = await asyncio.gather(*callers, *impatient, return_exceptions=True)
    assert [type(end) for end in ends] == [type(None)] * 80 + [asyncio.CancelledError] * 20
    assert engine.held == Demand(0)
    await until(lambda: engine.stats().pages_used == engine.stats().running == engine.stats().waiting == 0)
    assert max(found.running for found in steps.found) == 4
    assert max(found.pages for found in steps.found) >= 2 * 4
    assert not engine._open and not engine._thread._requests
    assert len(steps.found) < 400  # to their ends, four at a time, the replies would take over 2,000
    assert (await collect(engine))[-1].finished.finish_reason == "length"


async def test_a_full_queue_is_refused_and_opens_again(async_engine, scripted):
    scripted.gate.clear()
    running = [asyncio.ensure_future(collect(async_engine)) for _ in range(async_engine.bounds.replies)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="8 of 8 places are taken") as refusal:
        await async_engine.submit([("hello", GREEDY)])
    assert refusal.value.retry_after_s >= 1
    scripted.gate.set()
    await asyncio.gather(*running)
    assert await collect(async_engine)


async def test_more_replies_than_the_service_holds_are_the_callers_fault(async_engine):
    with pytest.raises(ValueError, match="asks for 9 replies.* holds 8 at once"):
        await async_engine.submit([("hello", SamplingParams(n=9))])


async def test_a_failing_step_ends_every_stream_and_refuses_new_ones(async_engine, scripted, caplog):
    scripted.gate.clear()
    running = [asyncio.ensure_future(collect(async_engine)) for _ in range(3)]
    await until(lambda: async_engine._thread.step_started)
    scripted.fault = RuntimeError("CUDA error: an illegal memory access at /secret/path")
    scripted.gate.set()
    for error in await asyncio.gather(*running, return_exceptions=True):
        assert isinstance(error, EngineUnavailable)
        assert "secret" not in str(error)
    with pytest.raises(EngineUnavailable, match="internal error"):
        async_engine.check_health()
    with pytest.raises(EngineUnavailable):
        await async_engine.submit([("hello", GREEDY)])
    assert "illegal memory access" in caplog.text


async def test_a_step_that_hangs_is_unhealthy(scripted):
    engine = AsyncEngine(scripted, stall_timeout_s=0.05)
    scripted.gate.clear()
    running = asyncio.ensure_future(collect(engine))
    await until(lambda: engine._thread.step_started)
    await asyncio.sleep(0.1)
    with pytest.raises(EngineUnavailable, match="has not ended for"):
        engine.check_health()
    scripted.gate.set()
    await running
    engine.check_health()
    engine.close()


async def test_close_ends_the_thread_and_what_still_runs(scripted):
    engine = AsyncEngine(scripted)
    scripted.gate.clear()
    stream = await engine.submit([("hello", SamplingParams(max_tokens=250))])
    await until(lambda: engine._thread.step_started)
    closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
    await until(lambda: not engine._thread._inbox.empty())
    scripted.gate.set()
    await closing
    assert not engine._thread.is_alive()
    with pytest.raises(EngineUnavailable, match="closed"):
        async for _ in stream:
            pass
    with pytest.raises(EngineUnavailable):
        await engine.submit([("hello", GREEDY)])
    assert scripted.closed_in in scripted.threads  # all calls come from one thread


async def test_an_idle_engine_sleeps(async_engine, scripted):
    await collect(async_engine)
    await until(lambda: not scripted.has_unfinished())
    asked = []
    scripted.has_unfinished = lambda: asked.append(1) or False
    await asyncio.sleep(0.1)
    assert len(asked) <= 2  # the thread waits in its inbox and does not turn


def test_streams_of_several_loops(async_engine):
    lengths = []

    def serve():
        outputs = asyncio.run(collect(async_engine))
        lengths.append(sum(len(output.token_ids) for output in outputs))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert lengths == [20, 20, 20]


def test_a_loop_that_is_gone_does_not_stop_the_engine(async_engine, scripted):
    async def abandon():
        await async_engine.submit([("hello", SamplingParams(max_tokens=250))])

    scripted.gate.clear()
    asyncio.run(abandon())
    scripted.gate.set()
    deadline = time.monotonic() + 10
    while scripted.has_unfinished() or async_engine._open:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    async_engine.check_health()
