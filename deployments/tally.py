"""The usage of one HTTP request, while it runs and when it has ended."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from deployments.answers import MedusaUsage, Usage
from deployments.streams import HeadsVersion
from medusa import Completion, Output


class Tally:
    """The usage of one HTTP request over all of its replies, in tokens: a chunk may carry several.

    `log` gets the same figures for the request's log line, when they are final.
    """

    def __init__(self, prompt_tokens: int, heads: HeadsVersion, log: MutableMapping[str, Any] | None = None) -> None:
        self.prompt_tokens = prompt_tokens
        self._heads = heads
        self._log = log if log is not None else {}
        self._tokens: dict[int, int] = {}
        self._decoded: dict[int, tuple[int, int]] = {}  # tokens of decode steps, and those steps
        self._finished: list[Completion] = []

    def add(self, choice: int, output: Output) -> None:
        before = self._tokens.get(choice, 0)
        decoded, steps = self._decoded.get(choice, (0, 0))
        gained = len(output.token_ids) - (before == 0)  # a reply's first token is the prefill's
        self._tokens[choice] = before + len(output.token_ids)
        self._decoded[choice] = (decoded + gained, steps + gained - output.num_draft_accepted)
        if (end := output.finished) is not None:
            self._tokens[choice] = len(end.token_ids)
            self._decoded[choice] = (sum(end.accepted_per_step), end.num_steps)
            self._finished.append(end)

    @property
    def completion_tokens(self) -> int:
        return sum(self._tokens.values())

    @property
    def finished(self) -> Sequence[Completion]:
        """The replies that have ended, in that order."""
        return self._finished

    def so_far(self) -> Usage:
        tokens, steps = (sum(column) for column in zip(*self._decoded.values(), strict=True))
        return self._usage(tokens, steps)

    def total(self) -> Usage:
        accepted = [count for completion in self._finished for count in completion.accepted_per_step]
        usage = self._usage(sum(accepted), len(accepted))
        depths = range(1, max(accepted, default=1))
        usage.medusa.accepted_per_depth = [sum(count > depth for count in accepted) for depth in depths]
        self._log |= {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "steps": usage.medusa.steps,
            "heads_version": self._heads.version,
            "finish_reasons": [completion.finish_reason for completion in self._finished],
        }
        return usage

    def _usage(self, decoded: int, steps: int) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            medusa=MedusaUsage(
                steps=steps,
                accepted_tokens=decoded,
                mean_acceptance_length=decoded / steps if steps else 1.0,
                heads_version=self._heads.version,
            ),
        )
