"""How long the parts of an engine's start took."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StartTimes:
    """Seconds, one after another: the backbone's weights onto its device; tokenizer and heads; the cache, the graphs
    and the policy's measurements. What was waited for the digest is in them, and told by `Backbone.hashing`."""

    weights_s: float
    heads_s: float
    engine_s: float


class Laps:
    """A clock of parts that follow each other."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or the start."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last
