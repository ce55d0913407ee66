"""The token tree: which combinations of the heads' guesses one pass checks (Medusa paper, sections 2.1.2 and 2.3.3).

A node is named by the path of ranks that leads to it: `(0, 2)` follows head 0's best guess, then head 1's third.
The root `()` is the model's own last token, so plain decoding is the tree of one node.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Path = tuple[int, ...]
Accuracy = Sequence[Sequence[float]]  # accuracy[head][rank]: how often the head's rank-th guess is the true token


@dataclass(frozen=True)
class TokenTree:
    """A prefix-closed set of paths in topological order: by depth, then by path, the root first.

    Build one with `from_paths`, `root` or `grow`; equal trees compare and hash equal.
    """

    paths: tuple[Path, ...]

    @classmethod
    def root(cls) -> TokenTree:
        """The tree of one node: plain decoding."""
        return cls(((),))

    @classmethod
    def from_paths(cls, paths: Iterable[Sequence[int]]) -> TokenTree:
        """A tree from `medusa_choices`-style paths; the root may be left out.

        Raises ValueError for a repeated path, a negative rank, or a path whose parent is missing.
        """
        wanted = [tuple(int(rank) for rank in path) for path in paths]
        nodes = {path for path in wanted if path}
        if len(nodes) != sum(1 for path in wanted if path):
            repeated = sorted({path for path in wanted if path and wanted.count(path) > 1})
            raise ValueError(f"token tree names the paths {repeated} more than once; list each path once")
        for path in sorted(nodes):
            if min(path) < 0:
                raise ValueError(f"token tree path {path} has a negative rank; ranks count from 0")
            if len(path) > 1 and path[:-1] not in nodes:
                raise ValueError(f"token tree path {path} lacks its parent {path[:-1]}; add it, or drop the path")
        return cls(((), *sorted(nodes, key=lambda path: (len(path), path))))

    def to_list(self) -> list[list[int]]:
        """The paths as JSON-ready lists, without the root; `from_paths` reads them back."""
        return [list(path) for path in self.paths[1:]]

    @property
    def num_nodes(self) -> int:
        return len(self.paths)

    @cached_property
    def depth(self) -> tuple[int, ...]:
        """Each node's distance from the root: its position is the committed length plus its depth."""
        return tuple(len(path) for path in self.paths)

    @cached_property
    def rank(self) -> tuple[int, ...]:
        """Which guess of its head each node takes; -1 for the root."""
        return tuple(path[-1] if path else -1 for path in self.paths)

    @cached_property
    def parent(self) -> tuple[int, ...]:
        """Each node's parent, an index smaller than its own; -1 for the root."""
        index = {path: node for node, path in enumerate(self.paths)}
        return tuple(index[path[:-1]] if path else -1 for path in self.paths)

    @property
    def max_depth(self) -> int:
        """How many heads the tree needs."""
        return self.depth[-1]

    @property
    def max_rank(self) -> int:
        """The largest rank used; -1 for the root alone. The heads must give `max_rank + 1` guesses each."""
        return max(self.rank)

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """Boolean [N, N]: row n marks the nodes that n may attend to, its ancestors and itself."""
        mask = torch.eye(self.num_nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


def grow(accuracy: Accuracy, num_nodes: int) -> TokenTree:
    """The tree of `num_nodes` nodes with the highest expected acceptance (paper, section 2.3.3).

    Nodes never worth anything (value 0) are not added, so the tree can be smaller. A smaller tree is always part of a
    larger one.
    """
    widths = [len(head) for head in accuracy]
    growth = grow_in_order(widths, lambda path: accuracy[len(path) - 1][path[-1]], num_nodes)
    return TokenTree.from_paths(path for path, _ in growth)


def grow_in_order(
    widths: Sequence[int], given_parent: Callable[[Path], float], num_nodes: int
) -> list[tuple[Path, float]]:
    """The best tree's paths and their values, the most valuable first and without the root; every prefix is a tree.

    Adds the best connected node until the budget is spent. A node's value is its parent's times `given_parent(path)`:
    how often it is right where its parent is. Head k offers `widths[k]` guesses.
    """
    if num_nodes < 1:
        raise ValueError(f"a token tree has at least 1 node, got {num_nodes}")
    growth: list[tuple[Path, float]] = []
    frontier: list[tuple[float, Path]] = []

    # A head's accuracy need not fall with rank on a small calibration set, so every sibling is offered at once.
    def offer_children(path: Path, value: float) -> None:
        if len(path) < len(widths):
            for rank in range(widths[len(path)]):
                child = (*path, rank)
                if value * given_parent(child) > 0:
                    heapq.heappush(frontier, (-value * given_parent(child), child))

    offer_children((), 1.0)
    while frontier and len(growth) < num_nodes - 1:
        negative_value, path = heapq.heappop(frontier)
        growth.append((path, -negative_value))
        offer_children(path, -negative_value)
    return growth


def ladder(accuracy: Accuracy, sizes: Sequence[int]) -> list[TokenTree]:
    """Trees grown to each size, ascending, each part of the next; equal ones (growth ran out) appear once."""
    trees = {grow(accuracy, size) for size in sizes}
    return sorted(trees, key=lambda tree: tree.num_nodes)


def expected_tokens(tree: TokenTree, accuracy: Accuracy) -> float:
    """Tokens a step if the heads' accuracies were independent: the sum over nodes of the product along the path.

    The root counts 1, for the model's own token. Heads are not independent; the estimate overstates large trees by
    several percent, so a measured walk is to be preferred where one exists.
    """
    total = 0.0
    for path in tree.paths:
        value = 1.0
        for head, rank in enumerate(path):
            value *= accuracy[head][rank] if head < len(accuracy) and rank < len(accuracy[head]) else 0.0
        total += value
    return total
