"""`medusa plan serve`: replicas for a load, one GPU each, and what a request will see.

At a steady load a replica holds B replies at a time. Its step takes t(B, N) seconds and gives each reply E(N) tokens,
so it can finish B E / t reply tokens a second in the time that prompts leave it. B is bounded by the cache's memory, by
the batch that the service allows, and by the slowest pace that is allowed. For each B the tree of N nodes with the most
tokens a second is taken, one node (no speculation) among them: what the policy does with measured times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medusa.config import ConfigError
from pipelines.plan.figures import Basis, Figure, Figures, LadderRow, weakest
from pipelines.plan.shapes import BF16, HeadsCost, ModelShape
from pipelines.plan.speed import Machine, decode_step, prefill

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Load:
    """What comes: requests a second, and their mean lengths in tokens."""

    requests_per_second: float
    prompt_tokens: int
    reply_tokens: int

    def __post_init__(self) -> None:
        if min(self.requests_per_second, self.prompt_tokens, self.reply_tokens) <= 0:
            raise ConfigError(f"requests a second, prompt and reply tokens must all be above 0, got {self}")


@dataclass(frozen=True)
class Point:
    """A replica that holds `batch` replies: the best tree, and what it can take."""

    batch: int
    nodes: int
    step: Figure
    tokens_per_step: float
    requests_per_second: float

    @property
    def ms_per_token(self) -> float:
        return self.step.value / self.tokens_per_step * 1e3

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.tokens_per_step / self.step.value


@dataclass(frozen=True)
class ServePlan:
    """`replicas` at `utilisation` of the capacity of `point`, and how many plain decoding would take (None: it is too
    slow for the pace that is asked for)."""

    gpu: str
    replicas: int
    plain_replicas: int | None
    point: Point
    points: tuple[Point, ...]
    first_token_ms: Figure
    utilisation: float
    memory: dict[str, float]
    max_batch: int
    basis: Basis
    tokens_per_step: Figure


def plan_serving(
    model: str,
    shape: ModelShape,
    heads: HeadsCost | None,
    tokens_per_step: Mapping[int, float],
    tokens_basis: Figure,
    load: Load,
    gpu: str,
    figures: Figures,
    *,
    max_batch_size: int = 256,
    max_ms_per_token: float | None = None,
) -> ServePlan:
    """`tokens_per_step` by nodes, 1 among them. ConfigError when the model does not fit, or is never fast enough."""
    machine = Machine(model, shape, gpu, figures)
    memory, room = _memory(machine, heads, load)
    batches = _batches(min(room, max_batch_size))
    points = [_best_point(machine, heads, tokens_per_step, load, batch) for batch in batches]
    plain_points = [_best_point(machine, None, {1: 1.0}, load, batch) for batch in batches]
    chosen, plain = (_largest(candidates, max_ms_per_token) for candidates in (points, plain_points))
    if chosen is None:
        raise ConfigError(
            f"{model} on {gpu} takes {points[0].ms_per_token:.1f} ms a token with one reply at a time, more than the "
            f"{max_ms_per_token} allowed; choose a faster GPU or allow more"
        )
    used = figures.assumptions.utilisation
    reading = prefill(machine, load.prompt_tokens)
    wait = Figure((reading.value + chosen.step.value) * 1e3, weakest(reading, chosen.step), "prefill and one step")
    return ServePlan(
        gpu=gpu,
        replicas=_replicas(load, chosen, used),
        plain_replicas=None if plain is None else _replicas(load, plain, used),
        point=chosen,
        points=tuple(points),
        first_token_ms=wait,
        utilisation=used,
        memory=memory,
        max_batch=batches[-1],
        basis=weakest(chosen.step, reading, tokens_basis) if chosen.nodes > 1 else weakest(chosen.step, reading),
        tokens_per_step=tokens_basis,
    )


def _memory(machine: Machine, heads: HeadsCost | None, load: Load) -> tuple[dict[str, float], int]:
    """GiB by item of a replica, and the replies that its cache has room for."""
    assumed, shape = machine.figures.assumptions, machine.shape
    items = {
        "backbone weights": shape.parameters * BF16,
        "heads": heads.parameters * BF16 if heads else 0,
        "runtime": assumed.runtime_gb * 1e9,
    }
    free = machine.gpu.memory_gb * 1e9 * assumed.memory_share - sum(items.values())
    a_reply = (load.prompt_tokens + load.reply_tokens + 64) * shape.kv_bytes_per_token  # a tree is written behind it
    room = int(free / a_reply)
    if room < 1:
        raise ConfigError(
            f"{machine.model} needs {sum(items.values()) / GIB:.0f} GiB and {a_reply / GIB:.1f} a reply; one "
            f"{machine.gpu_name} has {machine.gpu.memory_gb * 1e9 * assumed.memory_share / GIB:.0f} to plan with, and "
            "the engine does not spread a model over GPUs: choose a larger one"
        )
    items["KV cache"] = room * a_reply
    return {name: size / GIB for name, size in items.items()}, room


def _batches(most: int) -> list[int]:
    return sorted({*(2**power for power in range(most.bit_length())), most})


def _best_point(
    machine: Machine, heads: HeadsCost | None, tokens_per_step: Mapping[int, float], load: Load, batch: int
) -> Point:
    context = load.prompt_tokens + load.reply_tokens // 2
    points = []
    for nodes, tokens in tokens_per_step.items():
        step = decode_step(machine, batch, nodes, context, heads)
        seconds = load.reply_tokens * step.value / (batch * tokens) + prefill(machine, load.prompt_tokens).value
        points.append(Point(batch, nodes, step, tokens, 1 / seconds))
    return max(points, key=_capacity)


def _largest(points: list[Point], max_ms_per_token: float | None) -> Point | None:
    allowed = [p for p in points if max_ms_per_token is None or p.ms_per_token <= max_ms_per_token]
    return max(allowed, key=_capacity, default=None)


def _replicas(load: Load, point: Point, utilisation: float) -> int:
    return math.ceil(load.requests_per_second / (point.requests_per_second * utilisation))


def _capacity(point: Point) -> float:
    return point.requests_per_second


def expected_ladder(
    model: str, heads: Literal["hydra", "medusa", "joint"], figures: Figures, at_64: float | None = None
) -> tuple[dict[int, float], Figure]:
    """Tokens a step by nodes for a model without a calibrated checkpoint: its 64-node figure (given, published, as
    measured of another model's Hydra heads, or assumed), and the shape of the ladder that was measured for such heads.
    "joint" is Medusa-2 with Medusa's heads."""
    kind = "hydra" if heads == "hydra" else "medusa"
    measured = next(row for row in figures.measured.tokens_per_step if row.kind == kind)
    top = max(measured.nodes)
    basis = _tokens_at_64(model, heads, figures, measured) if at_64 is None else _given(at_64)
    scale = (basis.value - 1) / (measured.nodes[top] - 1)
    ladder = {nodes: 1 + (tokens - 1) * scale for nodes, tokens in sorted(measured.nodes.items())}
    return ladder, basis


def _given(tokens: float) -> Figure:
    return Figure(tokens, "measured", "given with --tokens-per-step")


def _tokens_at_64(
    model: str, heads: Literal["hydra", "medusa", "joint"], figures: Figures, measured: LadderRow
) -> Figure:
    if heads == "hydra":  # a small model's, so an estimate for any other
        how = f"as {measured.model}'s Hydra heads at temperature {measured.temperature:g}: {measured.source}"
        return Figure(measured.nodes[max(measured.nodes)], "estimate", how)
    for row in figures.published.tokens_per_step:
        known = row.medusa if heads == "medusa" else row.joint
        if row.model == model and known is not None:
            return Figure(known, "published", row.source)
    return Figure(figures.assumptions.tokens_per_step_64[heads], "estimate", "assumed")
