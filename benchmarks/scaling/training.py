"""Medusa-1 and Medusa-2 by a growing number of Ray Train workers, with DDP and with FSDP2: tokens a second.

Each worker brings `batch` rows a step, so a step's work grows with the workers. One worker runs unwrapped and is the
base of both. Rows are random tokens of uneven lengths (benchmarks/train_speed.py); windows of `steps` steps are timed
after WARM_UP others, from one meeting of all workers to the next.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.scaling.config import TARGETS, ScaleConfig
from benchmarks.scaling.points import CutShort, Deadline, Point
from benchmarks.train_speed import random_rows, synchronise
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.training.schedule import HeadsLossConfig, JointConfig, TrainerConfig
from medusa.training.sharding import shard
from medusa.training.trainer import Trainer
from pipelines.train_worker import distributed

Sharding = Literal["ddp", "fsdp"]
WARM_UP = 3
WRAPS = {"ddp": distributed, "fsdp": shard}


@dataclass(frozen=True)
class Job:
    """What a worker is told; `seconds` is when it stops before its last window."""

    model: str
    dtype: str | None
    on_gpu: bool
    sharding: Sharding
    num_heads: int
    trainer: TrainerConfig
    windows: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Windows:
    """What the first worker measured."""

    tokens_per_second: tuple[float, ...]
    seconds_per_step: float
    peak_memory_gib: float | None


def training(config: ScaleConfig, deadline: Deadline, *, joint: bool) -> Iterator[Point]:
    name = "medusa-2" if joint else "medusa-1"
    took, missed = 0.0, []
    runs = [(1, "one worker")] + [(n, kind) for n in config.workers if n > 1 for kind in WRAPS]
    for number, (workers, kind) in enumerate(runs):
        deadline.ensure(took, f"{kind} on {workers} worker(s)")
        started = time.monotonic()
        share = deadline.left / (len(runs) - number)
        job = _job(config, "ddp" if workers == 1 else kind, workers, joint, share)  # type: ignore[arg-type]
        try:
            found = _fit(job, workers)
        except ray.train.TrainingFailedError as error:
            if workers == 1:
                raise
            missed.append(f"{kind} on {workers} workers failed: {error}")
            continue
        took = max(took, time.monotonic() - started)
        for series in [kind] if workers > 1 else list(WRAPS):
            yield Point(
                f"{name} {series}",
                workers,
                "tokens/s",
                found.tokens_per_second,
                target=TARGETS[name],
                told={"step, s": found.seconds_per_step, "peak memory, GiB": found.peak_memory_gib},
            )
    if missed:
        raise CutShort("; ".join(missed))


def _job(config: ScaleConfig, sharding: Sharding, workers: int, joint: bool, seconds: float) -> Job:
    numbers = TrainerConfig(
        batch_size=config.batch * workers,
        max_length=config.length,
        max_steps=WARM_UP + config.repeats * config.steps,
        packing=True,
        activation_checkpointing=True,
        loss=HeadsLossConfig(kind="tokens"),
        joint=JointConfig(method=config.joint_method) if joint else None,  # type: ignore[arg-type]
    )
    return Job(
        model=config.model,
        dtype=config.dtype,
        on_gpu=config.device == "cuda",
        sharding=sharding,
        num_heads=config.num_heads,
        trainer=numbers,
        windows=config.repeats,
        steps=config.steps,
        seconds=seconds,
    )


def _fit(job: Job, workers: int) -> Windows:
    with tempfile.TemporaryDirectory(prefix="scale-train-") as folder:
        trainer = TorchTrainer(
            measure_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=job.on_gpu,
                resources_per_worker={"CPU": 1} | ({"GPU": 1} if job.on_gpu else {}),
            ),
            run_config=RunConfig(name="scale", storage_path=folder),
        )
        return trainer.fit().return_value


def measure_worker(told: Mapping[str, Any]) -> Windows:
    """What Ray Train runs on each worker."""
    job: Job = told["job"]
    started = time.monotonic()
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if job.on_gpu else torch.device("cpu")
    if not job.on_gpu:
        torch.set_num_threads(1)
    trainer = build_trainer(job, device, rank, workers)
    for _ in range(WARM_UP):
        trainer.train_step(trainer.next_batches())
    speeds: list[float] = []
    took = [0.0]
    while len(speeds) < job.windows and _all_have_time(job, started, took[-1], device, workers):
        tokens, seconds = _window(trainer, job.steps, device, workers)
        speeds.append(tokens / seconds)
        took.append(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**30 if job.on_gpu else None
    return Windows(tuple(speeds), took[-1] / job.steps, peak)


def build_trainer(job: Job, device: torch.device, rank: int, workers: int) -> Trainer:
    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    backbone = Backbone.from_pretrained(job.model, dtype=dtype, device=device)
    shape = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=job.num_heads)
    heads = MedusaHeads.initialised(shape, backbone.lm_head_weight)
    rows = random_rows(8 * job.trainer.batch_size, job.trainer.max_length, backbone.vocab_size)
    wrap = WRAPS[job.sharding] if workers > 1 else lambda module: module
    return Trainer(backbone, heads, rows, job.trainer, rank=rank, world_size=workers, wrap=wrap)


def _window(trainer: Trainer, steps: int, device: torch.device, workers: int) -> tuple[int, float]:
    _meet(device, workers)
    started, tokens = time.perf_counter(), 0
    for _ in range(steps):
        tokens += trainer.train_step(trainer.next_batches()).tokens
    _meet(device, workers)
    return tokens, time.perf_counter() - started


def _meet(device: torch.device, workers: int) -> None:
    if workers > 1:
        dist.all_reduce(torch.zeros(1, device=device))
    synchronise()


def _all_have_time(job: Job, started: float, took: float, device: torch.device, workers: int) -> bool:
    """One window is always measured; the workers agree on each more, since a step needs all of them."""
    late = torch.tensor(float(took > 0 and time.monotonic() - started + took > job.seconds), device=device)
    if workers > 1:
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return not late.item()


medusa_1 = partial(training, joint=False)
medusa_2 = partial(training, joint=True)
