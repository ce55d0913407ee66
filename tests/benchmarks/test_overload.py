"""`medusa bench overload`: what is offered, what counts as an answer, and the report."""

from __future__ import annotations

import asyncio
import itertools
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.overload import overload
from benchmarks.overloading import Answer, Connections, OverloadRow, Spread, arrivals, markdown
from benchmarks.overloading import overload as measure
from benchmarks.serving import Load, Question
from benchmarks.sse_client import Refused
from deployments.config import ServerConfig
from deployments.one_process import free_port
from medusa.config import ConfigError


def test_requests_come_at_random_times_at_the_rate_that_is_asked_for():
    times = list(arrivals(50.0, 20.0, seed=1))
    assert times == sorted(times) == list(arrivals(50.0, 20.0, seed=1)) != list(arrivals(50.0, 20.0, seed=2))
    assert times[0] >= 0.0 and times[-1] < 20.0
    assert 850 < len(times) < 1150  # five standard deviations of a Poisson count of 1,000
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(gap < 0.02 for gap in gaps) / len(gaps) == pytest.approx(0.632, abs=0.08)  # exponential, not even
    assert list(arrivals(0.001, 0.5, seed=1)) == [0.0]


def test_a_row_counts_and_times_what_was_taken_apart_from_what_was_refused():
    answers = [Answer(2.0, 0.5, 16), Answer(0.01), Answer(4.0, 1.0, 1)]
    row = OverloadRow.of(2.0, 3.0, 5.0, answers)
    assert (row.sent, row.answered, row.refused, row.tokens_per_second) == (3, 2, 1, 17 / 5)
    assert row.first_token == Spread(0.75, 1.0) and row.whole_reply == Spread(3.0, 4.0)
    assert row.between_tokens == Spread((0.1 + 3.0) / 2, 3.0)
    assert row.refusal == Spread(0.01, 0.01)
    assert OverloadRow.of(0.5, 3.0, 5.0, answers[:1]).refusal == Spread(None, None)


@asynccontextmanager
async def answering(answer: bytes):
    async def serve(reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    connections = Connections(f"http://{host}:{port}")
    try:
        yield connections
    finally:
        connections.close()
        server.close()


async def test_only_a_429_with_retry_after_is_a_refusal():
    question = Question([1], 4, {"prompt": [1]})
    refusal = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\ncontent-length: 2\r\n\r\n{}"
    async with answering(refusal) as connections:
        answers = [await connections.ask("/v1/completions", question) for _ in range(2)]
        assert all(answer.is_refusal and answer.total_s > 0 for answer in answers)
        assert len(connections._idle) == 1  # the second took the first's
    for other in (refusal.replace(b"Retry-After: 1\r\n", b""), refusal.replace(b"429 Too Many Requests", b"503 Sick")):
        async with answering(other) as connections:
            with pytest.raises(Refused):
                await connections.ask("/v1/completions", question)


async def test_a_connection_that_the_server_has_closed_is_not_used_again():
    refusal = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\ncontent-length: 2\r\n\r\n{}"
    question = Question([1], 4, {"prompt": [1]})
    async with answering(refusal) as connections:
        await connections.ask("/v1/completions", question)
        (kept,) = connections._idle
        kept._transport.abort()  # as the server's end would
        answer = await asyncio.wait_for(connections.ask("/v1/completions", question), 10)
        assert answer.is_refusal and connections._idle[0] is not kept


def test_a_real_service_answers_or_refuses_everything(tiny_llama: Path, tmp_path: Path):
    config = ServerConfig(
        model=str(tiny_llama),
        speculation="off",
        device="cpu",
        max_batch_size=2,
        max_queued_requests=1,
        port=free_port(),
    )
    said: list[str] = []
    load = Load(prompt_tokens=6, reply_tokens=8)
    report = measure(config, load, (0.5, 6.0), 1.0, tmp_path / "out", say=said.append)
    content = json.loads((tmp_path / "out" / "overload.json").read_text())
    assert content["sustained_requests_per_second"] > 0 and content["max_queued_requests"] == 1
    assert [row["load"] for row in content["rows"]] == [0.5, 6.0]
    for row in content["rows"]:
        assert row["sent"] == row["answered"] + row["refused"] and row["answered"] > 0
        assert 0 < row["first_token"]["median_s"] <= row["whole_reply"]["median_s"]
    assert content["rows"][1]["refused"] > 0  # of six times what it sustains
    page = report.read_text()
    assert page == markdown(content, [_row(row) for row in content["rows"]])
    assert len(said) == 3 and "refused" in said[-1]


def _row(row: dict) -> OverloadRow:
    spreads = {name: Spread(**value) for name, value in row.items() if isinstance(value, dict)}
    return OverloadRow(**(row | spreads))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loads": "0.8,much"}, "--loads lists multiples such as 0.8,2, got '0.8,much'"),
        ({"loads": "0"}, "--loads are above 0"),
        ({"seconds": 0.0}, "--seconds is above 0, got 0"),
        ({"paced": True, "heads": "somewhere"}, "--paced has an engine of its own"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        overload(**options)
