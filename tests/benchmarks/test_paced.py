"""The engine that only passes time: the same replies in any company, and exactly the time that its launches take."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

import benchmarks.paced as paced
from benchmarks.paced import PLAIN_STEPS, PacedEngine, Pacing, pacing_of, plain_step_times
from medusa import SamplingParams
from medusa.config import ConfigError
from medusa.engine.step_times import StepTimes

PROMPTS = [[5, 6, 7], [5, 6, 8, 9], [11] * 70]


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(paced, "time", SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep))
    return clock


@pytest.fixture
def engine(tiny_llama, clock):
    return PacedEngine.load(str(tiny_llama), pacing=Pacing(), max_batch_size=4, max_model_len=256)


def params(max_tokens, **more):
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, **more)


def test_a_reply_is_the_same_alone_and_in_company(engine):
    together = engine.generate(PROMPTS, params(60))
    alone = [engine.generate([prompt], params(60))[0] for prompt in PROMPTS]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert len({tuple(c.token_ids) for c in together}) == len(PROMPTS)
    assert all(c.text == engine.tokenizer.decode(c.token_ids) and "\ufffd" not in c.text for c in together)


def test_two_heads_give_about_one_and_a_half_tokens_a_step(engine):
    replies = [engine.generate([[prompt] * 3], params(200))[0] for prompt in range(5, 505, 25)]
    mean = sum(sum(r.accepted_per_step) for r in replies) / sum(r.num_steps for r in replies)
    assert mean == pytest.approx(1 + 0.37 + 0.37**2, abs=0.06)
    assert max(max(r.accepted_per_step) for r in replies) == 3


def test_the_time_that_passes_is_that_of_the_launches(engine, clock):
    began, steps = clock.now, engine.stats().steps
    engine.generate([[5, 6, 7]], params(40))
    launched = engine.stats().steps - steps
    # Nobody waits for the step that was launched before the reply's end was known.
    assert clock.now - began == pytest.approx(PLAIN_STEPS[1] * (1 + launched), abs=1.01 * PLAIN_STEPS[1])
    assert engine.stats().waited_s > 0


def test_a_long_prefill_takes_longer_than_a_step():
    pacing = Pacing()
    assert pacing.prefill_seconds(10) == pacing.prefill_seconds(128) == PLAIN_STEPS[1]
    assert pacing.prefill_seconds(512) == pytest.approx(PLAIN_STEPS[1] + 384 * 30e-6)


def test_step_times_are_those_of_the_table_whatever_the_tree():
    times = plain_step_times()
    assert [times.lookup(batch, 4) for batch in PLAIN_STEPS] == list(PLAIN_STEPS.values())
    assert PLAIN_STEPS[16] < times.lookup(24, 1) < PLAIN_STEPS[32]


def test_a_launch_waits_for_the_one_before(clock):
    device = paced.Device()
    first, second = device.launch(0.5, []), device.launch(0.25, [])
    second.collect()
    assert clock.now == 100.75
    first.collect()
    assert clock.now == 100.75
    clock.now = 200.0
    device.launch(0.5, []).collect()
    assert clock.now == 200.5


def test_step_times_come_from_a_profile(tmp_path):
    profile = tmp_path / "times.json"
    profile.write_text(json.dumps(StepTimes({(1, 1, 128): 0.01}).to_dict()))
    assert pacing_of(profile).step_times.at(1, 1) == 0.01
    assert pacing_of(None) == Pacing()
    for content in ("{", "[]", '{"step_times": []}', '{"step_times": [{"batch": 1}]}'):
        profile.write_text(content)
        with pytest.raises(ConfigError, match=r"times.json holds no step times"):
            pacing_of(profile)
    with pytest.raises(ConfigError, match="holds no step times"):
        pacing_of(tmp_path / "none.json")


def test_an_acceptance_that_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match=r"acceptance is a probability, 0 to 1, got 1.5"):
        Pacing(acceptance=1.5)


def test_its_device_sleeps_without_the_interpreter_lock(tiny_llama):
    """The host's threads go on meanwhile: a pure Python loop beside it keeps (nearly) its own processor time."""
    device = paced.Device()
    began, cpu = time.perf_counter(), time.thread_time()
    device.launch(0.05, []).collect()
    assert time.perf_counter() - began >= 0.05
    assert time.thread_time() - cpu < 0.04
