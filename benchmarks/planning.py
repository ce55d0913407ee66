"""How much a race runs: a probe warms the contenders up and tells how long a run takes, and a budget decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.contenders import Contender
from benchmarks.steady import MIN_WAVES, takes_at_least
from benchmarks.workload import Request, waves_of

PROBE_TOKENS = 12  # replies of the warm-up, from which a run's time is estimated
MIN_REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run: of each wave, of a wave's requests in the steady run, and what that run's end adds, where fewer
    and fewer requests are left. The last two are 0 where there is none."""

    wave_s: float
    steady_s: float = 0.0
    end_s: float = 0.0

    @classmethod
    def total(cls, estimates: Sequence[Estimate]) -> Estimate:
        """Of contenders that run one after the other."""
        return cls(
            sum(each.wave_s for each in estimates),
            sum(each.steady_s for each in estimates),
            sum(each.end_s for each in estimates),
        )

    @property
    def is_steady(self) -> bool:
        return self.steady_s > 0

    def seconds(self, waves: int) -> float:
        """Of a run of so many waves, with a steady run of their requests where they are enough for one."""
        return waves * self.wave_s + (waves * self.steady_s + self.end_s if waves >= MIN_WAVES else 0.0)


@dataclass(frozen=True)
class Planned:
    """How much is run at one concurrency: waves a run, runs of each contender."""

    waves: int
    repeats: int
    seconds: float
    note: str | None = None

    @property
    def is_steady(self) -> bool:
        """Whether the waves' requests are enough for a steady run."""
        return self.waves >= MIN_WAVES


def probe(contender: Contender, requests: Sequence[Request], concurrency: int) -> Estimate:
    """Runs a short wave twice: the first warms up (compilation, graphs, caches), the second tells how long a whole
    wave will take: one whose longest reply is as long as those of all waves are on average. Then a short steady run
    twice, where there are requests for it."""
    temperature = contender.temperature
    waves = waves_of(requests, temperature, concurrency, 1)
    contender.run(waves, PROBE_TOKENS)
    run = contender.run(waves, PROBE_TOKENS)
    probed = min(_mean_longest(waves, temperature), PROBE_TOKENS)
    token_s = run.decode_seconds / max(1, probed - 1)
    every = waves_of(requests, temperature, concurrency, most_waves(len(requests), concurrency))
    wave_s = run.prefill_seconds + token_s * max(1, _mean_longest(every, temperature) - 1)
    if len(requests) < takes_at_least(concurrency):
        return Estimate(wave_s)
    prefill_s = _steady_prefill(contender, requests, concurrency, token_s)
    if prefill_s is None:
        return Estimate(wave_s)
    lengths = [request.lengths[temperature] for request in requests]
    mean = float(np.mean(lengths))
    # When the queue is empty the longest reply may be at its start, all together have about half their tokens left.
    return Estimate(wave_s, prefill_s + token_s * mean, token_s * (max(lengths) - mean / 2))


def _steady_prefill(
    contender: Contender, requests: Sequence[Request], concurrency: int, token_s: float
) -> float | None:
    """The seconds that requests which join one by one add to a steady run, for as many as are in a wave: what a run of
    short replies takes beyond its tokens. None from a contender that has no steady run."""
    queue = _short(requests[: takes_at_least(concurrency)], contender.temperature)
    contender.run_steady(queue, concurrency)
    steady = contender.run_steady(queue, concurrency)
    if steady is None:
        return None
    tokens_s = token_s * sum(request.lengths[contender.temperature] for request in queue) / concurrency
    return max(0.0, steady.whole_seconds - tokens_s) / MIN_WAVES


def _short(requests: Sequence[Request], temperature: float) -> list[Request]:
    """With replies of two tokens, three, and so on, so that they end, and others join, one by one."""
    lengths = [2 + i % PROBE_TOKENS for i in range(len(requests))]
    return [
        replace(request, lengths={temperature: min(length, request.lengths[temperature])})
        for request, length in zip(requests, lengths, strict=True)
    ]


def _mean_longest(waves: Sequence[Sequence[Request]], temperature: float) -> float:
    return float(np.mean([max(request.lengths[temperature] for request in wave) for wave in waves]))


def most_waves(num_requests: int, concurrency: int) -> int:
    """That use each request once; one at least."""
    return max(1, num_requests // concurrency)


def plan(estimate: Estimate, concurrency: int, num_requests: int, repeats: int, budget: float | None) -> Planned:
    """As many waves as use each request once, or fit the budget (seconds of all runs at this concurrency); one at
    least. Where not even one fits, or too few for a steady run, fewer repeats, MIN_REPEATS at least."""
    most = most_waves(num_requests, concurrency)
    if budget is None:
        return Planned(most, repeats, repeats * estimate.seconds(most))
    waves, fitting_repeats = _fitting(estimate, most, repeats, budget)
    expected = fitting_repeats * estimate.seconds(waves)
    note = None
    if waves < most:
        note = (
            f"{waves * concurrency} of {num_requests} prompts and {fitting_repeats} runs, for a budget of "
            f"{budget:.0f} s (about {expected:.0f} s expected)"
        )
    return Planned(waves, fitting_repeats, expected, note)


def _fitting(estimate: Estimate, most: int, repeats: int, budget: float) -> tuple[int, int]:
    """Waves and repeats: all repeats where a steady run fits with them, else as many as it fits with, else as many as
    one wave does."""
    for least in (MIN_WAVES, 1) if estimate.is_steady else (1,):
        for fewer in range(repeats, MIN_REPEATS - 1, -1):
            fitting = [waves for waves in range(least, most + 1) if fewer * estimate.seconds(waves) <= budget]
            if fitting:
                return fitting[-1], fewer
    return 1, MIN_REPEATS
