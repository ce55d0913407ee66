"""How long a launch may wait for requests that are on their way.

The engine launches a step while the device still runs the one before. What is launched right away leaves a request that
comes a moment later to wait for a whole step more; what is launched too late leaves the device idle.
"""

from __future__ import annotations

from collections import deque

MIN_RESERVE_S = 0.002  # by which launches stay ahead of the device: threads may take so long to change places
RESERVE = 0.2  # ... and by this share of a step
LATE_S = 0.0003  # who waits less has found the device done, since when is not known
REMEMBERED = 16  # steps; the one with the least room decides, as steps that take requests in need more of the host


class Holding:
    """`seconds` is how long to hold the next launch: 0 beside a device that the host does not run ahead of (a CPU)."""

    def __init__(self) -> None:
        self._rooms: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def seconds(self) -> float:
        return max(0.0, min(self._rooms)) if len(self._rooms) == REMEMBERED else 0.0

    def stepped(self, step_s: float, held_s: float, waited_s: float) -> None:
        """After a step of `step_s`, launched `held_s` later than it could have been, that then waited `waited_s` for
        the device: by both together its launch could have been later still, unless it was late already."""
        reserve = max(MIN_RESERVE_S, RESERVE * (held_s + step_s))
        self._rooms.append(held_s + waited_s - reserve if waited_s > LATE_S else 0.0)
