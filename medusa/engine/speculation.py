"""How much to speculate: the tree with the most expected tokens a second, from measured step times and acceptance."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medusa.checkpoint import CheckpointMeta
from medusa.tree import TokenTree, expected_tokens

Choose = Callable[[int], TokenTree]  # the tree of a step, by the number of sequences in it


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one decode step on this machine by (batch size, tree nodes); 1 node is plain decoding, no heads."""

    seconds: Mapping[tuple[int, int], float]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("step times are empty; measure at least one batch size and tree")

    def lookup(self, batch_size: int, num_nodes: int) -> float:
        """The step's time: linear between the measured sizes, proportional beyond the largest, the smallest's below."""
        batches = sorted({batch for batch, _ in self.seconds})
        upper = batches[min(bisect_left(batches, batch_size), len(batches) - 1)]
        lower = max((batch for batch in batches if batch <= batch_size), default=upper)
        low, high = self._at_batch(lower, num_nodes), self._at_batch(upper, num_nodes)
        if batch_size > upper:
            return high * batch_size / upper
        return low if upper == lower else low + (high - low) * (batch_size - lower) / (upper - lower)

    def _at_batch(self, batch_size: int, num_nodes: int) -> float:
        sizes = sorted(nodes for batch, nodes in self.seconds if batch == batch_size)
        upper = sizes[min(bisect_left(sizes, num_nodes), len(sizes) - 1)]
        lower = max((size for size in sizes if size <= num_nodes), default=upper)
        low, high = self.seconds[batch_size, lower], self.seconds[batch_size, upper]
        if num_nodes > upper:
            return high * num_nodes / upper
        return low if upper == lower else low + (high - low) * (num_nodes - lower) / (upper - lower)

    def to_dict(self) -> dict[str, Any]:
        rows = [{"batch": b, "nodes": n, "seconds": t} for (b, n), t in sorted(self.seconds.items())]
        return {"step_times": rows}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StepTimes:
        return cls({(int(r["batch"]), int(r["nodes"])): float(r["seconds"]) for r in content["step_times"]})


@dataclass(frozen=True)
class Policy:
    """Chooses one tree for all sequences of a step by their number. Equal trees for equal input."""

    trees: tuple[TokenTree, ...]
    tokens_per_step: tuple[float, ...]
    step_times: StepTimes

    def choose(self, batch_size: int) -> TokenTree:
        """The tree with the most expected tokens a second; the smaller one where two are equal."""
        speeds = [
            tokens / self.step_times.lookup(batch_size, tree.num_nodes)
            for tree, tokens in zip(self.trees, self.tokens_per_step, strict=True)
        ]
        return self.trees[speeds.index(max(speeds))]


def always(tree: TokenTree) -> Choose:
    """The same tree at any load."""
    return lambda batch_size: tree


def ladder_of(meta: CheckpointMeta) -> tuple[tuple[TokenTree, ...], tuple[float, ...]]:
    """The checkpoint's trees, smallest first and always with the single root, and the tokens a step of each: as
    measured by calibration's walk, else the product estimate. Empty without calibration."""
    if meta.calibration is None or not meta.trees:
        return (), ()
    trees = [TokenTree.from_paths(paths) for paths in meta.trees]
    measured = meta.calibration.tokens_per_step or [expected_tokens(t, meta.calibration.accuracy) for t in trees]
    pairs: dict[TokenTree, float] = {TokenTree.root(): 1.0, **dict(zip(trees, measured, strict=True))}
    ordered: Sequence[TokenTree] = sorted(pairs, key=lambda tree: tree.num_nodes)
    return tuple(ordered), tuple(pairs[tree] for tree in ordered)
