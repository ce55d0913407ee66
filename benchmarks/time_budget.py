"""Sharing out a benchmark's time among the races to come."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass
class TimeBudget:
    """`weights` are those of the races to come, in order. Without a time at which to end there are no shares."""

    ends_at: float | None  # of time.monotonic
    weights: list[float]

    def share(self, reserved_s: float = 0.0) -> float | None:
        """Seconds for the next race: its part of what is left, less what other work before the end will take."""
        ahead = sum(self.weights)
        weight = self.weights.pop(0)
        if self.ends_at is None:
            return None
        left = self.ends_at - time.monotonic() - reserved_s
        return max(left, 0.0) * weight / ahead
