"""When a request's tokens came, in the metrics' terms: kept by the engine's thread, one record a prompt."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.metrics import Metrics, StepTokens
from medusa import EngineStats, Output


@dataclass(frozen=True)
class StepSpan:
    """One step of the engine: when it ran, and what the engine had counted before and after it."""

    started: float
    ended: float
    before: EngineStats
    after: EngineStats


@dataclass
class Timing:
    """Of one submission, in seconds since it: when the step of its first token began and ended, and when the latest of
    its replies ended. The engine's thread writes each before it hands over the output that it is about."""

    waited_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None

    def began(self, waited_s: float, first_token_s: float) -> None:
        """One of its prompts; the first counts."""
        if self.first_token_s is None:
            self.waited_s, self.first_token_s = waited_s, first_token_s


class RequestRecord:
    """The life of one prompt's n replies. The prefill's token begins a reply; every later output is a decode step's.

    `timing` is that of the submission, which may have more prompts.
    """

    def __init__(self, submitted: float, prompt_tokens: int, timing: Timing) -> None:
        self.prompt_tokens = prompt_tokens
        self._submitted = submitted
        self._timing = timing
        self._last: dict[int, float] = {}  # by reply: when its latest tokens came

    @property
    def has_begun(self) -> bool:
        return bool(self._last)

    def output(self, output: Output, step: StepSpan, metrics: Metrics, tokens: StepTokens) -> None:
        """`tokens` adds up what the step gave, for whoever records it as a whole."""
        last = self._last.get(output.index)
        count = len(output.token_ids)
        if last is None:
            if not self.has_begun:
                waited_s, first_token_s = max(0.0, step.started - self._submitted), step.ended - self._submitted
                self._timing.began(waited_s, first_token_s)
                metrics.began(waited_s=waited_s, first_token_s=first_token_s, prompt_tokens=self.prompt_tokens)
        elif count:
            tokens.seconds_each.append((step.ended - last) / count)
            tokens.drafted(output.num_draft_accepted)
        tokens.tokens += count
        if count:
            self._last[output.index] = step.ended
        if output.finished is not None:
            self._timing.ended_s = step.ended - self._submitted
            metrics.finished(output.finished, self._timing.ended_s)
