"""The decode benchmark's waves: prompts that stay in the cache, all requests decoding at once, time shared out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import benchmarks.measure as measure
import benchmarks.prompt_cache as prompt_cache
import benchmarks.time_budget as time_budget
from benchmarks.contenders import EngineContender, Run
from benchmarks.decode_setup import DecodeConfig
from benchmarks.decoding import DecodeBenchmark
from benchmarks.measure import rotated_runs, summarise
from benchmarks.planning import Estimate, plan, probe
from benchmarks.prompt_cache import cache_gb, fill, requests_that_fit
from benchmarks.results import markdown, write_results
from benchmarks.steady import Steady
from benchmarks.time_budget import TimeBudget
from benchmarks.workload import Request, waves_of
from medusa import Engine
from medusa.engine.kv_cache import PAGE_SIZE
from tests.medusa.engine.support import build_engine, gigabytes, load

QUESTIONS = ["How many foxes?", "What is the capital of France?", "Explain water.", "def fibonacci(n):"]


def requests_of(count: int, prompt: int, cold: int, warm: int) -> list[Request]:
    """No two prompts begin alike; reply lengths at T = 0 and 0.7."""
    return [Request([5 + i] + [7 + i % 3] * (prompt - 1), i, {0.0: cold, 0.7: warm}) for i in range(count)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (measure, time_budget):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class Timed:
    """A contender of which each wave takes so many seconds by the clock; a token of its longest reply takes 0.1 s."""

    def __init__(self, name: str, clock: Clock, seconds: float = 0.0, steady_s: float | None = None) -> None:
        self.name, self.plain, self.temperature = name, name, 0.0
        self._clock, self._seconds, self._steady_s = clock, seconds, steady_s

    def run_steady(self, queue, concurrency) -> Steady | None:
        if self._steady_s is None:
            return None
        self._clock.now += self._steady_s
        return Steady(tokens=1, seconds=self._steady_s, whole_seconds=self._steady_s)

    def run(self, waves, max_tokens=None) -> Run:
        self._clock.now += self._seconds * len(waves)
        longest = [max(r.params(0.0, max_tokens).max_tokens for r in wave) for wave in waves]
        return Run(prefill_seconds=2.0, decode_seconds=sum(0.1 * (tokens - 1) for tokens in longest))


# Prompts in the cache


@pytest.mark.parametrize(
    ("concurrency", "pages", "fitting"),
    [
        (1, 100, 8),  # all
        (2, 6 + 8 * 4, 8),  # two pages of a prompt, one of each of two replies, three of each that runs
        (2, 6 + 8 * 4 - 1, 6),  # whole waves
        (4, 12 + 7 * 4, 4),
        (4, 12 + 4 * 4 - 1, 0),
        (16, 48 + 8 * (2 + 2 * 2), 8),  # prompts repeat in a wave, with a reply of their own each time
        (16, 48 + 8 * (2 + 2 * 2) - 1, 0),
    ],
)
def test_whole_waves_of_requests_that_fit_a_cache(concurrency, pages, fitting) -> None:
    requests = requests_of(8, 2 * PAGE_SIZE + 10, 8, PAGE_SIZE)
    assert requests_that_fit(requests, concurrency, pages) == fitting


def test_prompts_that_fit_are_found_again_by_every_contender_and_all_decode_at_once(tiny_llama: Path) -> None:
    """Of one request less than a page of the prompt is computed: what lies behind its last full page."""
    requests = requests_of(12, 2 * PAGE_SIZE + 3, 70, 65)
    engine = build_engine(tiny_llama, heads=False, kv_cache_gb=gigabytes(tiny_llama, 6 + 4 * 4), max_model_len=256)
    taken = requests[: requests_that_fit(requests, 2, engine.stats().pages_total)]
    assert len(taken) == 4
    fill(engine, taken)
    contenders = [EngineContender(f"T={t}", "", t, engine, lambda e: None) for t in (0.0, 0.7, 0.0, 0.7)]
    for contender in contenders:
        before = engine.stats().prefill_tokens
        run = contender.run(waves_of(taken, contender.temperature, 2, 2))
        assert engine.stats().prefill_tokens - before == 4 * 3
        assert run.full_steps
    fill(engine, requests)
    before = engine.stats().prefill_tokens
    contenders[0].run(waves_of(requests, 0.0, 2, 6))
    assert engine.stats().prefill_tokens - before > 12 * PAGE_SIZE  # those that do not fit are computed anew


def test_a_cache_is_made_for_all_prompts_as_far_as_there_is_memory(tiny_llama: Path, monkeypatch) -> None:
    backbone, tokenizer = load(tiny_llama)
    assert cache_gb(backbone, [20] * 4, 8, batch=4, room=512) is None  # the engine's own holds them
    asked = cache_gb(backbone, [130] * 50, 70, batch=2, room=256)
    engine = Engine(backbone, tokenizer, max_batch_size=2, max_model_len=256, kv_cache_gb=asked, speculation="off")
    assert requests_that_fit(requests_of(50, 130, 70, 70), 2, engine.stats().pages_total) == 50
    for prompt in (64, 70, 127):  # shorter ones fit as well
        assert requests_that_fit(requests_of(50, prompt, 70, 63), 2, engine.stats().pages_total) == 50
    monkeypatch.setattr(prompt_cache.hardware, "bytes_for_cache", lambda device: asked * 2**29)
    assert cache_gb(backbone, [130] * 50, 70, batch=2, room=256) == asked / 2


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return path


def test_the_report_says_which_prompts_ran_and_leaves_out_what_was_not_measured(
    tiny_llama: Path, prompt_file: Path, tmp_path: Path
) -> None:
    config = DecodeConfig(
        prompts=prompt_file,
        model=str(tiny_llama),
        max_tokens=8,
        temperatures=(0.0,),
        concurrency=(1, 2, 4),
        repeats=3,
        peers=False,
        context=150,
        kv_cache_gb=gigabytes(tiny_llama, 12),
        device="cpu",
        time_budget=1e-6,
        out=tmp_path / "out",
    )
    page = DecodeBenchmark(config).run()
    assert "concurrency 1: 1 of 4 prompts" in page and "as many as the KV cache holds" in page
    assert "concurrency 2: 2 of 4 prompts, as many as the KV cache holds" in page
    assert "concurrency 4: the KV cache does not hold 4 requests" in page
    assert "concurrency 4: took" in page and "its share of the time budget was 0 s" in page
    text = (tmp_path / "out" / "decode.json").read_text()
    one, two, four = json.loads(text)["rows"]
    assert (one["requests"], two["requests"], four["requests"]) == (1, 2, 4)
    assert two["step_ms"] > 0 and two["full"] and two["bandwidth_share"] > 0
    assert four["step_ms"] is None and four["full"] is None and four["bandwidth_share"] is None
    assert "NaN" not in text and "nan" not in page


def test_a_figure_that_is_missing_is_an_empty_cell(tmp_path: Path) -> None:
    run = Run(decode_seconds=0.4, decode_tokens=6, tokens=6, replies_steps=6, replies_tokens=6, nodes=[1])
    contender = EngineContender("plain", "plain", 0.0, None, lambda e: None)
    rows = summarise([contender], {"plain": [run] * 3}, 2, plan(Estimate(1.0), 2, 4, 3, None))
    assert "| plain | 0 | 15 (15 to 15) |  | 15 | 1.00 |  | 1.0 |  |  |  |  |" in markdown({}, rows, [])
    write_results(tmp_path, {}, rows, [])
    assert json.loads((tmp_path / "decode.json").read_text())["rows"][0]["step_ms"] is None
    assert not (tmp_path / "step_ms.png").exists()


# The time budget


def test_an_estimate_is_of_a_wave_as_long_as_all_are_on_average(clock: Clock) -> None:
    requests = [Request([7, i], i, {0.0: length}) for i, length in enumerate([8, 8, 8, 8, 8, 128])]
    assert probe(Timed("a", clock), requests, 2).wave_s == pytest.approx(2.0 + 0.1 * ((8 + 8 + 128) / 3 - 1))


@pytest.mark.parametrize(("budget", "rounds"), [(None, 5), (50.0, 5), (49.0, 4), (1.0, 3)])
def test_no_round_begins_that_would_end_beyond_the_budget(clock: Clock, budget, rounds) -> None:
    contenders = [Timed("a", clock, 2.0), Timed("b", clock, 3.0)]
    planned = plan(Estimate(0.1), 2, 4, 5, None)  # two waves, far too low an estimate
    runs = rotated_runs(contenders, requests_of(4, 5, 8, 8), 2, planned, lambda line: None, budget)
    assert {name: len(each) for name, each in runs.items()} == {"a": rounds, "b": rounds}
    assert clock.now == 100.0 + 10.0 * rounds


def test_steady_runs_count_in_the_budget(clock: Clock) -> None:
    """A round takes 16 s with them, and 10 s without."""
    contenders = [Timed("a", clock, 2.0, steady_s=1.0), Timed("b", clock, 3.0, steady_s=5.0)]
    planned = plan(Estimate(0.1), 2, 4, 5, None)
    runs = rotated_runs(contenders, requests_of(4, 5, 8, 8), 2, planned, lambda line: None, 79.0)
    assert {name: len(each) for name, each in runs.items()} == {"a": 4, "b": 4}
    assert clock.now == 100.0 + 4 * 16.0


def test_a_share_is_of_what_is_left_without_what_is_reserved(clock: Clock) -> None:
    budget = TimeBudget(200.0, [6, 2, 2])
    assert budget.share(reserved_s=20.0) == pytest.approx(80.0 * 0.6)
    clock.now = 180.0  # overran
    assert budget.share() == pytest.approx(10.0)
    clock.now = 250.0
    assert budget.share() == 0.0
    assert TimeBudget(None, [1]).share() is None
