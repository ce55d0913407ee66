"""What Ray costs distillation: the engine behind Ray Data actors, and the same engine alone on the same device.

    <output>/distill.json   every run's figures, and what they were measured on
    <output>/distill.md     the same as a table

Both sides answer the same first turns with the same seeds, engine settings and threads. Alone is `Engine.generate` in a
process of its own; behind Ray is the distil step with one actor, timed from the first block's start to the last one's
end, so that the start of Ray and of the actor (told beside it) counts for neither. Runs alternate and take
turns in going first, since machines drift; the ratio is the median over pairs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import torch

from medusa.config import ConfigError
from pipelines.answering import first_prompt
from pipelines.distill import DATA, distill, engine_builder
from pipelines.distill_config import DistillConfig
from pipelines.prompt_files import Prompt
from pipelines.prompts import write_prompts

if TYPE_CHECKING:
    from medusa import Engine
    from pipelines.run import ModelConfig, RunContext


@dataclass(frozen=True)
class Side:
    """One run: reply tokens, the seconds they took, and the mean number of replies in a step."""

    tokens: int
    seconds: float
    mean_batch: float
    start_seconds: float
    device: str
    replies: dict[str, list[int]]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


Pair = tuple[Side, Side]  # alone, behind Ray


@dataclass(frozen=True)
class DistillBench:
    """`ratio` is the median, over pairs of runs, of behind Ray to alone. `differing` counts replies whose tokens differ
    between the sides: 0 in float32; in half precision near-ties may fall otherwise in another batch."""

    model: str
    device: str
    dtype: str | None
    prompts: int
    max_batch_size: int
    rows_per_block: int
    temperature: float
    reply_tokens: int
    alone_tokens_per_second: list[float]
    ray_tokens_per_second: list[float]
    ratio: float
    ratio_interval: tuple[float, float]
    alone_mean_batch: float
    ray_mean_batch: float
    ray_start_seconds: float
    differing: int


def bench_distill(
    context: RunContext, config: DistillConfig, prompts: Sequence[Prompt], *, repeats: int
) -> DistillBench:
    """Runs both sides `repeats` times, in turn. Ray must be initialised."""
    if not prompts or repeats < 1:
        raise ConfigError(f"a comparison needs prompts and at least one repeat, got {len(prompts)} and {repeats}")
    first_turns = [replace(prompt, turns=prompt.turns[:1]) for prompt in prompts]
    config = replace(config, num_actors=1, cut_loops=False, truncated="keep")
    pairs = [_pair(context, config, first_turns, alone_first=number % 2 == 0) for number in range(repeats)]
    ratios = [ray.tokens_per_second / alone.tokens_per_second for alone, ray in pairs]
    alone, ray = pairs[-1]
    return DistillBench(
        model=Path(context.model.backbone).name,
        device=alone.device,
        dtype=context.model.dtype,
        prompts=len(first_turns),
        max_batch_size=config.max_batch_size,
        rows_per_block=config.rows_per_block,
        temperature=config.temperature,
        reply_tokens=alone.tokens,
        alone_tokens_per_second=[side.tokens_per_second for side, _ in pairs],
        ray_tokens_per_second=[side.tokens_per_second for _, side in pairs],
        ratio=statistics.median(ratios),
        ratio_interval=(min(ratios), max(ratios)),
        alone_mean_batch=alone.mean_batch,
        ray_mean_batch=ray.mean_batch,
        ray_start_seconds=statistics.median(side.start_seconds for _, side in pairs),
        differing=sum(alone.replies.get(name) != reply for name, reply in ray.replies.items()),
    )


def write_result(result: DistillBench, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name, text in (("distill.json", json.dumps(asdict(result), indent=2) + "\n"), ("distill.md", markdown(result))):
        partial = output / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, output / name)


def markdown(result: DistillBench) -> str:
    low, high = result.ratio_interval
    runs = len(result.ray_tokens_per_second)
    return (
        f"Distillation of {result.model} on {result.device}, {result.prompts} prompts, {result.reply_tokens} reply "
        f"tokens, batch {result.max_batch_size}, blocks of {result.rows_per_block}, {runs} pair(s) of runs:\n\n"
        "| | tokens/s (median) | mean batch |\n|---|---|---|\n"
        f"| engine alone | {statistics.median(result.alone_tokens_per_second):,.0f} | {result.alone_mean_batch:.1f} |\n"
        f"| behind Ray Data | {statistics.median(result.ray_tokens_per_second):,.0f} | {result.ray_mean_batch:.1f} |\n"
        f"| ratio | {result.ratio:.3f} ({low:.3f} to {high:.3f}) | |\n\n"
        f"Start of the actor and of Ray Data, not counted: {result.ray_start_seconds:.1f} s. "
        f"Replies whose tokens differ: {result.differing}.\n"
    )


def _pair(context: RunContext, config: DistillConfig, prompts: Sequence[Prompt], *, alone_first: bool) -> Pair:
    alone = _alone(context.model, config, prompts) if alone_first else None
    ray = behind_ray(context, config, prompts)
    return alone or _alone(context.model, config, prompts), ray


def _alone(model: ModelConfig, config: DistillConfig, prompts: Sequence[Prompt]) -> Side:
    """In a new process, so that a GPU's memory is free again for the other side."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_generate, model, config, prompts).result()


def _generate(model: ModelConfig, config: DistillConfig, prompts: Sequence[Prompt]) -> Side:
    started = time.monotonic()
    torch.set_num_threads(max(int(config.cpus_per_actor), 1))  # as Ray gives an actor
    engine = engine_builder(model, config)()
    prompt_ids = [first_prompt(engine.tokenizer, prompt) for prompt in prompts]
    params = [config.sampling_params(prompt.id, 0) for prompt in prompts]
    ready = time.monotonic()
    done = engine.generate(prompt_ids, params)
    seconds = time.monotonic() - ready
    stats = engine.stats()
    replies = {prompt.id: reply.token_ids for prompt, reply in zip(prompts, done, strict=True)}
    return Side(
        tokens=sum(map(len, replies.values())),
        seconds=seconds,
        mean_batch=sum(reply.num_steps for reply in done) / max(stats.steps, 1),
        start_seconds=ready - started,
        device=_device_name(engine.backbone.device),
        replies=replies,
    )


def behind_ray(
    context: RunContext,
    config: DistillConfig,
    prompts: Sequence[Prompt],
    build_engine: Callable[[], Engine] | None = None,
) -> Side:
    """The distil step in a folder of its own, which is removed."""
    root = Path(tempfile.mkdtemp(prefix="bench-distill-", dir=context.root))
    try:
        write_prompts(root / "prompts.parquet", prompts)
        started = time.monotonic()
        output = distill(replace(context, root=root), config, root / "prompts.parquet", build_engine=build_engine)
        whole = time.monotonic() - started
        stepping, rows = output.manifest["stepping"], pq.read_table(output.path / DATA).to_pylist()
        return Side(
            tokens=stepping["tokens"],
            seconds=stepping["seconds"],
            mean_batch=stepping["replies_stepped"] / max(stepping["steps"], 1),
            start_seconds=whole - stepping["seconds"],
            device="",
            replies={row["id"]: row["completion_ids"] for row in rows},
        )
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} thread(s) of {platform.processor() or platform.machine()}"
