"""What the service costs: tokens a second and time to the first token through REST beside the engine alone.

Both sides run the same engine settings, prompts and reply lengths (greedy, EOS ignored), each in a process of its own,
one after the other for each concurrency. Reply lengths vary: replies of one length would all end in one step, and their
successors arrive together at the engine and one by one over HTTP, which no real load does. A worker keeps `concurrency`
requests in flight until all are answered.
With a pacing (paced.py) the engine has no device: what is compared then is the host's cost alone.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

import psutil
import torch

from benchmarks.paced import PacedEngine, Pacing
from benchmarks.sse_client import Connection, Streamed
from deployments.config import ServerConfig
from deployments.loading import load_engine
from deployments.one_process import serve_without_ray, wait_until_healthy
from medusa import Engine, SamplingParams
from medusa.tokenizer import ChatTokenizer

Through = Literal["uvicorn", "ray"]
Route = Literal["completions", "chat"]
LoadEngine = Callable[[ServerConfig], Engine]
FEWEST_WARM_UP = 2  # requests that are not counted, a side and concurrency


@dataclass(frozen=True)
class Question:
    """One request, as the engine and as REST are asked it."""

    prompt_ids: list[int]
    reply_tokens: int
    body: dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What both sides are asked at one concurrency: `warm_up` first, then `counted`, which has other prompts."""

    warm_up: list[Question]
    counted: list[Question]


@dataclass(frozen=True)
class Load:
    """`requests` for each concurrency, of `prompt_tokens` (by `chat`: about as many) and on average `reply_tokens`.
    Prompts and lengths follow from the seed; the lengths are the same at each concurrency."""

    concurrencies: tuple[int, ...] = (1, 4, 16, 64)
    requests: int = 64
    prompt_tokens: int = 128
    reply_tokens: int = 128
    route: Route = "completions"
    seed: int = 0

    @property
    def path(self) -> str:
        return "/v1/completions" if self.route == "completions" else "/v1/chat/completions"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """No two begin alike, so that none is found in a cache of prompts."""
        generator = torch.Generator().manual_seed(self.seed)
        low = min(100, vocab_size // 2)  # special tokens are among the first
        ids = torch.randint(low, vocab_size, (self.requests, self.prompt_tokens), generator=generator)
        return ids.tolist()

    def lengths(self) -> list[int]:
        return varied_lengths(self.requests, self.reply_tokens, self.seed)

    def questions(self, tokenizer: ChatTokenizer, lengths: Sequence[int]) -> list[Question]:
        """One for each length. Chat asks the same prompts as messages, so that the service has a template to render and
        text to tokenise."""
        options = {
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        questions = []
        for ids, length in zip(self.prompts(tokenizer.vocab_size), lengths, strict=True):
            body: dict[str, Any] = options | {"max_tokens": length}
            if self.route == "completions":
                questions.append(Question(ids, length, body | {"prompt": ids}))
            else:
                chat = [{"role": "user", "content": tokenizer.decode(ids)}]
                questions.append(Question(tokenizer.encode_chat(chat), length, body | {"messages": chat}))
        return questions

    def asked(self, tokenizer: ChatTokenizer, concurrency: int) -> Asked:
        """Other prompts for each concurrency: the engine would find those of the one before in its cache. The warm-up
        fills the batch, and its replies end one after the other, so that the step of every batch size is known."""
        count = max(FEWEST_WARM_UP, concurrency)
        load = replace(self, requests=count + self.requests, seed=self.seed + concurrency)
        warm_up = [max(1, self.reply_tokens * (count + i) // (2 * count)) for i in range(1, count + 1)]
        questions = load.questions(tokenizer, [*warm_up, *self.lengths()])
        return Asked(questions[:count], questions[count:])


def reply_range(mean: int) -> tuple[int, int]:
    """The shortest and the longest reply of a load: half and one and a half times the mean."""
    return max(1, mean // 2), mean + mean // 2


def varied_lengths(count: int, mean: int, seed: int = 0) -> list[int]:
    """Uniform over `reply_range`, by number: fewer requests have the same lengths as the first of more."""
    draw = random.Random(seed)
    return [draw.randint(*reply_range(mean)) for _ in range(count)]


@dataclass(frozen=True)
class Cpu:
    """Processor seconds for each 1,000 tokens: of the engine's thread (with the service's small ones), of its event
    loop, and of the client."""

    engine: float
    loop: float = 0.0
    client: float = 0.0


@dataclass(frozen=True)
class Side:
    """One side at one concurrency. `steps` are the engine's; `cpu` is None where threads cannot be told apart."""

    tokens_per_second: float
    first_token_median_s: float
    first_token_p95_s: float
    steps: int = 0
    step_s: float = 0.0  # from one to the next
    cpu: Cpu | None = None

    @classmethod
    def of(cls, tokens: int, seconds: float, first: Sequence[float], *, steps: int = 0, cpu: Cpu | None = None) -> Side:
        ordered = sorted(first)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        step_s = seconds / steps if steps else 0.0
        return cls(tokens / seconds, statistics.median(ordered), p95, steps, step_s, cpu)


@dataclass(frozen=True)
class Comparison:
    concurrency: int
    engine: Side
    service: Side

    @property
    def share(self) -> float:
        """Tokens a second through REST, of those of the engine alone."""
        return self.service.tokens_per_second / self.engine.tokens_per_second

    @property
    def added_first_token_s(self) -> float:
        return self.service.first_token_median_s - self.engine.first_token_median_s


def compare(
    config: ServerConfig,
    load: Load,
    *,
    through: Through = "uvicorn",
    pacing: Pacing | None = None,
    keep_engine: Callable[[Sequence[Side]], object] = lambda sides: None,
) -> list[Comparison]:
    """Runs both sides; `keep_engine` gets the engine's, by concurrency, before the service runs. The engine's batch is
    as large as the largest concurrency."""
    config = replace(config, max_batch_size=max(config.max_batch_size, *load.concurrencies))
    load_it: LoadEngine = partial(load_paced, pacing=pacing) if pacing else load_engine
    tokenizer = ChatTokenizer.from_pretrained(config.model)
    asked = {c: load.asked(tokenizer, c) for c in load.concurrencies}
    alone = in_new_process(measure_engine, config, asked, load_it)
    keep_engine(alone)
    with running_service(config, through, load_it) as service:
        served = [asyncio.run(measure_service(service, load, each, c)) for c, each in asked.items()]
    return [Comparison(c, a, s) for c, a, s in zip(load.concurrencies, alone, served, strict=True)]


def load_paced(config: ServerConfig, pacing: Pacing) -> Engine:
    return PacedEngine.load(
        config.model, pacing=pacing, max_batch_size=config.max_batch_size, max_model_len=config.max_model_len
    )


def measure_engine(config: ServerConfig, asked: Mapping[int, Asked], load_it: LoadEngine = load_engine) -> list[Side]:
    """The engine alone, stepped as fast as it goes; `asked` by concurrency."""
    engine = load_it(config)
    sides = []
    for concurrency, each in asked.items():
        run_engine(engine, each.warm_up, concurrency)
        sides.append(run_engine(engine, each.counted, concurrency))
    return sides


def run_engine(engine: Engine, questions: Sequence[Question], concurrency: int) -> Side:
    waiting = list(reversed(questions))
    added: dict[str, float] = {}
    first: dict[str, float] = {}
    tokens = in_flight = 0
    steps, started, cpu = engine.stats().steps, time.perf_counter(), time.process_time()
    while waiting or in_flight:
        while waiting and in_flight < concurrency:
            question = waiting.pop()
            params = SamplingParams(max_tokens=question.reply_tokens, temperature=0.0, ignore_eos=True)
            added[engine.add(question.prompt_ids, params)] = time.perf_counter()
            in_flight += 1
        for output in engine.step():
            tokens += len(output.token_ids)
            first.setdefault(output.request_id, time.perf_counter() - added[output.request_id])
            in_flight -= output.finished is not None
    seconds = time.perf_counter() - started
    used = Cpu(1000 * (time.process_time() - cpu) / tokens)
    return Side.of(tokens, seconds, list(first.values()), steps=engine.stats().steps - steps, cpu=used)


@dataclass(frozen=True)
class Running:
    """The service that is measured; `pid` is its process where that has it alone."""

    url: str
    pid: int | None

    def steps(self) -> int:
        with urllib.request.urlopen(f"{self.url}/health", timeout=60) as response:
            return int(json.load(response)["engine"]["steps"])

    def cpu_seconds(self) -> tuple[float, float]:
        """Of all threads but the first, and of the first, which is the event loop's."""
        if self.pid is None:
            return 0.0, 0.0
        spent = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(self.pid).threads()}
        loop = spent.pop(self.pid)
        return sum(spent.values()), loop


async def measure_service(service: Running, load: Load, asked: Asked, concurrency: int) -> Side:
    """Streamed replies over HTTP, each worker asking for the next when its last has ended."""
    address = urlsplit(service.url)
    assert address.hostname is not None and address.port is not None
    connections = [await Connection.open(address.hostname, address.port) for _ in range(concurrency)]
    try:
        await _ask_all(connections, load.path, asked.warm_up)
        steps, before, client = service.steps(), service.cpu_seconds(), time.process_time()
        started = time.perf_counter()
        replies = await _ask_all(connections, load.path, asked.counted)
        seconds = time.perf_counter() - started
        client, after = time.process_time() - client, service.cpu_seconds()
    finally:
        for connection in connections:
            connection.close()
    tokens = sum(question.reply_tokens for question in asked.counted)  # all are whole
    spent = [1000 * (end - begin) / tokens for begin, end in zip(before, after, strict=True)]
    cpu = Cpu(*spent, 1000 * client / tokens) if service.pid is not None else None
    first = [reply.first_s for reply in replies]
    return Side.of(tokens, seconds, first, steps=service.steps() - steps, cpu=cpu)


async def _ask_all(connections: Sequence[Connection], path: str, questions: Sequence[Question]) -> list[Streamed]:
    """Raises RuntimeError for a reply that is not whole."""
    waiting, replies = list(reversed(questions)), []

    async def work(connection: Connection) -> None:
        while waiting:
            question = waiting.pop()
            reply = await connection.ask(path, question.body)
            if (usage := reply.last["usage"])["completion_tokens"] != question.reply_tokens:
                raise RuntimeError(f"a reply of {question.reply_tokens} tokens was asked for, its usage is {usage}")
            replies.append(reply)

    await asyncio.gather(*map(work, connections))
    return replies


@contextmanager
def running_service(config: ServerConfig, through: Through, load_it: LoadEngine) -> Iterator[Running]:
    if through == "ray":
        from deployments.local import local_service  # a machine without Ray can measure the other way

        with local_service(config) as url:
            yield Running(url, None)
        return
    serve = multiprocessing.get_context("spawn").Process(target=serve_without_ray, args=[config, load_it])
    serve.start()
    try:
        url = f"http://{config.host}:{config.port}"
        wait_until_healthy(url, 600.0, is_alive=serve.is_alive)
        yield Running(url, serve.pid)
    finally:
        serve.terminate()
        serve.join(60)


def in_new_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
