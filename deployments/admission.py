"""Which requests a replica takes: those that its batch and a bounded queue hold, by replies, pages and prompt tokens.

A refusal is at once and says when to come back, so that what was admitted keeps its latency under any load.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

MAX_RETRY_S = 60


class QueueFull(RuntimeError):
    """More waits than allowed; the same request may be sent again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Demand:
    """What one HTTP request asks for: replies (prompts x n), the pages they can come to need, and prompt tokens."""

    replies: int
    pages: int = 0
    prompt_tokens: int = 0

    def __add__(self, other: Demand) -> Demand:
        return Demand(self.replies + other.replies, self.pages + other.pages, self.prompt_tokens + other.prompt_tokens)

    def __sub__(self, other: Demand) -> Demand:
        return self + Demand(-other.replies, -other.pages, -other.prompt_tokens)


@dataclass(frozen=True)
class Bounds:
    """`batch` replies are decoded at once and `queue` more may wait. Pages bound the same thing for long requests: what
    waits may need no more than the same share of the cache. `prompt_tokens` bounds the prompts that wait, if given."""

    batch: int
    queue: int
    pages: int
    prompt_tokens: int | None = None

    @property
    def replies(self) -> int:
        return self.batch + self.queue

    @property
    def demanded_pages(self) -> int:
        return self.pages * self.replies // self.batch


class Admission:
    """Not thread-safe: its owner holds a lock. `held` is the demand of everything admitted that has not left;
    `held.prompt_tokens` counts only prompts whose reply has not begun."""

    def __init__(self, bounds: Bounds, now: Callable[[], float] = time.monotonic) -> None:
        self.bounds = bounds
        self.held = Demand(0)
        self._now = now
        self._left: deque[float] = deque(maxlen=64)  # when the latest replies left

    def admit(self, demand: Demand) -> None:
        """Raises QueueFull, or ValueError for what would not fit into an empty replica."""
        self._check_possible(demand)
        after, bounds = self.held + demand, self.bounds
        if after.replies > bounds.replies:
            raise self._full("places", self.held.replies, bounds.replies, demand.replies)
        if self.held.replies and after.pages > bounds.demanded_pages:
            raise self._full("pages", self.held.pages, bounds.demanded_pages, demand.pages)
        limit = bounds.prompt_tokens
        if limit is not None and self.held.prompt_tokens and after.prompt_tokens > limit:
            raise self._full("prompt tokens", self.held.prompt_tokens, limit, demand.prompt_tokens)
        self.held = after

    def began(self, prompt_tokens: int) -> None:
        """The reply to a prompt of so many tokens has its first token: the prompt waits no more."""
        self.held -= Demand(0, 0, prompt_tokens)

    def release(self, demand: Demand) -> None:
        """What is left of an admitted demand has gone."""
        self.held -= demand
        self._left.extend([self._now()] * min(demand.replies, 64))

    def retry_after_s(self, replies: int) -> int:
        """When so many replies will have left, at the rate of the latest ones."""
        if len(self._left) < 2:
            return 1
        spell = self._now() - self._left[0]
        return max(1, min(MAX_RETRY_S, math.ceil(replies * spell / len(self._left))))

    def _check_possible(self, demand: Demand) -> None:
        if demand.replies > self.bounds.replies:
            raise ValueError(
                f"the request asks for {demand.replies} replies (prompts x n), this service holds "
                f"{self.bounds.replies} at once; split it into several requests"
            )

    def _full(self, what: str, taken: int, limit: int, needed: int) -> QueueFull:
        message = f"{taken} of {limit} {what} are taken and the request needs {needed}; send it again in a moment"
        return QueueFull(message, self.retry_after_s(1))
