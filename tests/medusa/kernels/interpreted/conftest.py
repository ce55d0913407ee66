"""Random steps to test the kernels on, in Triton's interpreter (../test_interpreted.py runs this folder).

With MEDUSA_KERNEL_DEVICE=cuda and without TRITON_INTERPRET the same tests run the compiled kernels: every launch then
takes copies of its tensors on that device (../on_device.py).
"""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from medusa.decoding import TreeBatch
from medusa.kernels.state import Drafts, Emitted, RowState, Trees
from tests.medusa.kernels.on_device import on_device

CPU = torch.device("cpu")
POISON = -7777
LAUNCHES = {
    "draft": ["draft"],
    "cut": ["find_cuts"],
    "sample": ["sample", "reduce_samples"],
    "walk": ["walk", "walk_typical"],
    "compact": ["compact"],
    "topk": ["topk"],
    "attention": ["attend"],
    "matmul": ["matmul", "gated", "product"],
    "norm": ["add_norm"],
    "rope": ["rope_write"],
    "gate": ["silu_mul"],
    "path": ["plan_paths", "read_paths", "take_guesses"],
    "seen": ["see", "add_silu"],
}


if device := os.environ.get("MEDUSA_KERNEL_DEVICE"):
    for module_name, names in LAUNCHES.items():
        module = importlib.import_module(f"medusa.kernels.{module_name}")
        for name in names:
            setattr(module, name, on_device(getattr(module, name), device))


@dataclass
class Step:
    """A random step: some live rows, some dead, padding at the end, trees of different shapes and counts."""

    rows_B: torch.Tensor
    count_B: torch.Tensor
    trees: Trees
    state: RowState
    num_flat: int

    @property
    def counts(self) -> list[int]:
        return self.count_B.tolist()

    def emitted(self, num_depths: int) -> Emitted:
        return poisoned(Emitted.empty(len(self.rows_B), num_depths, CPU))

    def drafts(self) -> Drafts:
        return poisoned(Drafts.empty(self.num_flat, len(self.rows_B), CPU))

    def copy_state(self) -> RowState:
        return RowState(**{field.name: getattr(self.state, field.name).clone() for field in fields(RowState)})

    def batch(self, b: int) -> TreeBatch:
        """Sequence b's tree as medusa.decoding takes it; nodes of too deep heads are not valid."""
        row, count = int(self.rows_B[b]), self.counts[b]
        depth = self.trees.depth_RN[row, :count].long()
        parent = self.trees.parent_RN[row, :count].long()
        ancestors = torch.eye(count, dtype=torch.bool)
        for node in range(1, count):
            if parent[node] >= 0:
                ancestors[node] |= ancestors[parent[node]]
        return TreeBatch(
            parent_BN=parent.clamp(min=0)[None],
            depth_BN=depth[None],
            rank_BN=self.trees.rank_RN[row, :count].long().clamp(min=0)[None],
            valid_BN=(depth <= self.state.num_guessed_R[row])[None],
            ancestors_BNN=ancestors[None],
            max_depth=int(depth.max()),
        )


def poisoned(buffers: Any) -> Any:
    """The same buffers, every element wrong, so that what a kernel leaves unwritten shows."""
    for field in fields(buffers):
        getattr(buffers, field.name).fill_(POISON)
    return buffers


def random_parents(rng: random.Random, num_nodes: int, heads: int, width: int) -> list[tuple[int, ...]]:
    """Paths in growth order: any parent first, siblings in the order of their ranks."""
    paths: list[tuple[int, ...]] = [()]
    while len(paths) < num_nodes:
        parents = [path for path in paths if len(path) < heads and (*path, width - 1) not in paths]
        if not parents:
            break
        parent = rng.choice(parents)
        paths.append((*parent, sum(path[:-1] == parent for path in paths if path)))
    return paths


def write_tree(trees: Trees, row: int, paths: Sequence[tuple[int, ...]]) -> None:
    index = {path: node for node, path in enumerate(paths)}
    for node, path in enumerate(paths):
        trees.depth_RN[row, node] = len(path)
        if path:
            parent = index[path[:-1]]
            trees.parent_RN[row, node], trees.rank_RN[row, node] = parent, path[-1]
            trees.bits_RNW[row, node] |= trees.bits_RNW[row, parent]


def random_step(
    seed: int, *, batch: int = 5, room: int = 64, heads: int = 3, width: int = 3, stops: int = 3, vocab: int = 7
) -> Step:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_rows = batch + 3
    state = RowState.empty(num_rows, heads, width, stops, CPU)
    trees = Trees.roots(num_rows, room, heads, CPU)
    for row in range(num_rows):
        write_tree(trees, row, random_parents(rng, rng.choice([1, 2, 9, room]), heads, width))
    state.root_R.random_(0, vocab, generator=generator)
    state.guesses_RKS.copy_(torch.rand(num_rows, heads, vocab, generator=generator).argsort(-1)[..., :width])
    state.num_guessed_R.random_(0, heads + 1, generator=generator)
    state.length_R.random_(0, 90, generator=generator)
    state.live_R.copy_(torch.tensor([rng.random() < 0.8 for _ in range(num_rows)]))
    state.live_R[-1] = 0
    state.remaining_R.random_(1, 9, generator=generator)
    state.num_output_R.random_(0, 6, generator=generator)
    state.min_tokens_R.random_(0, 8, generator=generator)
    state.stop_ids_RE.random_(-1, 2 * vocab, generator=generator)
    state.seed_R.copy_(torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=generator))
    state.choice_R.random_(0, 4, generator=generator)
    rows = rng.sample(range(num_rows - 1), batch - 1) + [num_rows - 1]
    used = [int((trees.depth_RN[row] <= heads).sum()) for row in rows]
    counts = [rng.randint(1, most) for most in used[:-1]] + [0]
    return Step(
        torch.tensor(rows, dtype=torch.int32),
        torch.tensor(counts, dtype=torch.int32),
        trees,
        state,
        sum(counts) + rng.choice([0, 1, 40]),
    )


@pytest.fixture
def make_step() -> Callable[..., Step]:
    return random_step
