"""The decode benchmark's steady load: what is counted and timed by hand, when it ends, and when it is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmarks.contenders as contenders
import benchmarks.results as results
import benchmarks.steady as steady
from benchmarks.contenders import EngineContender, HuggingFaceContender, Run, fixed_tree, plain
from benchmarks.decode_setup import DecodeConfig
from benchmarks.decoding import DecodeBenchmark
from benchmarks.measure import Interval, Row, rotated_runs, summarise, why_not_steady
from benchmarks.planning import Estimate, plan, probe
from benchmarks.prompt_cache import fill, requests_that_fit
from benchmarks.results import markdown, write_results
from benchmarks.steady import Steady, run_steady
from benchmarks.workload import Request, queue_of, waves_of
from medusa.engine.kv_cache import PAGE_SIZE
from tests.medusa.engine.support import TREES, build_engine, gigabytes

QUESTIONS = ["How many foxes?", "What is the capital of France?", "Explain water.", "def fibonacci(n):"]
KEEPS = {0: 4, 1: 1, 2: 4, 3: 1}  # by request, the tokens that a speculating step gives it


def requests_of(lengths: list[int]) -> list[Request]:
    return [Request([5 + i, 8, 9], i, {0.0: length}) for i, length in enumerate(lengths)]


class ScriptedEngine:
    """Gives a reply one token a step, or as many as KEEPS says. By its own clock a step takes 0.1 s for prompts, whose
    replies begin, and 0.1 s for decoding those that had begun. A step computes `at_once` prompts, the last first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at_once: int = 99) -> None:
        self.backbone = SimpleNamespace(device=torch.device("cpu"))
        self.speculates = False
        self._now, self._at_once = 50.0, at_once
        self._waiting: list[tuple[int, int]] = []  # seed and length
        self._given: dict[int, list[int]] = {}  # by seed: length, then what each step gave
        for module in (contenders, steady):
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self._now))

    def contenders(self) -> list[EngineContender]:
        def set_to(value: bool):
            return lambda engine: setattr(engine, "speculates", value)

        return [
            EngineContender("plain", "plain", 0.0, self, set_to(False)),
            EngineContender("tree", "plain", 0.0, self, set_to(True)),
        ]

    def add(self, prompt_ids, params) -> str:
        self._waiting.append((params.seed, params.max_tokens))
        return str(params.seed)

    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._given)

    def stats(self):
        return SimpleNamespace(tree_size=1)

    def step(self):
        running = list(self._given)
        begun = [self._waiting.pop() for _ in self._waiting[: self._at_once]]
        self._now += 0.1 * bool(begun) + 0.1 * bool(running)
        self._given |= {seed: [length, 1] for seed, length in begun}
        outputs = [self._output(seed, 1) for seed, _ in begun]
        for seed in running:
            length, *given = self._given[seed]
            tokens = min(KEEPS[seed % 4] if self.speculates else 1, length - sum(given))
            self._given[seed].append(tokens)
            outputs.append(self._output(seed, tokens))
        return outputs

    def _output(self, seed: int, tokens: int):
        length, *given = self._given[seed]
        finished = None
        if sum(given) == length:
            finished = SimpleNamespace(
                token_ids=[7] * length, num_steps=len(given) - 1, accepted_per_step=given[1:], seed=seed
            )
            del self._given[seed]
        return SimpleNamespace(request_id=str(seed), token_ids=[7] * tokens, finished=finished)


# By hand


def race(monkeypatch) -> list[Row]:
    """Of four requests of nine tokens, two at once; a speculating step keeps 4, 1, 4, 1 tokens of them."""
    pair = ScriptedEngine(monkeypatch).contenders()
    planned = plan(Estimate(1.0), 2, 4, 3, None)
    runs = rotated_runs(pair, requests_of([9, 9, 9, 9]), 2, planned, lambda line: None)
    return summarise(pair, runs, 2, planned)


def test_a_slow_reply_holds_a_wave_up_but_no_steady_load(monkeypatch) -> None:
    """Plainly the first two decode 16 tokens in 8 steps, the others' prompts take 0.1 s, then 16 tokens in 8 steps.
    With trees, the first ends after two steps; the third joins, decodes for two and ends; the fourth joins and has two
    steps until the second ends: 8 + 8 + 8 + 2 tokens in 8 steps and two prompts."""
    of_plain, of_tree = race(monkeypatch)
    assert (of_plain.tokens_per_second.median, of_tree.tokens_per_second.median) == pytest.approx((20.0, 20.0))
    assert of_tree.ratio.median == pytest.approx(1.0)
    assert of_plain.steady.median == pytest.approx(32 / 1.7)
    assert of_tree.steady.median == pytest.approx(26 / 1.0)
    assert of_tree.steady_ratio.median == pytest.approx(26 / (32 / 1.7))
    assert of_plain.steady_ratio is None


def test_json_markdown_and_the_plot_of_ratios_have_it(monkeypatch, tmp_path: Path) -> None:
    rows = race(monkeypatch)
    page = markdown({}, rows, [])
    assert "| 20 (20 to 20) | 26 (26 to 26) |" in page  # a wave's tokens/s, then those of a steady load
    assert "| 1.000 (1.000 to 1.000) | 2.500 (2.500 to 2.500) | 1.381 (1.381 to 1.381) |" in page
    plotted = {}
    monkeypatch.setattr(
        results, "_plot", lambda path, rows, label, value, level=None: plotted.update({path.stem: value})
    )
    write_results(tmp_path, {}, rows, [])
    of_plain, of_tree = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert of_tree["steady"]["median"] == pytest.approx(26.0)
    assert of_tree["steady_ratio"]["median"] == pytest.approx(26 / (32 / 1.7))
    assert of_plain["steady_ratio"] is None
    assert plotted["over_plain"](rows[1]) == rows[1].steady_ratio
    assert plotted["over_plain"](replace(rows[1], steady_ratio=None)) == rows[1].full_ratio


@pytest.mark.parametrize(
    ("lengths", "tokens", "seconds", "whole"),
    [
        ([9, 9, 9, 9], 32, 1.7, 1.8),  # the last two end together
        ([9, 9, 9, 9, 9], 32, 1.7, 2.7),  # the fifth finds a place, the other stays empty
        ([9, 5, 9, 9], 24, 1.5, 2.0),  # the third joins after 4 steps, the fourth after 8; the third ends after 13
    ],
)
def test_it_ends_when_a_place_stays_empty(monkeypatch, lengths, tokens, seconds, whole) -> None:
    engine = ScriptedEngine(monkeypatch)
    steady = run_steady(engine, requests_of(lengths), 2, 0.0)
    assert steady.tokens == tokens
    assert (steady.seconds, steady.whole_seconds) == pytest.approx((seconds, whole))
    assert steady.tokens_per_second == pytest.approx(tokens / seconds)


def test_an_estimate_counts_the_prompts_that_join_one_by_one(monkeypatch) -> None:
    """A wave: a prompt's step and eight more. Replies of 2, 3, 4 and 5 tokens: 1 s, of which 0.7 s are the tokens'."""
    (contender, _) = ScriptedEngine(monkeypatch).contenders()
    estimate = probe(contender, requests_of([9, 9, 9, 9]), 2)
    assert estimate.wave_s == pytest.approx(0.9)
    assert estimate.steady_s == pytest.approx((1.0 - 0.7) / 2 + 0.9)
    assert estimate.end_s == pytest.approx(0.9 / 2)
    assert estimate.seconds(2) == pytest.approx(2 * 0.9 + 2 * 1.05 + 0.45)
    assert estimate.seconds(1) == pytest.approx(0.9)
    assert probe(contender, requests_of([9, 9, 9]), 2) == Estimate(pytest.approx(0.9))


@pytest.mark.parametrize(
    ("budget", "waves", "repeats"),
    [(None, 8, 5), (170.0, 8, 5), (169.0, 7, 5), (50.0, 2, 5), (49.0, 2, 4), (30.0, 2, 3), (29.0, 1, 5), (1.0, 1, 3)],
)
def test_the_budget_counts_steady_runs_and_gives_up_repeats_before_them(budget, waves, repeats) -> None:
    """A wave takes 2 s, its requests in a steady run 2 s, the end of that run 2 s."""
    planned = plan(Estimate(2.0, 2.0, 2.0), 4, 32, 5, budget)
    assert (planned.waves, planned.repeats, planned.is_steady) == (waves, repeats, waves > 1)
    assert planned.seconds == repeats * (waves * 4.0 + 2.0 if waves > 1 else 2.0)


# When it is left out


def test_too_few_requests_are_refused_and_noted(monkeypatch) -> None:
    with pytest.raises(ValueError, match="2 at once takes at least 4 requests, got 3"):
        run_steady(ScriptedEngine(monkeypatch), requests_of([9, 9, 9]), 2, 0.0)
    pair = ScriptedEngine(monkeypatch).contenders()
    planned = plan(Estimate(1.0), 2, 3, 3, None)
    runs = rotated_runs(pair, requests_of([9, 9, 9]), 2, planned, lambda line: None)
    rows = summarise(pair, runs, 2, planned)
    assert [(row.steady, row.steady_ratio) for row in rows] == [(None, None)] * 2
    assert why_not_steady(rows, planned) == "no steady run, which takes at least 4 prompts: 2 requests ran"


def test_a_first_request_that_is_prefilled_last_leaves_nothing_to_count(monkeypatch) -> None:
    pair = ScriptedEngine(monkeypatch, at_once=1).contenders()
    requests = requests_of([2] * 6)
    assert pair[0].run_steady(requests, 3).tokens_per_second is None
    rows = summarise_steady(pair, [None, 3.0])
    assert [row.steady is None for row in rows] == [True, False]
    planned = plan(Estimate(1.0), 3, 6, 3, None)
    why = why_not_steady(rows, planned)
    assert why.startswith("no steady speed of plain: of 6 requests a place stayed empty before the first 3 had been")
    assert why_not_steady(rows[1:], planned) is None


def summarise_steady(pair, speeds: list[float | None]) -> list[Row]:
    runs = {}
    for contender, speed in zip(pair, speeds, strict=True):
        run = Run(decode_seconds=1.0, decode_tokens=1, tokens=1, replies_steps=1, replies_tokens=1, nodes=[1])
        run.steady = Steady(int(speed), 1.0) if speed else Steady()
        runs[contender.name] = [run] * 3
    return summarise(pair, runs, 3, plan(Estimate(1.0), 3, 6, 3, None))


def test_hugging_face_has_none() -> None:
    assert HuggingFaceContender("hf", "", None).run_steady(requests_of([9, 9]), 1) is None


# On a real engine


@pytest.mark.parametrize("size", ["off", 4])
def test_all_replies_have_their_lengths_and_two_run_at_once(tiny_llama: Path, size) -> None:
    engine = build_engine(tiny_llama, trees=[TREES[4]])
    requests = requests_of([6, 12, 9, 17, 8, 11])
    contender = plain(engine, 0.0) if size == "off" else fixed_tree(engine, size, 0.0)
    ended, held, step = [], [], engine.step

    def spy():
        outputs = step()
        held.append(engine.stats().running + engine.stats().waiting)
        ended.extend(output.finished for output in outputs if output.finished)
        return outputs

    engine.step = spy
    result = contender.run_steady(requests, 2)
    by_prompt = {tuple(completion.prompt_token_ids): len(completion.token_ids) for completion in ended}
    assert by_prompt == {tuple(request.prompt_ids): request.lengths[0.0] for request in requests}
    assert max(held) == 2 and len(ended) == 6
    total = sum(request.lengths[0.0] - 1 for request in requests)
    assert total - 16 <= result.tokens < total  # the longest reply may be at its start when a place stays empty
    assert 0 < result.seconds < result.whole_seconds


def test_a_reply_of_another_length_is_an_error(tiny_llama: Path, monkeypatch) -> None:
    engine = build_engine(tiny_llama, heads=False)
    monkeypatch.setattr(steady._Places, "_end", lambda self, name, length, end=steady._Places._end: end(self, name, 5))
    with pytest.raises(RuntimeError, match="a reply of 5 tokens ended, 6 were asked for"):
        run_steady(engine, requests_of([6, 6]), 1, 0.0)


def test_it_finds_the_waves_prompts_in_the_cache_whoever_ran_before(tiny_llama: Path) -> None:
    """In a cache that holds just these requests: of each, three tokens behind the last full page are computed."""
    requests = [Request([5 + i] + [7] * (2 * PAGE_SIZE + 2), i, {0.0: 70 + i % 3, 0.7: 65}) for i in range(4)]
    engine = build_engine(tiny_llama, heads=False, kv_cache_gb=gigabytes(tiny_llama, 6 + 4 * 4), max_model_len=256)
    assert requests_that_fit(requests, 2, engine.stats().pages_total) == 4
    fill(engine, requests)
    for temperature in (0.0, 0.7, 0.0):
        contender = plain(engine, temperature)
        before = engine.stats().prefill_tokens
        waves = waves_of(requests, temperature, 2, 2)
        contender.run(waves)
        assert engine.stats().prefill_tokens - before == 4 * 3
        contender.run_steady(queue_of(requests, waves), 2)
        assert engine.stats().prefill_tokens - before == 2 * 4 * 3


def test_the_queue_is_of_the_waves_requests_in_the_order_they_came() -> None:
    requests = requests_of([9, 3, 7, 5, 8, 2, 6, 4])
    waves = waves_of(requests, 0.0, 2, 3)
    assert [r.lengths[0.0] for r in queue_of(requests, waves)] == [3, 7, 5, 8, 2, 6]


def test_the_report_says_how_many_prompts_it_takes(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    config = DecodeConfig(
        prompts=prompts,
        model=str(tiny_llama),
        max_tokens=8,
        temperatures=(0.0,),
        concurrency=(1, 4),
        repeats=3,
        peers=False,
        device="cpu",
        out=tmp_path / "out",
    )
    page = DecodeBenchmark(config).run()
    assert "concurrency 4: no steady run, which takes at least 8 prompts: 4 requests ran" in page
    assert "concurrency 1: no steady" not in page
    one, four = json.loads((tmp_path / "out" / "decode.json").read_text())["rows"]
    assert Interval(**one["steady"]).median > 0 and four["steady"] is None and four["full"] is not None
