"""The decode benchmark's rows with a grammar: who has it, that replies stay as they are, and the ratios to others."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import benchmarks.results as results
from benchmarks import hardware
from benchmarks.contenders import EngineContender, Run, medusa, plain
from benchmarks.decode_setup import DecodeConfig
from benchmarks.decoding import DecodeBenchmark
from benchmarks.host_steps import ANY_TOKENS, for_grammar, over_own, stays, why_other_replies, with_grammar
from benchmarks.measure import Interval, Row, summarise
from benchmarks.planning import Estimate, plan
from benchmarks.results import markdown, write_results
from benchmarks.steady import Steady
from benchmarks.workload import Request, waves_of
from cli.main import app
from medusa import Engine, SamplingParams
from medusa.checkpoint import save_checkpoint
from medusa.config import ConfigError
from medusa.grammar import Grammar
from tests.medusa.engine.support import TREES, build_engine, checkpoint_of, load

pytest.importorskip("llguidance", reason="the extra `grammar` is not installed")

EOS, SPECIAL = 2, 4  # of the tiny model
QUESTIONS = ["How many foxes?", "What is the capital of France?", "Explain water.", "def fibonacci(n):"]


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return path


def requests_of(lengths: Sequence[int]) -> list[Request]:
    """The replies of the first five have no special token."""
    return [Request([8 + i, 8, 10 + i], i, {0.0: length}) for i, length in enumerate(lengths)]


def record_added(engine: Engine, monkeypatch) -> dict[str, SamplingParams]:
    """What the engine is asked from now on, by request."""
    added: dict[str, SamplingParams] = {}
    add = engine.add

    def recorded(prompt_ids: list[int], params: SamplingParams) -> str:
        request_id = add(prompt_ids, params)
        added[request_id] = params
        return request_id

    monkeypatch.setattr(engine, "add", recorded)
    return added


# Who has the grammar


@pytest.mark.parametrize("contender_of", [plain, medusa])
@pytest.mark.parametrize("at_once", [1, 2])
def test_the_longest_of_each_wave_has_it_and_all_reply_as_without(
    tiny_llama: Path, monkeypatch, contender_of, at_once: int
) -> None:
    engine = build_engine(tiny_llama, trees=list(TREES.values()), speculation="auto")
    without = contender_of(engine, 0.0)
    contender = with_grammar(without)
    waves = waves_of(requests_of([9, 12, 10, 8]), 0.0, at_once, 4 // at_once)
    expected = without.run(waves)
    added = record_added(engine, monkeypatch)
    run = contender.run(waves)
    having = [params.max_tokens for params in added.values() if params.grammar == ANY_TOKENS]
    assert having == [max(request.lengths[0.0] for request in wave) for wave in waves]
    assert len(added) == 4 and sum(params.grammar is None for params in added.values()) == 4 - len(waves)
    assert run.replies == expected.replies
    assert {seed: len(reply) for seed, reply in run.replies.items()} == dict(enumerate([9, 12, 10, 8]))


def test_one_of_a_steady_load_has_it_at_all_times(tiny_llama: Path, monkeypatch) -> None:
    engine = build_engine(tiny_llama, heads=False)
    added, step, ended = record_added(engine, monkeypatch), engine.step, set()
    having: list[int] = []

    def stepped():
        if len(added) < 8:  # then the queue is empty, and its place may be
            having.append(sum(p.grammar is not None for name, p in added.items() if name not in ended))
        outputs = step()
        ended.update(output.request_id for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(engine, "step", stepped)
    steady = with_grammar(plain(engine, 0.0)).run_steady(requests_of([4, 9, 5, 6, 8, 5, 7, 9]), 3)
    assert steady.tokens > 0 and len(having) > 8 and set(having) == {1}
    assert sum(params.grammar is not None for params in added.values()) >= 3  # it went on to others


def test_a_reply_under_the_grammar_may_end_with_an_end_alone() -> None:
    (request,) = requests_of([9])
    asked = request.params(0.0, grammar=ANY_TOKENS)
    assert (asked.max_tokens, asked.min_tokens, asked.ignore_eos, asked.seed) == (9, 8, False, 0)
    assert request.params(0.0, 1, ANY_TOKENS).min_tokens == 0


def test_prompts_whose_reply_it_would_change_are_left_out(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, heads=False)
    assert stays(engine, [9, 125, 244, EOS]) and stays(engine, [106])  # 125 and 244 are no whole characters
    assert not stays(engine, [9, EOS, EOS]) and not stays(engine, [EOS, 9]) and not stays(engine, [9, SPECIAL])
    special = Request([7, 8, 9], 7, {0.0: 20})
    assert SPECIAL in engine.generate([special.prompt_ids], special.params(0.0))[0].token_ids
    kept, notes = for_grammar(engine, [special, *requests_of([8, 9])])
    assert [request.seed for request in kept] == [0, 1]
    assert "1 of 3 prompts were left out" in notes[0] and "on a CPU every step waits" in notes[1]
    with pytest.raises(ConfigError, match="every prompt's reply"):
        for_grammar(engine, [special])


# What the rows are compared with


def run_of(seconds: float, full_s: float, steady_s: float, replies: dict[int, list[int]]) -> Run:
    run = Run(decode_seconds=seconds, decode_tokens=6, tokens=8, replies_steps=6, replies_tokens=6, nodes=[1])
    run.full_steps, run.full_tokens, run.replies = [full_s], 4, replies
    run.steady = Steady(tokens=10, seconds=steady_s)
    return run


def rows_by_hand() -> list[Row]:
    """Medusa is twice as fast as plain decoding; with a grammar it takes 1.25, 2 and 4 times as long as without."""
    base = EngineContender("plain", "plain", 0.0, None, lambda e: None)
    contenders = [base, replace(base, name="medusa")]
    contenders.append(with_grammar(contenders[1]))
    same = {0: [5, 6], 1: [7, 8]}
    runs = {
        "plain": [run_of(0.8, 0.4, 0.2, same)] * 3,
        "medusa": [run_of(0.4, 0.2, 0.1, same)] * 3,
        "medusa, one grammar": [run_of(0.5, 0.4, 0.4, same)] * 2 + [run_of(0.5, 0.4, 0.4, {0: [5, 6], 1: [7, 9]})],
    }
    return over_own(contenders, runs, summarise(contenders, runs, 2, plan(Estimate(1.0), 2, 2, 3, None)))


def test_the_ratio_to_its_own_row_stands_beside_that_to_plain() -> None:
    of_plain, of_medusa, of_grammar = rows_by_hand()
    assert of_plain.over_own is None and of_medusa.over_own is None
    own = of_grammar.over_own
    assert [own.ratio.median, own.full_ratio.median, own.steady_ratio.median] == pytest.approx([0.8, 0.5, 0.25])
    ratios = [of_grammar.ratio.median, of_grammar.full_ratio.median, of_grammar.steady_ratio.median]
    assert ratios == pytest.approx([1.6, 1.0, 0.5])
    assert own.other_replies == 1
    (why,) = why_other_replies([of_plain, of_medusa, of_grammar])
    assert why.startswith("1 of 6 replies of medusa, one grammar are others than without it")


def test_json_and_markdown_have_it_and_plots_leave_the_row_out(monkeypatch, tmp_path: Path) -> None:
    rows, plotted = rows_by_hand(), []
    monkeypatch.setattr(results, "_plot", lambda path, rows, *_, **__: plotted.append([r.contender for r in rows]))
    write_results(tmp_path, {}, rows, [])
    written = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["over_own"] for row in written[:2]] == [None, None]
    assert written[2]["over_own"]["ratio"] == pytest.approx({"median": 0.8, "low": 0.8, "high": 0.8})
    assert plotted == [["plain", "medusa"]] * 3
    page = (tmp_path / "decode.md").read_text()
    assert "| over plain | all at once | steady | over own | own, all at once | own, steady | of copy |" in page
    cells = [f"{ratio} ({ratio} to {ratio})" for ratio in ("1.600", "1.000", "0.500", "0.800", "0.500", "0.250")]
    assert f"| {' | '.join(cells)} |" in page and "Over own:" in page
    without = markdown({}, rows[:2], [])
    assert "own" not in without.split("\n\n")[2] and "Over own:" not in without


def test_a_grammar_that_changes_replies_is_noticed(tiny_llama: Path) -> None:
    engine = build_engine(tiny_llama, heads=False)
    without = plain(engine, 0.0)
    digits = replace(with_grammar(without), grammar=Grammar("regex", "[0-9]*"))
    waves, contenders = waves_of(requests_of([8, 9, 8, 9]), 0.0, 2, 2), [without, digits]
    runs = {contender.name: [contender.run(waves)] for contender in contenders}
    rows = over_own(contenders, runs, summarise(contenders, runs, 2, plan(Estimate(1.0), 2, 4, 3, None)))
    assert rows[1].over_own.other_replies == 2  # one of each wave
    assert isinstance(rows[1].over_own.ratio, Interval)


# The whole


def config_of(tiny_llama: Path, prompt_file: Path, out: Path, **options) -> DecodeConfig:
    return DecodeConfig(
        prompts=prompt_file,
        model=str(tiny_llama),
        max_tokens=8,
        temperatures=(0.0, 0.7),
        concurrency=(1, 2),
        repeats=3,
        typical=False,
        peers=False,
        device="cpu",
        out=out,
        **options,
    )


@pytest.mark.parametrize("with_heads", [False, True])
def test_the_rows_are_there_when_asked_for(
    tiny_llama: Path, prompt_file: Path, tmp_path: Path, monkeypatch, with_heads: bool
) -> None:
    monkeypatch.setattr(hardware, "copy_rate", lambda device: 5e9)
    heads = tmp_path / "heads" if with_heads else None
    if heads is not None:
        checkpoint = checkpoint_of(load(tiny_llama)[0], trees=[TREES[4]], vocabulary="own")
        save_checkpoint(heads, checkpoint.heads, checkpoint.meta)
    page = DecodeBenchmark(config_of(tiny_llama, prompt_file, tmp_path / "out", heads=heads, grammar=True)).run()
    content = json.loads((tmp_path / "out" / "decode.json").read_text())
    kinds = ["plain", "medusa"] if with_heads else ["plain"]
    names = [f"{kind}, T={temperature}" for kind in kinds for temperature in ("0", "0.7")]
    names += [f"{kind}, T=0, one grammar" for kind in kinds]
    assert [(row["contender"], row["concurrency"]) for row in content["rows"]] == [
        (n, c) for c in (1, 2) for n in names
    ]
    for row in content["rows"]:
        if row["contender"].endswith("one grammar"):
            assert row["over_own"]["other_replies"] == 0
            assert row["over_own"]["ratio"] and row["over_own"]["steady_ratio"] and row["ratio"]
        else:
            assert row["over_own"] is None
    assert "- on a CPU every step waits for the host" in page and "| over own |" in page


def test_without_the_extra_nothing_runs(prompt_file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr("benchmarks.decoding.load", None)
    asked = ["bench", "decode", "--prompts", str(prompt_file), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*asked, "--grammar"])
    assert done.exit_code != 0 and isinstance(done.exception, ConfigError)
    assert "--grammar needs the extra `grammar` (pip install" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_it_takes_the_rows_of_temperature_0() -> None:
    with pytest.raises(ConfigError, match=r"--grammar compares .* lists \(0.7,\); add 0"):
        DecodeConfig(prompts=Path("p"), out=Path("o"), temperatures=(0.7,), grammar=True)
