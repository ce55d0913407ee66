"""A launch is held back for requests on their way: as long as the device has work, and only while one could join."""

from __future__ import annotations

import asyncio

import pytest

from deployments.async_engine import AsyncEngine
from deployments.holding import MIN_RESERVE_S, REMEMBERED, RESERVE, Holding
from medusa import SamplingParams

STEP, HOST = 0.012, 0.002


def step(holding: Holding, device_s: float = STEP, host_s: float = HOST) -> float:
    """One step of a device that takes `device_s`, as the engine's thread sees it; returns how long the device idled."""
    held = holding.seconds
    waited = max(0.0, device_s - held - host_s)
    holding.stepped(host_s + waited, held, waited)
    return max(0.0, held + host_s - device_s)


def test_it_takes_the_room_that_a_device_leaves_but_a_reserve():
    holding = Holding()
    for _ in range(REMEMBERED - 1):
        step(holding)
        assert holding.seconds == 0.0  # nothing is known yet
    for _ in range(50):
        assert step(holding) == 0.0
    assert holding.seconds == pytest.approx(STEP - HOST - max(MIN_RESERVE_S, RESERVE * STEP))


def test_the_step_with_the_least_room_decides_until_it_is_forgotten():
    holding = Holding()
    for i in range(4 * REMEMBERED):
        step(holding, host_s=0.006 if i % REMEMBERED == 3 else HOST)
    assert holding.seconds == pytest.approx(STEP - 0.006 - RESERVE * STEP)
    for _ in range(REMEMBERED):
        step(holding)
    assert holding.seconds == pytest.approx(STEP - HOST - RESERVE * STEP)


def test_a_device_that_becomes_faster_idles_once():
    holding = Holding()
    for _ in range(2 * REMEMBERED):
        step(holding, device_s=0.028)
    assert step(holding, device_s=0.004) > 0
    assert holding.seconds == 0.0
    assert [step(holding, device_s=0.004) for _ in range(3 * REMEMBERED)] == [0.0] * 3 * REMEMBERED


def test_nothing_is_held_where_the_host_is_the_device_or_steps_are_short():
    for device_s in (0.0, 0.002, MIN_RESERVE_S):
        holding = Holding()
        for _ in range(2 * REMEMBERED):
            step(holding, device_s=device_s)
        assert holding.seconds == 0.0


class Patient:
    """Holds every launch for a minute."""

    seconds = 60.0

    def stepped(self, step_s: float, held_s: float, waited_s: float) -> None:
        self.held_s = held_s


async def first_output(stream):
    _, output = await anext(stream)
    return output


async def test_a_held_launch_takes_the_next_request_along(scripted):
    scripted.max_batch_size = 2
    engine = AsyncEngine(scripted)
    engine._thread._holding = Patient()
    try:
        params = SamplingParams(max_tokens=30)
        one = await engine.submit([("hello", params)])
        await first_output(one)  # an idle engine begins at once
        assert scripted._steps == 1
        two = await engine.submit([("hello", params)])
        assert await asyncio.wait_for(first_output(two), 10)  # the batch is full: nothing is left to wait for
        tokens = 1
        async for _, output in one:
            tokens += len(output.token_ids)
        assert tokens == 30
        assert 0 < engine._thread._holding.held_s < 60
        assert scripted.has_unfinished()  # the second, held again: the first has left its place
        two.close()
        while engine.stats().running:  # what leaves ends the hold as well
            await asyncio.sleep(0.01)
    finally:
        await asyncio.to_thread(engine.close, 10)
    assert not engine._thread.is_alive()
