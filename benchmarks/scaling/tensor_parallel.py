"""Decoding by one engine spread over several devices: steps and tokens a second beside one device.

A contender of the engine's own: it passes `tensor_parallel` and nothing else changes. Each number of devices runs in a
process of its own, so that memory is free again for the next.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator

import torch

from benchmarks.scaling.config import ScaleConfig
from benchmarks.scaling.points import CutShort, Deadline, LeftOut, Point
from benchmarks.serving import Load, in_new_process, run_engine
from medusa import Engine

OPTION = "tensor_parallel"


def tensor_parallel(config: ScaleConfig, deadline: Deadline) -> Iterator[Point]:
    if OPTION not in inspect.signature(Engine.from_pretrained).parameters:
        raise LeftOut(f"this engine decodes on one device: Engine.from_pretrained has no option {OPTION}")
    took, alone, missed = 0.0, {}, []
    for workers in config.workers:
        deadline.ensure(took, f"{workers} device(s)")
        started = time.monotonic()
        try:
            speeds = in_new_process(measure, config, workers)
        except RuntimeError as error:  # a model that one device does not hold, say
            missed.append(f"{workers} device(s) failed: {str(error)[:300]}")
            continue
        took = max(took, time.monotonic() - started)
        alone = speeds if workers == 1 else alone
        for concurrency, values in speeds.items():
            told = {}
            if config.device == "cuda" and workers > 1 and alone:
                told["times one device"] = statistics.median(values) / statistics.median(alone[concurrency])
            yield Point(f"tensor parallel, {concurrency} at once", workers, "tokens/s", values, told=told)
    if missed:
        raise CutShort("; ".join(missed))


def measure(config: ScaleConfig, workers: int) -> dict[int, tuple[float, ...]]:
    """Tokens a second of each repeat by concurrency, prefill included."""
    spread = {OPTION: workers} if workers > 1 else {}
    engine = Engine.from_pretrained(
        config.model,
        config.heads,
        device=config.device,
        dtype=None if config.dtype is None else getattr(torch, config.dtype),
        max_batch_size=max(config.concurrency),
        kv_cache_gb=config.kv_cache_gb,
        speculation="auto" if config.heads else "off",
        **spread,
    )
    speeds = {}
    for concurrency in config.concurrency:
        # Other prompts for each run: the engine would find those of another in its cache.
        load = Load(
            requests=2 * concurrency * config.repeats,
            prompt_tokens=config.prompt_tokens,
            reply_tokens=config.reply_tokens,
        )
        asked = load.asked(engine.tokenizer, concurrency)
        run_engine(engine, asked.warm_up, concurrency)
        runs = [run_engine(engine, asked.counted[i :: config.repeats], concurrency) for i in range(config.repeats)]
        speeds[concurrency] = tuple(run.tokens_per_second for run in runs)
    if spread:
        engine.close()
    return speeds
