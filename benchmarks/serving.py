"""What the service costs: tokens a second and time to the first token through REST beside the engine alone.

Both sides run the same engine settings, prompts and reply lengths (greedy, EOS ignored), each in a process of its own,
one after the other for each concurrency. A worker keeps `concurrency` requests in flight until all are answered.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import torch

from deployments.config import ServerConfig
from medusa import Engine, SamplingParams

Through = Literal["uvicorn", "ray"]
WARM_UP = 2  # requests that are not counted, a side and concurrency


@dataclass(frozen=True)
class Load:
    """`requests` for each concurrency, of `prompt_tokens` and `reply_tokens`. The prompts follow from the seed."""

    concurrencies: tuple[int, ...] = (1, 4, 16, 64)
    requests: int = 64
    prompt_tokens: int = 128
    reply_tokens: int = 128
    seed: int = 0

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """No two begin alike, so that none is found in a cache of prompts."""
        generator = torch.Generator().manual_seed(self.seed)
        low = min(100, vocab_size // 2)  # special tokens are among the first
        ids = torch.randint(low, vocab_size, (self.requests, self.prompt_tokens), generator=generator)
        return ids.tolist()


@dataclass(frozen=True)
class Side:
    """One side at one concurrency."""

    tokens_per_second: float
    first_token_median_s: float
    first_token_p95_s: float

    @classmethod
    def of(cls, tokens: int, seconds: float, first: Sequence[float]) -> Side:
        ordered = sorted(first)
        p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
        return cls(tokens / seconds, statistics.median(ordered), p95)


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


def compare(config: ServerConfig, load: Load, *, through: Through = "uvicorn") -> list[Comparison]:
    """Runs both sides. The engine's batch is as large as the largest concurrency."""
    config = replace(config, max_batch_size=max(config.max_batch_size, *load.concurrencies))
    alone = in_new_process(measure_engine, config, load)
    with _running(config, through) as url:
        served = [asyncio.run(measure_service(url, config, load, c)) for c in load.concurrencies]
    return [Comparison(c, a, s) for c, a, s in zip(load.concurrencies, alone, served, strict=True)]


def measure_engine(config: ServerConfig, load: Load) -> list[Side]:
    """The engine alone, stepped as fast as it goes."""
    engine = Engine.from_pretrained(config.model, config.heads, **config.engine_arguments())
    params = SamplingParams(max_tokens=load.reply_tokens, temperature=0.0, ignore_eos=True)
    prompts = load.prompts(engine.tokenizer.vocab_size)
    sides = []
    for concurrency in load.concurrencies:
        run_engine(engine, prompts[:WARM_UP], params, concurrency)
        sides.append(run_engine(engine, prompts, params, concurrency))
    return sides


def run_engine(engine: Engine, prompts: list[list[int]], params: SamplingParams, concurrency: int) -> Side:
    waiting = list(reversed(prompts))
    added: dict[str, float] = {}
    first: dict[str, float] = {}
    tokens = in_flight = 0
    started = time.perf_counter()
    while waiting or in_flight:
        while waiting and in_flight < concurrency:
            added[engine.add(waiting.pop(), params)] = time.perf_counter()
            in_flight += 1
        for output in engine.step():
            tokens += len(output.token_ids)
            first.setdefault(output.request_id, time.perf_counter() - added[output.request_id])
            in_flight -= output.finished is not None
    return Side.of(tokens, time.perf_counter() - started, list(first.values()))


async def measure_service(url: str, config: ServerConfig, load: Load, concurrency: int) -> Side:
    """Streamed completions over HTTP, each worker asking for the next when its last has ended."""
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        async with session.get("/tokenizer_info") as response:
            prompts = load.prompts((await response.json())["vocab_size"])
        await _run_service(session, prompts[:WARM_UP], load, concurrency)
        return await _run_service(session, prompts, load, concurrency)


async def _run_service(session: aiohttp.ClientSession, prompts: list[list[int]], load: Load, concurrency: int) -> Side:
    waiting, first, tokens = list(reversed(prompts)), [], 0

    async def work() -> None:
        nonlocal tokens
        while waiting:
            seconds, count = await ask(session, waiting.pop(), load.reply_tokens)
            first.append(seconds)
            tokens += count

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return Side.of(tokens, time.perf_counter() - started, first)


async def ask(session: aiohttp.ClientSession, prompt: list[int], reply_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens. Raises for a reply that is not whole."""
    body = {
        "prompt": prompt,
        "max_tokens": reply_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, last = time.perf_counter(), None, b""
    async with session.post("/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - started
                last = line
    usage = json.loads(last[6:])["usage"]
    if first is None or usage["completion_tokens"] != reply_tokens:
        raise RuntimeError(f"a reply of {reply_tokens} tokens was asked for, its usage is {usage}")
    return first, usage["completion_tokens"]


@contextmanager
def _running(config: ServerConfig, through: Through) -> Iterator[str]:
    from deployments import local

    if through == "ray":
        with local.local_service(config) as url:
            yield url
        return
    process = multiprocessing.get_context("spawn").Process(target=local.serve_without_ray, args=[config])
    process.start()
    try:
        url = f"http://{config.host}:{config.port}"
        local.wait_until_healthy(url, 600.0, is_alive=process.is_alive)
        yield url
    finally:
        process.terminate()
        process.join(60)


def in_new_process(function: Any, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_report(directory: Path, config: ServerConfig, load: Load, through: Through, rows: list[Comparison]) -> Path:
    """serve.json and serve.md in `directory`; returns the latter."""
    directory.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    content = {
        "machine": machine,
        "model": config.served_name,
        "heads": config.heads,
        "speculation": config.speculation,
        "through": through,
        "load": asdict(load),
        "rows": [asdict(row) | {"share": row.share, "added_first_token_s": row.added_first_token_s} for row in rows],
    }
    (directory / "serve.json").write_text(json.dumps(content, indent=2) + "\n")
    report = directory / "serve.md"
    report.write_text(_markdown(content, rows))
    return report


def _markdown(content: dict[str, Any], rows: list[Comparison]) -> str:
    load = content["load"]
    lines = [
        f"# What REST costs: {content['model']} on {content['machine']}",
        "",
        f"{load['requests']} requests for each concurrency, {load['prompt_tokens']} prompt and {load['reply_tokens']} "
        f"reply tokens, speculation {content['speculation']}, streamed through {content['through']}; the client runs "
        "on the same machine.",
        "",
        "| concurrency | engine, tokens/s | REST, tokens/s | REST / engine | first token: engine | REST | added |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.concurrency} | {row.engine.tokens_per_second:.1f} | {row.service.tokens_per_second:.1f} "
            f"| {row.share:.1%} | {1000 * row.engine.first_token_median_s:.1f} ms "
            f"| {1000 * row.service.first_token_median_s:.1f} ms | {1000 * row.added_first_token_s:.1f} ms |"
        )
    return "\n".join(lines) + "\n"
