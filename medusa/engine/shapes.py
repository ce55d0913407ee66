"""The sizes of a decoding step: few, so that what the start measures is all that serving needs.

A step takes the smallest shape that holds it. Its sequences and its nodes are rounded up; whether heads guess after it,
and how large one sequence's tree may be, follow from those two wherever the policy chooses. So the graphs of all
steps that it can choose are captured while the engine starts, and none while requests wait.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Items
from dataclasses import dataclass

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BUDGETS = (4, 8, 16, 32, 64, 96, 128, 192, 256)  # nodes in all, that the policy chooses among
MORE_NODES = 256  # beyond those budgets, the number of nodes is rounded up to a multiple of this
SMALL_TREE = 16  # one tree's nodes are rounded up to this, or to a multiple of TREE_ROOM
TREE_ROOM = 64  # a row's tree has room for a multiple of this


@dataclass(frozen=True)
class Shape:
    """The size of a step: sequences and nodes in all, most nodes of one sequence, and whether heads guess after it."""

    batch: int
    nodes: int
    max_nodes: int
    guesses: bool

    @property
    def moves(self) -> bool:
        """Whether accepted nodes may lie apart from the committed ones."""
        return self.max_nodes > 1


@dataclass(frozen=True)
class Buckets:
    """The shapes that a runner has: batch sizes, and nodes of all trees together (with uniform trees: of each).

    A step takes the smallest batch size that holds it, and costs what that shape costs. Without batch sizes a step is
    exactly as large as its batch. `trees` are the sizes that the largest tree of a step is rounded up to: one that so
    many nodes a sequence would fill has no larger tree. Without them any tree goes with any shape.
    """

    nodes: tuple[int, ...]
    batches: tuple[int, ...] = ()
    trees: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("nodes", "batches", "trees"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or (sizes and sizes[0] < 1):
                raise ValueError(f"buckets list sizes from 1 up, ascending and each once, got {name}={sizes}")

    def batch(self, batch: int) -> int:
        """The bucket of this many sequences."""
        if not self.batches:
            return batch
        if batch > self.batches[-1]:
            raise ValueError(f"{batch} sequences do not fit the largest batch bucket, {self.batches[-1]}")
        return self.batches[bisect_left(self.batches, batch)]

    def largest_tree(self, batch: int, nodes: int) -> int | None:
        """The most nodes of one sequence in a step of these buckets; None for any number."""
        return next((size for size in self.trees if nodes <= batch * size), None)


class StepShapes:
    """The shapes of an engine of up to `max_batch_size` sequences with trees of up to `max_tree_nodes`."""

    def __init__(self, max_batch_size: int, max_tree_nodes: int) -> None:
        batches = (*(size for size in BATCHES if size < max_batch_size), max_batch_size)
        most = max_batch_size * max_tree_nodes
        self._nodes = (*BUDGETS, *range(BUDGETS[-1] + MORE_NODES, most + MORE_NODES, MORE_NODES))
        trees = (SMALL_TREE, *range(TREE_ROOM, max_tree_nodes + TREE_ROOM, TREE_ROOM))
        self.buckets = Buckets(BUDGETS, batches, trees)

    def of(self, counts: Items[int], guesses: bool) -> Shape:
        """The shape of a step whose sequences have so many nodes each."""
        batch, largest = self.buckets.batch(len(counts)), max(counts)
        if largest == 1:
            return Shape(batch, batch, 1, guesses)
        room = SMALL_TREE if largest <= SMALL_TREE else rounded_up(largest, TREE_ROOM)
        # A step with a large tree is measured where it has more nodes than small ones would fill; it may have fewer
        # since some of its sequences have ended.
        least = batch + 1 if room == SMALL_TREE else batch * SMALL_TREE + 1
        nodes = self._rounded(max(sum(counts), least))
        return Shape(batch, nodes, max(room, self.buckets.largest_tree(batch, nodes) or 0), guesses)

    def _rounded(self, nodes: int) -> int:
        return self._nodes[bisect_left(self._nodes, nodes)]


def rounded_up(size: int, multiple: int) -> int:
    """To the next multiple, or as it is where it is one."""
    return -(-size // multiple) * multiple
