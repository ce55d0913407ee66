"""More requests than a service can sustain: how long those wait that it takes, and how soon it refuses the others.

First a full batch of requests, each followed by the next, tells how many a second the service sustains. Then requests
come at random times (a Poisson process) at a multiple of that rate, whether others were answered or not, as users do.
Every one must be answered whole or refused with 429 and Retry-After; anything else ends the benchmark.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.paced import Pacing
from benchmarks.results import write_atomically
from benchmarks.serving import Load, LoadEngine, Question, load_paced, running_service
from benchmarks.serving_report import machine
from benchmarks.sse_client import Connection, Refused
from deployments.config import ServerConfig
from deployments.loading import load_engine
from medusa.tokenizer import ChatTokenizer

SUSTAINED_ROUNDS = 4  # requests a place in the batch that the sustained rate is measured over
Say = Callable[[str], object]


@dataclass(frozen=True)
class Answer:
    """A request that was taken (`first_s`, `total_s` from its sending, `tokens`) or refused (after `total_s`)."""

    total_s: float
    first_s: float | None = None
    tokens: int = 0

    @property
    def is_refusal(self) -> bool:
        return self.first_s is None

    @property
    def between_tokens_s(self) -> float:
        assert self.first_s is not None
        return (self.total_s - self.first_s) / max(1, self.tokens - 1)


@dataclass(frozen=True)
class Spread:
    """Seconds: median and 95th percentile. Of nothing, both are None."""

    median_s: float | None
    p95_s: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        if not seconds:
            return cls(None, None)
        ordered = sorted(seconds)
        return cls(statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))])


@dataclass(frozen=True)
class OverloadRow:
    """What came of requests at `load` times the sustained rate, sent over `seconds`."""

    load: float
    seconds: float
    sent: int
    answered: int
    refused: int
    tokens_per_second: float
    first_token: Spread
    between_tokens: Spread
    whole_reply: Spread
    refusal: Spread

    @classmethod
    def of(cls, load: float, seconds: float, lasted_s: float, answers: Sequence[Answer]) -> OverloadRow:
        """`lasted_s`: until the last answer had ended."""
        taken = [answer for answer in answers if not answer.is_refusal]
        return cls(
            load=load,
            seconds=seconds,
            sent=len(answers),
            answered=len(taken),
            refused=len(answers) - len(taken),
            tokens_per_second=sum(answer.tokens for answer in taken) / lasted_s,
            first_token=Spread.of([answer.first_s for answer in taken if answer.first_s is not None]),
            between_tokens=Spread.of([answer.between_tokens_s for answer in taken]),
            whole_reply=Spread.of([answer.total_s for answer in taken]),
            refusal=Spread.of([answer.total_s for answer in answers if answer.is_refusal]),
        )


def overload(
    config: ServerConfig,
    load: Load,
    loads: Sequence[float],
    seconds: float,
    out: Path,
    *,
    pacing: Pacing | None = None,
    say: Say = lambda text: None,
) -> Path:
    """Measures each of `loads` for so many seconds, writing overload.json and overload.md after each; returns the
    latter. Prompts and mean reply length are `load`'s."""
    load_it: LoadEngine = partial(load_paced, pacing=pacing) if pacing else load_engine
    tokenizer = ChatTokenizer.from_pretrained(config.model)
    rows: list[OverloadRow] = []
    with running_service(config, "uvicorn", load_it) as service:
        rate = asyncio.run(sustained_rate(service.url, load, tokenizer, config.max_batch_size))
        say(f"a full batch of {config.max_batch_size} sustains {rate:.1f} requests a second")
        for i, factor in enumerate(loads, 1):
            rows.append(asyncio.run(offer(service.url, load, tokenizer, factor, rate, seconds, seed=i)))
            say(f"{factor:g} times that: {rows[-1].answered} answered, {rows[-1].refused} refused")
            report = write_report(out, config, load, rate, rows, pacing)
    return report


async def sustained_rate(url: str, load: Load, tokenizer: ChatTokenizer, concurrency: int) -> float:
    """Requests a second with so many in flight all the time."""
    asked = replace(load, requests=SUSTAINED_ROUNDS * concurrency).asked(tokenizer, concurrency)
    connections = Connections(url)
    for questions in (asked.warm_up, asked.counted):
        started, waiting = time.perf_counter(), list(questions)

        async def work(waiting: list[Question]) -> None:
            while waiting:
                if (await connections.ask(load.path, waiting.pop())).is_refusal:
                    raise RuntimeError(f"a request was refused with {concurrency} in flight: the batch is smaller")

        await asyncio.gather(*(work(waiting) for _ in range(concurrency)))
        lasted_s = time.perf_counter() - started
    connections.close()
    return len(asked.counted) / lasted_s


async def offer(
    url: str, load: Load, tokenizer: ChatTokenizer, factor: float, rate: float, seconds: float, seed: int
) -> OverloadRow:
    """Sends requests for so long at `factor` times `rate`, and waits for all answers."""
    times = list(arrivals(factor * rate, seconds, seed))
    load = replace(load, requests=len(times), seed=load.seed + 1000 * seed)
    questions = load.questions(tokenizer, load.lengths())
    connections, started = Connections(url), time.perf_counter()

    async def send(at_s: float, question: Question) -> Answer:
        await asyncio.sleep(max(0.0, started + at_s - time.perf_counter()))
        return await connections.ask(load.path, question)

    try:
        answers = await asyncio.gather(*map(send, times, questions))
    finally:
        connections.close()
    return OverloadRow.of(factor, seconds, time.perf_counter() - started, answers)


def arrivals(rate: float, seconds: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process; at least one."""
    draw, at_s = random.Random(seed), 0.0
    while at_s == 0.0 or at_s < seconds:
        yield at_s
        at_s += draw.expovariate(rate)


class Connections:
    """Kept-alive connections to one service, as many as are in use at once."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._idle: list[Connection] = []

    async def ask(self, path: str, question: Question) -> Answer:
        """Raises RuntimeError for what is neither a whole reply nor a refusal by 429 with Retry-After."""
        connection = await self._take()
        started = time.perf_counter()
        try:
            reply = await connection.ask(path, question.body)
        except Refused as refused:
            if refused.status != 429 or "retry-after:" not in refused.head.lower():
                raise
            self._idle.append(connection)
            return Answer(time.perf_counter() - started)
        if (usage := reply.last["usage"])["completion_tokens"] != question.reply_tokens:
            raise RuntimeError(f"a reply of {question.reply_tokens} tokens was asked for, its usage is {usage}")
        self._idle.append(connection)
        return Answer(reply.total_s, reply.first_s, question.reply_tokens)

    async def _take(self) -> Connection:
        host, port = self._address.hostname, self._address.port
        assert host is not None and port is not None
        while self._idle:
            if (connection := self._idle.pop()).is_open:
                return connection
        return await Connection.open(host, port)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def write_report(
    out: Path,
    config: ServerConfig,
    load: Load,
    rate: float,
    rows: Sequence[OverloadRow],
    pacing: Pacing | None,
) -> Path:
    settings = {
        "machine": machine(),
        "model": config.served_name,
        "heads": config.heads,
        "speculation": config.speculation,
        "paced": asdict(pacing) | {"step_times": pacing.step_times.to_dict()["step_times"]} if pacing else None,
        "max_batch_size": config.max_batch_size,
        "max_queued_requests": config.max_queued_requests,
        "load": asdict(load),
        "sustained_requests_per_second": rate,
    }
    content = settings | {"rows": [asdict(row) for row in rows]}
    write_atomically(out / "overload.json", lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))
    report = out / "overload.md"
    write_atomically(report, lambda path: path.write_text(markdown(settings, rows)))
    return report


def markdown(settings: dict[str, Any], rows: Sequence[OverloadRow]) -> str:
    load = settings["load"]
    engine = "a paced engine without a device: no speed of decoding" if settings["paced"] else "real decoding"
    lines = [
        f"# Overload: {settings['model']} on {settings['machine']}",
        "",
        f"A batch of {settings['max_batch_size']}, {settings['max_queued_requests']} may wait; {engine}, speculation "
        f"{settings['speculation']}; {load['prompt_tokens']} prompt tokens, {load['reply_tokens']} reply tokens on "
        f"average. A full batch sustains {settings['sustained_requests_per_second']:.2f} requests a second. Times are "
        "median and 95th percentile.",
        "",
        "| load | sent | answered | refused | tokens/s | first token | between tokens | whole reply | refusal after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [_times(each) for each in (row.first_token, row.between_tokens, row.whole_reply, row.refusal)]
        lines.append(
            f"| {row.load:g} | {row.sent} in {row.seconds:g} s | {row.answered} | {row.refused} "
            f"| {row.tokens_per_second:.0f} | {' | '.join(cells)} |"
        )
    lines += ["", "No request was lost or answered otherwise: the benchmark would have ended."]
    return "\n".join(lines) + "\n"


def _times(spread: Spread) -> str:
    if spread.median_s is None or spread.p95_s is None:
        return ""
    return f"{1000 * spread.median_s:.1f}, {1000 * spread.p95_s:.1f} ms"
