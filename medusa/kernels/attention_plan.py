"""How a launch of `attention.py` is cut, what its nodes may look at, and the room that its splits meet in.

Shapes: B sequences of a step, R batch rows, N nodes a tree (W words of bits), P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

MAX_SPLITS = 64
FEW_SPLITS = 8  # beyond which there are more only where there would be fewer programs than processors
IN_PLACE = 4  # splits of a small tile at most; the last of them to arrive merges them
MOST_SPLITS = 7  # of a tree's small tiles
MAX_ROWS = 64  # query rows of a tile
UNEVEN = 4  # programs a processor below which whole tiles would leave processors idle at the launch's end
PIPELINED = 5  # stages with which two tiles of keys and values are under way, and the pages of those after them
PIPELINED_BYTES = 512  # of one head's key, up to which those tiles fit an A100's shared memory


@dataclass(frozen=True)
class AttentionPlan:
    """How a step's attention is cut: splits of the committed tokens, query rows and cached tokens a tile, the most
    nodes that one sequence brings and how many of them a tile takes, warps and pipeline stages."""

    splits: int
    rows: int
    columns: int
    max_nodes: int
    tree_columns: int = 32
    warps: int = 4
    stages: int = 2
    merged_in_place: int = 2

    @property
    def merges(self) -> bool:
        """Whether the last program of a tile to arrive merges its splits, as up to `merged_in_place` are; more are
        merged by a launch of their own, where more programs share the work."""
        return 1 < self.splits <= self.merged_in_place

    def stages_of(self, head_size: int, element_size: int) -> int:
        """Pipeline stages for a model's keys: large ones (a head of 256 in float32) leave no room for tiles ahead."""
        return self.stages if triton.next_power_of_2(head_size) * element_size <= PIPELINED_BYTES else 2

    @classmethod
    def of(
        cls,
        *,
        batch_size: int,
        num_nodes: int,
        max_nodes: int,
        chain: bool,
        group: int,
        num_kv_heads: int,
        processors: int,
    ) -> AttentionPlan:
        """A plan for trees or for chains. Those for trees were the fastest of what was tried in graphs of a 7B decoder
        on a Hopper GPU, at the shapes of docs/performance.md.

        Tiles fit sequences of up to twice the average of the `num_nodes`; one of more nodes takes several tiles. No
        plan spills registers with heads of 128 in 16 bits, on an A100 either.
        """
        packed = min(max_nodes, triton.cdiv(2 * num_nodes, batch_size)) * group
        heads = batch_size * num_kv_heads
        if chain:
            return cls._of_chains(heads, packed, max_nodes, processors)
        if packed <= 16:
            return cls._of_small_trees(heads, max_nodes, group, processors)
        tiles = heads * triton.cdiv(packed, 16)
        if group > 1 and 0.75 * processors <= IN_PLACE * tiles <= IN_PLACE * processors:
            return cls._of_small_tiles(tiles, processors, max_nodes)
        on_average = heads * triton.cdiv(triton.cdiv(num_nodes, batch_size) * group, 32)  # programs with nodes
        return cls._of_large_trees(on_average, max_nodes, group, processors)

    @classmethod
    def _of_chains(cls, heads: int, packed: int, max_nodes: int, processors: int) -> AttentionPlan:
        """Programs for every multiprocessor about twice over."""
        rows = 16 if packed <= 16 else 32 if packed <= 32 else MAX_ROWS
        splits = _few_splits(heads * triton.cdiv(packed, rows), processors)
        tree_columns = _tree_columns(max_nodes)
        if rows == MAX_ROWS:
            columns, warps = (32, 4) if splits == 1 else (64, 8)
            return cls(splits, rows, columns, max_nodes, tree_columns, warps)
        return cls(splits, rows, 64, max_nodes, tree_columns, stages=PIPELINED)

    @classmethod
    def _of_small_trees(cls, programs: int, max_nodes: int, group: int, processors: int) -> AttentionPlan:
        """One tile of 16 rows a sequence and key-value head: split while all programs run at once, of which a
        multiprocessor holds three; where they do not, in programs so small that it holds more."""
        if programs > 3 * processors:
            return cls(1, 16, 32, max_nodes, tree_columns=16, warps=2, stages=PIPELINED)
        tree_columns = _tree_columns(max_nodes)
        splits = _odd_splits(programs, (3 if group == 1 else 2) * processors)
        return cls(splits, 16, 64, max_nodes, tree_columns, stages=PIPELINED, merged_in_place=IN_PLACE)

    @classmethod
    def _of_large_trees(cls, programs: int, max_nodes: int, group: int, processors: int) -> AttentionPlan:
        """Tiles of 32 rows: while there are few, each gets twice the threads and a multiprocessor of its own."""
        if group == 1 and 2 * programs <= processors:
            splits = _odd_splits(programs, processors)
            return cls(splits, 32, 64, max_nodes, 64, warps=8, stages=PIPELINED, merged_in_place=IN_PLACE)
        splits = _few_splits(programs, processors)
        if splits == 1 and programs < UNEVEN * processors:
            splits = 2
        return cls(splits, 32, 64, max_nodes, stages=PIPELINED)

    @classmethod
    def _of_small_tiles(cls, programs: int, processors: int, max_nodes: int) -> AttentionPlan:
        """Where heads share keys and tiles of 16 rows are fewer than processors, but with all their splits three
        quarters of them at least: they read the keys again, from L2, but each is done sooner."""
        splits = min(IN_PLACE, _power_of_two(2 * processors / programs))
        tree_columns = _tree_columns(max_nodes)
        return cls(splits, 16, 64, max_nodes, tree_columns, stages=PIPELINED, merged_in_place=IN_PLACE)


def _tree_columns(max_nodes: int) -> int:
    """How many of a step's own nodes a tile takes at a time, where it has no reason to take others."""
    return 16 if max_nodes <= 16 else 32


def _odd_splits(programs: int, room: int) -> int:
    """As many as there is room for at once, up to MOST_SPLITS; odd numbers were faster than the next even ones."""
    splits = min(MOST_SPLITS, max(1, room // programs))
    return splits if splits <= 2 else (splits - 1) | 1


def _few_splits(programs: int, processors: int) -> int:
    """For two programs a processor; more than FEW_SPLITS, which take long to merge, only for one a processor."""
    splits = min(MAX_SPLITS, _power_of_two(2 * processors / programs))
    if splits > FEW_SPLITS:
        return max(FEW_SPLITS, min(MAX_SPLITS, _power_of_two(processors / programs)))
    return splits


def _power_of_two(most: float) -> int:
    """The largest that is at most `most`, but at least 1."""
    return 1 << (max(1, int(most)).bit_length() - 1)


@dataclass(frozen=True)
class Rotation:
    """How a step's queries and keys become what is attended to: the nodes' positions, and angles by position (cos and
    sin, half a head each)."""

    position_M: torch.Tensor
    cos_TD: torch.Tensor
    sin_TD: torch.Tensor


@dataclass(frozen=True)
class Visible:
    """Which nodes each sequence of a step brings, and what they see: the committed tokens on its pages, and each other.

    `bits_RNW` and `depth_RN` are kept by batch row; None stands for chains. `rows_B` names each sequence's batch row.
    """

    rows_B: torch.Tensor
    start_B: torch.Tensor
    count_B: torch.Tensor
    length_R: torch.Tensor
    tables_RP: torch.Tensor
    bits_RNW: torch.Tensor | None
    depth_RN: torch.Tensor | None


@dataclass(frozen=True)
class Scratch:
    """What the splits of one launch leave for the one that merges them; launches in one stream may share it."""

    part: torch.Tensor
    lse: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def of(cls, *, heads: int, size: int, processors: int, device: torch.device) -> Scratch:
        """For plans made by `AttentionPlan.of`, over fewer than twice as many nodes as its sequences may bring: splits
        times tiles come to twice the processors at most, of MAX_ROWS rows of one key-value head, or to 2 * UNEVEN times
        the processors, of half as many rows."""
        rows = max(2 * MAX_SPLITS, 2 * UNEVEN * processors * MAX_ROWS // heads)
        return cls(
            part=torch.empty(rows, heads, size, dtype=torch.float32, device=device),
            lse=torch.empty(rows, heads, dtype=torch.float32, device=device),
            arrived=torch.zeros(4096 * processors, dtype=torch.int32, device=device),
        )
