"""Distillation by a growing number of Ray Data actors: reply tokens and rows a second of the distil step itself.

Every actor brings `rows` prompts, so the run's length stays about the same. Engines are built, have answered a prompt,
and wait for each other before the first block is dealt, so that start-up counts for nobody; the end counts, with the
actors that have nothing left to do. Numbers of workers take turns within each round.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console

from benchmarks.scaling.config import TARGETS, ScaleConfig
from benchmarks.scaling.points import Deadline, Point
from medusa import Engine, SamplingParams
from pipelines.demo_prompts import demo_rows
from pipelines.distill import engine_builder
from pipelines.distill_bench import Side, behind_ray
from pipelines.distill_config import DistillConfig
from pipelines.prompt_files import Prompt, normalise, read_prompts
from pipelines.tracking import Tracker, TrackingConfig

if TYPE_CHECKING:
    from pipelines.run import RunContext

SERIES = "distil"
WARM_UP = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


class Together:
    """A Ray actor at which so many processes meet."""

    def __init__(self, number: int) -> None:
        import asyncio

        self._missing, self._met = number, asyncio.Event()

    async def arrive(self) -> None:
        self._missing -= 1
        if self._missing <= 0:
            self._met.set()
        await self._met.wait()


class WarmEngine:
    """Builds an engine and has it answer once; returns it when all have come so far."""

    def __init__(self, build: Callable[[], Engine], together: Any) -> None:
        self._build, self._together = build, together

    def __call__(self) -> Engine:
        engine = self._build()
        engine.generate([[1, 2, 3]] * 2, WARM_UP)
        ray.get(self._together.arrive.remote())
        return engine


def distilling(config: ScaleConfig, deadline: Deadline) -> Iterator[Point]:
    from pipelines.run import ModelConfig, RunContext

    questions = _questions(config)
    rates: dict[int, list[Side]] = {workers: [] for workers in config.workers}
    with tempfile.TemporaryDirectory(prefix="scale-distill-") as folder:
        root = Path(folder)
        with Tracker.open(TrackingConfig(uri=None), root, "bench", {}) as tracker:
            model = ModelConfig(backbone=config.model, dtype=config.dtype, device=config.device)  # type: ignore[arg-type]
            context = RunContext(root, model.located, tracker, Console(file=io.StringIO()))
            took = 0.0
            for turn in range(config.repeats):
                for workers in _rotated(config.workers, turn):
                    deadline.ensure(took, f"run {turn + 1} of {workers} actor(s)")
                    started = time.monotonic()
                    rates[workers].append(_run(config, context, _dealt(questions, config.rows * workers), workers))
                    took = max(took, time.monotonic() - started)
                    yield _point(workers, rates[workers])


def _run(config: ScaleConfig, context: RunContext, prompts: list[Prompt], workers: int) -> Side:
    distil = DistillConfig(
        num_actors=workers,
        max_tokens=config.reply_tokens,
        max_batch_size=config.max_batch_size,
        rows_per_block=config.rows_per_block,
        kv_cache_gb=config.kv_cache_gb,
        heads=config.heads,
    )
    together = ray.remote(num_cpus=0)(Together).remote(workers)
    build = WarmEngine(engine_builder(context.model, distil), together)
    return behind_ray(context, distil, prompts, build_engine=build)


def _point(workers: int, runs: list[Side]) -> Point:
    return Point(
        SERIES,
        workers,
        "reply tokens/s",
        tuple(run.tokens_per_second for run in runs),
        target=TARGETS["distill"],
        told={
            "rows/s": [len(run.replies) / run.seconds for run in runs],
            "rows": len(runs[-1].replies),
            "mean batch": runs[-1].mean_batch,
            "start, s": max(run.start_seconds for run in runs),
        },
    )


def _questions(config: ScaleConfig) -> list[Prompt]:
    """First turns of the file, or of the demo's prompts."""
    if config.prompts is not None:
        prompts = read_prompts(config.prompts)[0]
    else:
        prompts = [normalise(row) for row in demo_rows()]
    return [replace(prompt, turns=prompt.turns[:1]) for prompt in prompts]


def _dealt(questions: list[Prompt], count: int) -> list[Prompt]:
    """The questions in turn, again from the start where there are too few, each with its own id and so its own seed."""
    return [replace(questions[i % len(questions)], id=f"scale-{i:06d}") for i in range(count)]


def _rotated(workers: tuple[int, ...], turn: int) -> tuple[int, ...]:
    start = turn % len(workers)
    return (*workers[start:], *workers[:start])
