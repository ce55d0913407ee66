"""`medusa bench serve`: both sides do the same work, and the report says what was measured."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import uvicorn

from benchmarks.paced import PLAIN_STEPS, Pacing
from benchmarks.serve import serve
from benchmarks.serving import (
    Comparison,
    Cpu,
    Load,
    Running,
    Side,
    compare,
    load_paced,
    measure_engine,
    measure_service,
    reply_range,
    varied_lengths,
)
from benchmarks.serving_report import write_engine_alone, write_report
from deployments.config import ServerConfig
from deployments.loading import load_service
from deployments.one_process import free_port, wait_until_healthy
from medusa.config import ConfigError
from medusa.engine.step_times import StepTimes
from medusa.tokenizer import ChatTokenizer


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


def test_a_row_tells_steps_and_processor_time(tmp_path):
    side = Side.of(300, 2.0, [0.1], steps=100, cpu=Cpu(0.02, 0.01, 0.005))
    assert (side.steps, side.step_s) == (100, 0.02)
    config, load = ServerConfig(model="models/x"), Load((4,), route="chat")
    rows = [Comparison(4, side, side)]
    report = write_report(tmp_path, config, load, "uvicorn", rows, Pacing()).read_text()
    assert "| 4 | 20.00 ms | 20.00 ms | 20.0 ms | 20.0 ms | 10.0 ms | 5.0 ms |" in report
    assert "no speed of decoding" in report and "/v1/chat" in report and "busy waiting" not in report
    assert "replies of 64 to 192 tokens (128 on average)" in report
    assert json.loads((tmp_path / "serve.json").read_text())["paced"]["step_times"][0]["seconds"] == PLAIN_STEPS[1]
    unpaced = write_report(tmp_path, config, load, "ray", [Comparison(4, side, Side(1.0, 0.1, 0.1))]).read_text()
    assert "paced" not in unpaced and "busy waiting" in unpaced


def test_chat_asks_the_same_as_messages(tiny_llama):
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    load = Load(requests=2, prompt_tokens=8)
    plain, chat = load.questions(tokenizer, [5, 7]), replace(load, route="chat").questions(tokenizer, [5, 7])
    assert [question.body["max_tokens"] for question in (*plain, *chat)] == [5, 7, 5, 7]
    assert [question.prompt_ids for question in plain] == load.prompts(tokenizer.vocab_size)
    for question in chat:
        assert question.prompt_ids == tokenizer.encode_chat(question.body["messages"])
    assert (load.path, replace(load, route="chat").path) == ("/v1/completions", "/v1/chat/completions")


def test_the_warm_up_fills_the_batch_with_prompts_that_are_not_counted(tiny_llama):
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    load = Load((1, 4), requests=3, prompt_tokens=8, reply_tokens=16)
    one, four = (load.asked(tokenizer, concurrency) for concurrency in load.concurrencies)
    assert (len(one.warm_up), len(one.counted), len(four.warm_up), len(four.counted)) == (2, 3, 4, 3)
    prompts = [tuple(q.prompt_ids) for each in (one, four) for q in (*each.warm_up, *each.counted)]
    assert len(set(prompts)) == len(prompts)
    assert [q.reply_tokens for q in four.warm_up] == [10, 12, 14, 16]  # every batch size down to one is met
    assert [q.body["max_tokens"] for q in four.warm_up] == [10, 12, 14, 16]


def test_reply_lengths_vary_by_request_number_and_are_the_same_at_each_concurrency(tiny_llama):
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    load = Load((1, 4), requests=40, prompt_tokens=8, reply_tokens=16)
    one, four = (load.asked(tokenizer, concurrency).counted for concurrency in load.concurrencies)
    lengths = [question.reply_tokens for question in one]
    assert lengths == [q.reply_tokens for q in four] == [q.body["max_tokens"] for q in four] == load.lengths()
    assert (min(lengths), max(lengths)) == (8, 24) and sum(lengths) / len(lengths) == pytest.approx(16, abs=2)
    assert varied_lengths(3, 16, seed=1) == varied_lengths(40, 16, seed=1)[:3] != lengths[:3]
    assert reply_range(1) == (1, 1)


def test_the_engine_s_figures_are_kept_before_the_service_runs(tmp_path):
    config, load, side = ServerConfig(model="models/x"), Load((4,)), Side(200.0, 0.1, 0.2)
    write_engine_alone(tmp_path, config, load, "uvicorn", None, [side])
    kept = json.loads((tmp_path / "serve.json").read_text())
    assert "not measured yet" in kept["partial"] and "share" not in kept["rows"][0]
    assert (kept["rows"][0]["concurrency"], kept["rows"][0]["engine"]["tokens_per_second"]) == (4, 200.0)
    write_report(tmp_path, config, load, "uvicorn", [Comparison(4, side, side)])
    assert "partial" not in json.loads((tmp_path / "serve.json").read_text())


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_the_paced_engine_is_measured_alone_and_through_rest(tiny_llama, route):
    times = StepTimes({(1, 1, 128): 0.001})
    load_it = partial(load_paced, pacing=Pacing(step_times=times))
    config = ServerConfig(model=str(tiny_llama), max_batch_size=4, max_model_len=256, port=free_port())
    load = Load((1, 3), requests=5, prompt_tokens=12, reply_tokens=10, route=route)
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    asked = {c: load.asked(tokenizer, c) for c in load.concurrencies}
    alone = measure_engine(config, asked, load_it)
    service = load_service(config, load=load_it)
    server = uvicorn.Server(uvicorn.Config(service.api, port=config.port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until_healthy(f"http://127.0.0.1:{config.port}", is_alive=thread.is_alive)
        running = Running(f"http://127.0.0.1:{config.port}", os.getpid())
        served = [asyncio.run(measure_service(running, load, each, c)) for c, each in asked.items()]
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()
    for side in (*alone, *served):
        assert side.tokens_per_second > 0 and side.steps > 0
        assert 0 < side.first_token_median_s <= side.first_token_p95_s
    assert all(side.cpu.engine > 0 for side in alone)
    assert all(side.cpu.client > 0 for side in served)  # its threads' time comes in ticks, of which there may be none


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": "embeddings"}, "--route is completions or chat, got embeddings"),
        ({"paced": True, "through": "ray"}, "--paced has an engine of its own"),
        ({"paced": True, "heads": "somewhere"}, "--paced has an engine of its own"),
        ({"paced": True, "step_times": Path("none.json")}, "none.json holds no step times"),
        ({"step_times": Path("none.json")}, "--step-times goes with --paced"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        serve(**options)


@pytest.mark.slow
@pytest.mark.parametrize("pacing", [None, Pacing()], ids=["model", "paced"])
def test_both_sides_are_measured_and_reported(tiny_llama, tmp_path, pacing):
    config = ServerConfig(model=str(tiny_llama), speculation="off", device="cpu", port=free_port())
    load = Load(concurrencies=(1, 3), requests=6, prompt_tokens=12, reply_tokens=10)
    kept = []
    rows = compare(config, load, pacing=pacing, keep_engine=kept.extend)
    assert kept == [row.engine for row in rows]
    assert [row.concurrency for row in rows] == [1, 3]
    for row in rows:
        for side in (row.engine, row.service):
            assert side.tokens_per_second > 0
            assert 0 < side.first_token_median_s <= side.first_token_p95_s
    report = write_report(tmp_path / "out", config, load, "uvicorn", rows, pacing).read_text()
    figures = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [row["concurrency"] for row in figures["rows"]] == [1, 3]
    assert figures["rows"][0]["share"] == pytest.approx(rows[0].share)
    for row in rows:
        assert (
            f"| {row.concurrency} | {row.engine.tokens_per_second:.1f} | {row.service.tokens_per_second:.1f} |"
            in report
        )
