"""What a decode step costs on this machine: seconds by batch size, nodes in all, and tokens of context."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

CONTEXT = 128  # tokens a sequence, where a profile does not say

Shape = tuple[int, int, int]  # sequences, nodes of all their trees together, committed tokens of each sequence
_Curve = dict[int, float]  # seconds by nodes in all


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one decode step by `Shape`; a shape with one node a sequence is plain decoding, without heads."""

    seconds: Mapping[Shape, float]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("step times are empty; measure at least one batch size and tree")
        for (batch, total, context), seconds in self.seconds.items():
            if batch < 1 or total < batch or context < 0 or not seconds > 0:
                raise ValueError(
                    f"a step of {batch} sequences, {total} nodes in all and {context} tokens of context cannot take "
                    f"{seconds} s; a step has a sequence or more, a node or more for each, and takes time"
                )

    @classmethod
    def of_uniform_trees(cls, seconds: Mapping[tuple[int, int], float], context: int = CONTEXT) -> StepTimes:
        """From times by (batch size, nodes of every sequence's tree)."""
        return cls({(batch, batch * nodes, context): time for (batch, nodes), time in seconds.items()})

    def lookup(self, batch: int, num_nodes: int, context: int = CONTEXT) -> float:
        """A step in which each sequence has a tree of `num_nodes` nodes."""
        return self.at(batch, batch * num_nodes, context)

    def at(self, batch: int, total: int, context: int = CONTEXT) -> float:
        """A step of `batch` sequences with `total` nodes together.

        Linear between the measured shapes (batch sizes are compared at the same nodes a sequence), the smallest's time
        below them; beyond the largest in proportion to batch and nodes, and along the last slope of the context. Each
        batch size is asked at the contexts that it was measured with.
        """
        lower, upper = _around(sorted(self._curves), batch)
        low = self._at_batch(lower, total * lower / batch, context)
        high = self._at_batch(upper, total * upper / batch, context)
        return high * batch / upper if batch > upper else _between(lower, low, upper, high, batch)

    def to_dict(self) -> dict[str, Any]:
        rows = [{"batch": b, "total": n, "context": c, "seconds": t} for (b, n, c), t in sorted(self.seconds.items())]
        return {"step_times": rows}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StepTimes:
        """Reads `to_dict`'s form, and the older one with `nodes` of every sequence's tree and no context."""
        return cls(dict(_read_row(row) for row in content["step_times"]))

    @cached_property
    def _curves(self) -> dict[int, dict[int, _Curve]]:
        """By batch size, then context."""
        curves: dict[int, dict[int, _Curve]] = {}
        for (batch, total, context), seconds in sorted(self.seconds.items()):
            curves.setdefault(batch, {}).setdefault(context, {})[total] = seconds
        return curves

    def _at_batch(self, batch: int, total: float, context: int) -> float:
        curves = self._curves[batch]
        contexts = sorted(curves)
        lower, upper = _around(contexts, context)
        if context > contexts[-1] and len(contexts) > 1:
            lower = contexts[-2]
        low, high = _along(curves[lower], total), _along(curves[upper], total)
        if context > contexts[-1]:
            slope = max(0.0, (high - low) / (upper - lower)) if upper > lower else 0.0
            return high + slope * (context - upper)
        return _between(lower, low, upper, high, context)


def _read_row(row: Mapping[str, Any]) -> tuple[Shape, float]:
    batch = int(row["batch"])
    total = int(row["total"]) if "total" in row else batch * int(row["nodes"])
    return (batch, total, int(row.get("context", CONTEXT))), float(row["seconds"])


def _along(curve: _Curve, total: float) -> float:
    lower, upper = _around(sorted(curve), total)
    return curve[upper] * total / upper if total > upper else _between(lower, curve[lower], upper, curve[upper], total)


def _around(sizes: list[int], size: float) -> tuple[int, int]:
    """The measured sizes on both sides; the same one twice at and beyond the ends."""
    above = bisect_right(sizes, size)
    lower = sizes[max(above - 1, 0)]
    return (lower, lower) if lower == size else (lower, sizes[min(above, len(sizes) - 1)])


def _between(lower: int, low: float, upper: int, high: float, size: float) -> float:
    return low if upper <= lower or size <= lower else low + (high - low) * (size - lower) / (upper - lower)
