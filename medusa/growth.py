"""The tree in the order it grows, and what each node is worth: what a step's budget of nodes is spent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod

from medusa.checkpoint import Calibration, CheckpointMeta
from medusa.tree import Path, TokenTree


@dataclass(frozen=True)
class GrownTree:
    """Paths without the root, the most valuable first, so that every prefix is a tree; and each node's gain: how many
    tokens a step it adds, which is how often the model says just what its path says. Gains never rise."""

    paths: tuple[Path, ...]
    gains: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.paths) != len(self.gains):
            raise ValueError(f"{len(self.paths)} paths came with {len(self.gains)} gains; each node needs one")
        if any(later > sooner for sooner, later in zip(self.gains, self.gains[1:], strict=False)):
            raise ValueError(f"gains must not rise from node to node, got {self.gains}")
        for size in range(len(self.paths) + 1):
            TokenTree.from_paths(self.paths[:size])  # raises where a parent comes after its child

    @property
    def max_nodes(self) -> int:
        return len(self.paths) + 1

    @cached_property
    def trees(self) -> tuple[TokenTree, ...]:
        """The trees of 1, 2, .. max_nodes nodes."""
        return tuple(TokenTree.from_paths(self.paths[:size]) for size in range(self.max_nodes))

    def tree(self, num_nodes: int) -> TokenTree:
        return self.trees[num_nodes - 1]

    @cached_property
    def tokens_per_step(self) -> tuple[float, ...]:
        """Expected tokens of a step with the tree of 1, 2, .. nodes."""
        return tuple(accumulate(self.gains, initial=1.0))


def grown_tree(meta: CheckpointMeta) -> GrownTree | None:
    """The checkpoint's tree and gains; None without calibration.

    Gains are how often whole paths were right, where calibration counted that, else products of head accuracies (which
    promise too much); both are scaled between the sizes whose tokens a step were measured, so as to sum to them.
    """
    calibration = meta.calibration
    if calibration is None or not meta.trees:
        return None
    trees = [TokenTree.from_paths(paths) for paths in meta.trees]
    paths = [tuple(path) for path in calibration.growth]
    if not paths:
        paths = _order_of(max(trees, key=lambda tree: tree.num_nodes), calibration)
    gains = list(calibration.path_accuracy) or [_product(path, calibration) for path in paths]
    measured = {
        tree.num_nodes: tokens
        for tree, tokens in zip(trees, calibration.tokens_per_step, strict=False)
        if TokenTree.from_paths(paths[: tree.num_nodes - 1]) == tree
    }
    return GrownTree(tuple(paths), tuple(non_increasing(fit_gains(gains, measured))))


def fit_gains(gains: Sequence[float], tokens_per_step: dict[int, float]) -> list[float]:
    """The gains, scaled between one measured tree size and the next so that they sum to what was measured."""
    fitted, start, sum_so_far, scale = list(gains), 0, 1.0, 1.0
    for size, tokens in sorted(tokens_per_step.items()):
        part = gains[start : size - 1]
        if part and sum(part) > 0:
            scale = max(tokens - sum_so_far, 0.0) / sum(part)
            fitted[start : size - 1] = [gain * scale for gain in part]
            start, sum_so_far = size - 1, tokens
    fitted[start:] = [gain * scale for gain in gains[start:]]
    return fitted


def non_increasing(values: Sequence[float]) -> list[float]:
    """The closest values (least squares) that never rise, with the same sum: neighbours that rise share their mean."""
    pools: list[tuple[float, int]] = []  # sum and count
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] * count < total * pools[-1][1]:
            earlier, size = pools.pop()
            total, count = total + earlier, count + size
        pools.append((total, count))
    levelled = [total / count for total, count in pools for _ in range(count)]
    return list(accumulate(levelled, min))  # rounding must not make one rise


def _order_of(tree: TokenTree, calibration: Calibration) -> list[Path]:
    """The tree's own nodes, the most valuable first."""
    return sorted(tree.paths[1:], key=lambda path: (-_product(path, calibration), path))


def _product(path: Path, calibration: Calibration) -> float:
    heads = calibration.accuracy
    return prod(heads[k][rank] if k < len(heads) and rank < len(heads[k]) else 0.0 for k, rank in enumerate(path))
