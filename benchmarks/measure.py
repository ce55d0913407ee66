"""Timing contenders beside each other: rotated runs of waves and of a steady load, medians with their quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.contenders import Contender, Run
from benchmarks.planning import MIN_REPEATS, Planned
from benchmarks.steady import takes_at_least
from benchmarks.workload import Request, queue_of, waves_of

Say = Callable[[str], None]


@dataclass(frozen=True)
class Interval:
    """A median with the first and third quartile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        low, median, high = np.percentile(np.asarray(values, dtype=float), [25, 50, 75])
        return cls(float(median), float(low), float(high))

    @classmethod
    def where_measured(cls, values: Sequence[float | None]) -> Interval | None:
        """Of those that there are; None if there is none."""
        measured = [value for value in values if value is not None]
        return cls.of(measured) if measured else None

    def over(self, base: float) -> Interval:
        return Interval(self.median / base, self.low / base, self.high / base)


@dataclass(frozen=True)
class OverOwn:
    """Ratios of a row with a grammar to its contender's own without one, run by run (benchmarks/host_steps.py), and how
    many replies of the waves of all runs were others than without."""

    ratio: Interval | None
    full_ratio: Interval | None
    steady_ratio: Interval | None
    other_replies: int


@dataclass(frozen=True)
class Row:
    """One contender at one concurrency. Speeds are of decoding; `end_to_end` includes the prefill (None for a peer,
    which computes prompts that this engine finds in its cache), `full` and `step_ms` those while every request of a
    wave decodes (None where there was no such step), `steady` of a load that stays at `concurrency` (None for peers,
    and where there were too few requests). Ratios are to the plain contender of the same temperature, run by run.
    `nodes` is the mean over steps of the largest tree, `speculating` the share of steps with more than one node a
    sequence. Only a row with a grammar has `over_own`."""

    contender: str
    temperature: float
    concurrency: int
    requests: int
    repeats: int
    tokens_per_second: Interval
    end_to_end: Interval | None
    full: Interval | None
    steady: Interval | None
    tokens_per_step: float
    step_ms: float | None
    nodes: float
    speculating: float
    ratio: Interval | None
    full_ratio: Interval | None
    steady_ratio: Interval | None
    end_to_end_ratio: Interval | None
    bandwidth_share: float | None = None
    gpu_idle_share: float | None = None
    over_own: OverOwn | None = None

    def over(self, plain: Row) -> Row:
        """With its ratio to plain decoding that ran at another time of the same process."""
        full = self.full.over(plain.full.median) if self.full and plain.full else None
        return replace(self, ratio=self.tokens_per_second.over(plain.tokens_per_second.median), full_ratio=full)


def rotated_runs(
    contenders: Sequence[Contender],
    requests: Sequence[Request],
    concurrency: int,
    planned: Planned,
    say: Say,
    budget: float | None = None,
) -> dict[str, list[Run]]:
    """Every contender once a round: the waves, then their requests as a steady load, where they are enough. Each round
    begins with another contender, so that none always runs first. After MIN_REPEATS no round begins that would end
    beyond the budget, if it takes as long as those before."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    began = time.monotonic()
    for turn in range(planned.repeats):
        spent = time.monotonic() - began
        if budget is not None and turn >= MIN_REPEATS and spent * (turn + 1) / turn > budget:
            break
        start = turn % len(contenders)
        for contender in [*contenders[start:], *contenders[:start]]:
            say(f"concurrency {concurrency}, run {turn + 1}/{planned.repeats}: {contender.name}")
            waves = waves_of(requests, contender.temperature, concurrency, planned.waves)
            run = contender.run(waves)
            if planned.is_steady:
                run.steady = contender.run_steady(queue_of(requests, waves), concurrency)
            runs[contender.name].append(run)
    return runs


def summarise(
    contenders: Sequence[Contender], runs: dict[str, list[Run]], concurrency: int, planned: Planned
) -> list[Row]:
    """A row for each contender, in their order."""
    rows = []
    for contender in contenders:
        own, plain = runs[contender.name], runs.get(contender.plain)
        full_steps = [seconds for run in own for seconds in run.full_steps]
        rows.append(
            Row(
                contender=contender.name,
                temperature=contender.temperature,
                concurrency=concurrency,
                requests=planned.waves * concurrency,
                repeats=len(own),
                tokens_per_second=Interval.of([run.tokens_per_second for run in own]),
                end_to_end=Interval.of([run.end_to_end_tokens_per_second for run in own]),
                full=Interval.where_measured([run.full_tokens_per_second for run in own]),
                steady=Interval.where_measured([run.steady_tokens_per_second for run in own]),
                tokens_per_step=sum(r.replies_tokens for r in own) / sum(r.replies_steps for r in own),
                step_ms=1e3 * float(np.median(full_steps)) if full_steps else None,
                nodes=float(np.mean([n for run in own for n in run.nodes])),
                speculating=float(np.mean([n > 1 for run in own for n in run.nodes])),
                ratio=paired(own, plain, lambda run: run.tokens_per_second),
                full_ratio=paired(own, plain, lambda run: run.full_tokens_per_second),
                steady_ratio=paired(own, plain, lambda run: run.steady_tokens_per_second),
                end_to_end_ratio=paired(own, plain, lambda run: run.end_to_end_tokens_per_second),
            )
        )
    return rows


def why_not_steady(rows: Sequence[Row], planned: Planned) -> str | None:
    """For the notes, where rows have no steady speed: how many prompts it takes."""
    without = [row.contender for row in rows if row.steady is None]
    if not without:
        return None
    requests, concurrency = rows[0].requests, rows[0].concurrency
    if not planned.is_steady:
        return f"no steady run, which takes at least {takes_at_least(concurrency)} prompts: {requests} requests ran"
    return (
        f"no steady speed of {', '.join(without)}: of {requests} requests a place stayed empty before the first "
        f"{concurrency} had been prefilled; it takes more prompts, or longer replies"
    )


def paired(own: Sequence[Run], plain: Sequence[Run] | None, speed: Callable[[Run], float | None]) -> Interval | None:
    """The ratio of a contender's speed to another's, run by run; None where there is no other, or no such speed."""
    if plain is None or plain is own:
        return None
    pairs = [(speed(mine), speed(other)) for mine, other in zip(own, plain, strict=True)]
    return Interval.where_measured([mine / other if mine and other else None for mine, other in pairs])
