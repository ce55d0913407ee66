"""What Ray itself takes, whatever the device: processor time of the driver a block, of the proxy a request and a chunk.

Both are one process and bound what many workers can be given, so processor time counts, not the clock: it does not
depend on what else shares the cores. Of the driver it is all of its threads together. Of the proxy it is the busiest
one, its event loop, beside which others may run on other cores; "all threads" is what one core would have to bear. The
work behind them is nothing: actors that answer blocks at once, a replica
that streams chunks without a model.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pyarrow as pa
import ray
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from ray import serve

from benchmarks.scaling.config import ScaleConfig
from benchmarks.scaling.points import Deadline, Point
from deployments.local import LOGGING
from deployments.one_process import free_port, wait_until_healthy
from pipelines.block_actor import BlockReport, block_task
from pipelines.prompt_files import Prompt

FEW, MANY, PROMPTS_A_BLOCK = 40, 340, 64
REQUESTS, AT_ONCE, CHUNKS = 200, 32, 65
CHUNK = b"data: " + json.dumps({"id": "cmpl-0" * 6, "choices": [{"index": 0, "text": " word", "x": "y" * 90}]}).encode()


def overheads(config: ScaleConfig, deadline: Deadline) -> Iterator[Point]:
    dispatch = [dispatch_seconds(config.most) for _ in range(config.repeats)]
    yield Point("driver, a block", 1, "CPU s", tuple(dispatch), told={"prompts a block": PROMPTS_A_BLOCK})
    deadline.ensure(0.0, "the proxy")
    with _nothing_served() as (url, proxy):
        asyncio.run(_ask_all(url, 1))  # connections and code paths once
        runs = [[_proxy_seconds(url, proxy, chunks) for chunks in (1, CHUNKS)] for _ in range(config.repeats)]
    request = [[short[kind] for short, _ in runs] for kind in range(2)]
    chunk = [[(long[kind] - short[kind]) / (CHUNKS - 1) for short, long in runs] for kind in range(2)]
    for name, (busiest, together) in (("a request of one chunk", request), ("a further chunk", chunk)):
        yield Point(f"proxy, {name}", 1, "CPU s", tuple(busiest), told={"all threads": together, "bytes": len(CHUNK)})


class IdleActor:
    """Takes a block of distillation and says at once that it is done."""

    def __call__(self, tasks: pa.Table) -> pa.Table:
        (task,) = tasks.to_pylist()
        now, count = time.time(), len(task["prompts"])
        report = BlockReport(task["block"], count, 0, "", count, 0, 0, 0, now, now)
        return pa.Table.from_pylist([asdict(report)])


def dispatch_seconds(actors: int) -> float:
    """Processor seconds of this process for each block that Ray Data hands to an actor and takes back: what MANY blocks
    take beyond FEW, so that starting is not counted."""
    return (_driver_seconds(actors, MANY) - _driver_seconds(actors, FEW)) / (MANY - FEW)


def _driver_seconds(actors: int, blocks: int) -> float:
    prompts = [Prompt(f"prompt-{i}", ("What would a block of prompts weigh? " * 4,)) for i in range(PROMPTS_A_BLOCK)]
    tasks = [block_task(number, Path("block"), prompts) for number in range(blocks)]
    dataset = ray.data.from_arrow(tasks).map_batches(
        IdleActor,
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=4),
        num_cpus=0.5,
    )
    dataset.context.enable_progress_bars = False
    before = time.process_time()
    answered = sum(1 for _ in dataset.iter_rows())
    if answered != blocks:
        raise RuntimeError(f"{blocks} blocks were handed out, {answered} came back")
    return time.process_time() - before


def _streaming_app() -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {}

    @app.post("/stream/{chunks}")
    async def stream(chunks: int) -> StreamingResponse:
        async def body() -> Any:
            for _ in range(chunks):
                yield CHUNK + b"\n\n"
                await asyncio.sleep(0.005)  # else several chunks travel as one

        return StreamingResponse(body(), media_type="text/event-stream")

    return app


@contextmanager
def _nothing_served() -> Iterator[tuple[str, psutil.Process]]:
    @serve.deployment(ray_actor_options={"num_cpus": 0.5}, max_ongoing_requests=4 * AT_ONCE)
    @serve.ingress(_streaming_app())
    class Nothing:
        pass

    port = free_port()
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(Nothing.bind(), name="nothing", route_prefix="/", logging_config=LOGGING)
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url)
        yield url, _listener(port)
    finally:
        serve.shutdown()


def _listener(port: int) -> psutil.Process:
    """The process that listens there: the proxy."""
    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            return psutil.Process(connection.pid)
    raise RuntimeError(f"no process listens on {port}")


def _proxy_seconds(url: str, proxy: psutil.Process, chunks: int) -> tuple[float, float]:
    """Of the proxy, a request: its busiest thread, and all of them."""
    before = _thread_seconds(proxy)
    asyncio.run(_ask_all(url, chunks))
    spent = [seconds - before.get(thread, 0.0) for thread, seconds in _thread_seconds(proxy).items()]
    return max(spent) / REQUESTS, sum(spent) / REQUESTS


def _thread_seconds(process: psutil.Process) -> dict[int, float]:
    return {thread.id: thread.user_time + thread.system_time for thread in process.threads()}


async def _ask_all(url: str, chunks: int) -> None:
    left = REQUESTS

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with session.post(f"/stream/{chunks}") as response:
                response.raise_for_status()
                body = await response.read()
            if body.count(CHUNK) != chunks:
                raise RuntimeError(f"{chunks} chunks were asked for, {body.count(CHUNK)} came")

    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=AT_ONCE)) as session:
        await asyncio.gather(*(worker(session) for _ in range(AT_ONCE)))
