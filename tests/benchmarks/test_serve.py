"""`medusa bench serve`: both sides do the same work, and the report says what was measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving import Comparison, Load, Side, compare
from benchmarks.serving_report import write_report
from deployments.config import ServerConfig
from deployments.local import free_port


def test_the_same_prompts_for_both_sides_and_none_shared():
    load = Load(requests=50, prompt_tokens=8, seed=3)
    prompts = load.prompts(512)
    assert prompts == load.prompts(512) != Load(requests=50, prompt_tokens=8, seed=4).prompts(512)
    assert {len(prompt) for prompt in prompts} == {8}
    assert len({tuple(prompt) for prompt in prompts}) == 50
    assert all(100 <= token < 512 for prompt in prompts for token in prompt)


def test_a_side_is_its_tokens_over_its_time():
    side = Side.of(300, 2.0, [0.4, 0.1, 0.2])
    assert side == Side(150.0, 0.2, 0.4)
    row = Comparison(4, Side(200.0, 0.1, 0.2), side)
    assert (row.share, row.added_first_token_s) == (0.75, pytest.approx(0.1))


@pytest.mark.slow
def test_both_sides_are_measured_and_reported(tiny_llama, tmp_path):
    config = ServerConfig(model=str(tiny_llama), speculation="off", device="cpu", port=free_port())
    load = Load(concurrencies=(1, 3), requests=6, prompt_tokens=12, reply_tokens=10)
    rows = compare(config, load)
    assert [row.concurrency for row in rows] == [1, 3]
    for row in rows:
        for side in (row.engine, row.service):
            assert side.tokens_per_second > 0
            assert 0 < side.first_token_median_s <= side.first_token_p95_s
    report = write_report(tmp_path / "out", config, load, "uvicorn", rows).read_text()
    figures = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [row["concurrency"] for row in figures["rows"]] == [1, 3]
    assert figures["rows"][0]["share"] == pytest.approx(rows[0].share)
    for row in rows:
        assert (
            f"| {row.concurrency} | {row.engine.tokens_per_second:.1f} | {row.service.tokens_per_second:.1f} |"
            in report
        )
