"""Timing contenders beside each other: a probe that warms up and plans, rotated runs, medians with their quartiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.contenders import Contender, Run
from benchmarks.workload import Request, waves_of

PROBE_TOKENS = 12  # replies of the warm-up, from which a run's time is estimated
MIN_REPEATS = 3

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
class Planned:
    """How much is run at one concurrency: waves a run, runs of each contender."""

    waves: int
    repeats: int
    seconds: float
    note: str | None = None


@dataclass(frozen=True)
class Row:
    """One contender at one concurrency. Speeds are of decoding; `end_to_end` includes the prefill (None for a peer,
    which computes prompts that this engine finds in its cache), `full` and `step_ms` those while every request of a
    wave decodes (None where there was no such step). Ratios are to the plain contender of the same temperature, run by
    run. `nodes` is the mean over steps of the largest tree, `speculating` the share of steps with more than one node a
    sequence."""

    contender: str
    temperature: float
    concurrency: int
    requests: int
    repeats: int
    tokens_per_second: Interval
    end_to_end: Interval | None
    full: Interval | None
    tokens_per_step: float
    step_ms: float | None
    nodes: float
    speculating: float
    ratio: Interval | None
    full_ratio: Interval | None
    end_to_end_ratio: Interval | None
    bandwidth_share: float | None = None
    gpu_idle_share: float | None = None

    def over(self, plain: Row) -> Row:
        """With its ratio to plain decoding that ran at another time of the same process."""
        full = self.full.over(plain.full.median) if self.full and plain.full else None
        return replace(self, ratio=self.tokens_per_second.over(plain.tokens_per_second.median), full_ratio=full)


def probe(contender: Contender, requests: Sequence[Request], concurrency: int) -> float:
    """Runs a short wave twice: the first warms up (compilation, graphs, caches), the second tells how long a whole
    wave will take, in seconds: one whose longest reply is as long as those of all waves are on average."""
    waves = waves_of(requests, contender.temperature, concurrency, 1)
    contender.run(waves, PROBE_TOKENS)
    run = contender.run(waves, PROBE_TOKENS)
    probed = min(_mean_longest(waves, contender.temperature), PROBE_TOKENS)
    every = waves_of(requests, contender.temperature, concurrency, most_waves(len(requests), concurrency))
    longest = _mean_longest(every, contender.temperature)
    return run.prefill_seconds + run.decode_seconds * max(1, longest - 1) / max(1, probed - 1)


def _mean_longest(waves: Sequence[Sequence[Request]], temperature: float) -> float:
    return float(np.mean([max(request.lengths[temperature] for request in wave) for wave in waves]))


def most_waves(num_requests: int, concurrency: int) -> int:
    """That use each request once; one at least."""
    return max(1, num_requests // concurrency)


def plan(seconds_per_wave: float, concurrency: int, num_requests: int, repeats: int, budget: float | None) -> Planned:
    """As many waves as use each request once, or fit the budget (seconds of all runs at this concurrency); one at
    least. Where even one does not fit, fewer repeats, MIN_REPEATS at least."""
    most = most_waves(num_requests, concurrency)
    if budget is None:
        return Planned(most, repeats, most * repeats * seconds_per_wave)
    fitting = int(budget / (repeats * seconds_per_wave))
    waves = min(max(fitting, 1), most)
    if fitting < 1:
        repeats = min(repeats, max(MIN_REPEATS, int(budget / seconds_per_wave)))
    expected = waves * repeats * seconds_per_wave
    note = None
    if waves < most:
        note = (
            f"{waves * concurrency} of {num_requests} prompts and {repeats} runs, for a budget of {budget:.0f} s "
            f"(about {expected:.0f} s expected)"
        )
    return Planned(waves, repeats, expected, note)


def rotated_runs(
    contenders: Sequence[Contender],
    requests: Sequence[Request],
    concurrency: int,
    planned: Planned,
    say: Say,
    budget: float | None = None,
) -> dict[str, list[Run]]:
    """Every contender once a round; each round begins with another, so that none always runs first. After MIN_REPEATS
    no round begins that would end beyond the budget, if it takes as long as those before."""
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
            runs[contender.name].append(contender.run(waves))
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
                tokens_per_step=sum(r.replies_tokens for r in own) / sum(r.replies_steps for r in own),
                step_ms=1e3 * float(np.median(full_steps)) if full_steps else None,
                nodes=float(np.mean([n for run in own for n in run.nodes])),
                speculating=float(np.mean([n > 1 for run in own for n in run.nodes])),
                ratio=_paired(own, plain, lambda run: run.tokens_per_second),
                full_ratio=_paired(own, plain, lambda run: run.full_tokens_per_second),
                end_to_end_ratio=_paired(own, plain, lambda run: run.end_to_end_tokens_per_second),
            )
        )
    return rows


def _paired(own: Sequence[Run], plain: Sequence[Run] | None, speed: Callable[[Run], float | None]) -> Interval | None:
    if plain is None or plain is own:
        return None
    pairs = [(speed(mine), speed(other)) for mine, other in zip(own, plain, strict=True)]
    return Interval.where_measured([mine / other if mine and other else None for mine, other in pairs])
