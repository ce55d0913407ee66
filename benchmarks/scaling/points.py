"""What is measured: points of a series by number of workers, their share of linear growth, and time limits."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, Literal

from benchmarks.measure import Interval

AGAIN_S = 30.0  # an alarm that something swallowed comes again

Status = Literal["measured", "cut short", "left out", "failed"]


class LeftOut(Exception):
    """A part that cannot be measured here; the message says why and what it would take."""


class CutShort(Exception):
    """A part that ran out of time; the points it has given stay."""


class PartTimeout(CutShort):
    """The same, in the middle of a measurement."""


@dataclass(frozen=True)
class Point:
    """A series at a number of workers: one value a repeat, in `unit`. `target` is the share of linear growth that is
    aimed at; None: there is nothing to be linear in. `told` are figures beside the values."""

    series: str
    workers: int
    unit: str
    values: tuple[float, ...]
    target: float | None = None
    told: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or min(self.values) <= 0 or self.workers < 1:
            raise ValueError(f"a point needs a worker and values above 0, got {self.workers} and {self.values}")

    @property
    def interval(self) -> Interval:
        return Interval.of(self.values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Point:
        return cls(**{**content, "values": tuple(content["values"])})


def of_linear(point: Point, points: Sequence[Point]) -> Interval | None:
    """The point's values over as many times the one worker's median of the same part. The ends pair the slower quarter
    of the one with the faster of the other, so they are no narrower than the ratio's own. None without a base."""
    base = [other for other in points if other.workers == 1 and other.series == point.series]
    if point.target is None or not base or base[0].unit != point.unit:
        return None
    mine, one = point.interval, base[0].interval
    if point.workers == 1:
        return Interval(1.0, 1.0, 1.0)
    n = point.workers
    return Interval(mine.median / (n * one.median), mine.low / (n * one.high), mine.high / (n * one.low))


class Deadline:
    """A part's time: what is left of it, and a stop before something that would not fit."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def ensure(self, seconds: float, what: str) -> None:
        """Raises CutShort where `what`, which takes about so long, does not fit any more."""
        if self.left < seconds:
            raise CutShort(f"no time for {what}: {max(self.left, 0):.0f} s of the part's time left")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises PartTimeout in the main thread after so many seconds, whatever it waits for; elsewhere it does nothing.
    A timer that ran before goes on afterwards."""
    if math.isinf(seconds) or threading.current_thread() is not threading.main_thread():
        yield
        return
    expired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise KeyboardInterrupt  # the one exception that Ray, waiting, lets a signal's handler raise

    started, handler = time.monotonic(), signal.signal(signal.SIGALRM, expire)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    except KeyboardInterrupt:
        if not expired:
            raise
        raise PartTimeout(f"it did not end within {seconds:.0f} s") from None
    finally:
        left = max(before - (time.monotonic() - started), 0.01) if before else 0.0
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, left)
