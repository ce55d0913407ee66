"""How a launch of `attention.py` is cut, what its nodes may look at, and the room that its splits meet in.

Shapes: B sequences of a step, R batch rows, N nodes a tree (W words of bits), P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

MAX_SPLITS = 64
FEW_SPLITS = 8  # beyond which there are more only where there would be fewer programs than processors
IN_PLACE = 4  # splits of a small tile at most that the last of them to arrive merges
MAX_ROWS = 64  # query rows of a tile
CLUSTERS = (8, 4, 3, 2)  # splits that programs of a cluster merge
MAX_PARTS = 8  # of a Hopper GPU, where clusters run
TILE_BYTES = 136 * 1024  # of keys and values that a program may have under way: what an A100 has room for


@dataclass(frozen=True)
class AttentionPlan:
    """How a step's attention is cut: splits of a sequence (a tree's last one takes the step's own nodes alone), query
    rows and cached tokens a tile, the most nodes that one sequence brings and how many of them a tile takes, warps,
    teams of one warp that divide a tile's tokens (1: its warps work on all of them together), tiles of keys and values
    under way, the most splits that are merged without a launch of their own, and whether Hopper's own kernel takes it
    (ring_attention.py), which merges any splits and whose other numbers are fixed."""

    splits: int
    rows: int
    columns: int
    max_nodes: int
    tree_columns: int = 16
    warps: int = 4
    teams: int = 1
    ahead: int = 1
    merged_in_place: int = IN_PLACE
    ring: bool = False

    def __post_init__(self) -> None:
        if self.teams not in (1, 2, 4) or (
            self.teams > 1 and (self.teams != self.warps or self.columns < 16 * self.warps)
        ):
            raise ValueError(
                f"teams are one, or two or four of one warp and at least 16 tokens each; got {self.teams} teams, "
                f"{self.warps} warps and {self.columns} tokens"
            )

    @property
    def merges(self) -> bool:
        """Whether the last program of a tile to arrive merges its splits; otherwise a launch of its own does, in which
        more programs share the work."""
        return 1 < self.splits <= self.merged_in_place

    def stages_of(self, head_size: int, element_size: int) -> int:
        """Pipeline stages: two a tile under way, as its page's number is loaded first; fewer tiles where they are large
        (a head of 256 in float32)."""
        tile = 2 * self.columns * triton.next_power_of_2(head_size) * element_size
        return 1 + 2 * max(1, min(self.ahead, TILE_BYTES // tile))

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
        head_size: int,
        processors: int,
        warpgroups: bool,
        ring: bool = False,
    ) -> AttentionPlan:
        """A plan for trees or for chains. Those for trees were the fastest of what was tried in graphs of a 7B decoder
        on a Hopper GPU, at the shapes of docs/performance.md; heads of more than 128 were not timed. `warpgroups`:
        whether the GPU multiplies tiles of 64 rows by four warps at once, as Hopper's do. `ring`: whether its own
        kernel can read the pages and knows what the model asks of attention.

        Tiles fit sequences of up to twice the average of the `num_nodes`; one of more nodes takes several tiles. No
        plan spills registers with heads of up to 256 in 16 bits, on an A100 either.
        """
        packed = min(max_nodes, triton.cdiv(2 * num_nodes, batch_size)) * group
        heads = batch_size * num_kv_heads
        rows = 16 if packed <= 16 or not (warpgroups or chain) else MAX_ROWS
        programs = heads * triton.cdiv(packed, rows)
        if head_size > 128:
            return cls._of_large_heads(programs, rows, max_nodes, processors)
        if chain:
            return cls._of_chains(programs, rows, max_nodes, processors)
        large = heads * triton.cdiv(packed, MAX_ROWS)
        if ring and max_nodes <= MAX_ROWS and large <= processors:
            splits = _clustered_splits(large, processors)
            return cls(splits, MAX_ROWS, 64, max_nodes, merged_in_place=1, ring=True)
        cut = cls._of_small_tiles if rows == 16 else cls._of_large_tiles
        return cut(programs, max_nodes, processors)

    @classmethod
    def _of_chains(cls, programs: int, rows: int, max_nodes: int, processors: int) -> AttentionPlan:
        """Programs for every multiprocessor about twice over."""
        splits = _few_splits(programs, processors)
        tree_columns = 16 if max_nodes <= 16 else 32
        if rows == MAX_ROWS:
            columns, warps = (32, 4) if splits == 1 else (64, 8)
            return cls(splits, rows, columns, max_nodes, tree_columns, warps, merged_in_place=2)
        return cls(splits, rows, 64, max_nodes, tree_columns, teams=4, ahead=2)

    @classmethod
    def _of_small_tiles(cls, programs: int, max_nodes: int, processors: int) -> AttentionPlan:
        """Tiles of 16 rows: one program a multiprocessor with four tiles under way, where there are few; two with three
        tiles; or as many as fit, with half as many warps each."""
        if programs > 2 * processors:
            return cls(1, 16, 32, max_nodes, warps=2, teams=2, ahead=2)
        alone, paired = processors // programs, 2 * processors // programs
        if alone >= 3:
            return cls(min(FEW_SPLITS, alone), 16, 64, max_nodes, teams=4, ahead=4)
        if paired >= 4:
            return cls(4, 16, 64, max_nodes, teams=4, ahead=3)
        return cls(1, 16, 64, max_nodes, teams=4, ahead=4 if alone else 2)

    @classmethod
    def _of_large_tiles(cls, programs: int, max_nodes: int, processors: int) -> AttentionPlan:
        """Tiles of 64 rows, which are merged by a launch of their own. With heads of 128, three under way take
        more than half of a multiprocessor's shared memory, so that no two programs share one while others have none."""
        alone, paired = processors // programs, 2 * processors // programs
        if alone >= 3:
            return cls(min(FEW_SPLITS, alone), MAX_ROWS, 64, max_nodes, ahead=3, merged_in_place=1)
        splits = 3 if paired >= 3 else 1
        return cls(splits, MAX_ROWS, 64, max_nodes, ahead=3 if splits == 1 and alone else 2, merged_in_place=1)

    @classmethod
    def _of_large_heads(cls, programs: int, rows: int, max_nodes: int, processors: int) -> AttentionPlan:
        """Without teams, each of which would keep sums of whole heads."""
        splits, warps = _few_splits(programs, processors), 4 if rows == 16 else 8
        return cls(splits, rows, 32, max_nodes, warps=warps, ahead=2, merged_in_place=IN_PLACE if rows == 16 else 1)


def _few_splits(programs: int, processors: int) -> int:
    """For two programs a processor; more than FEW_SPLITS, which take long to merge, only for one a processor."""
    splits = min(MAX_SPLITS, _power_of_two(2 * processors / programs))
    if splits > FEW_SPLITS:
        return max(FEW_SPLITS, min(MAX_SPLITS, _power_of_two(processors / programs)))
    return splits


def _clustered_splits(programs: int, processors: int) -> int:
    """The most for which all clusters of so many programs, each with a multiprocessor to itself, run at once. A cluster
    stays within a part of the GPU (GPC), and GPUs of a kind differ in how many multiprocessors of each part are off: an
    even number of them is on, of which clusters leave at most the remainder that is counted here."""
    fitting = {s: (processors - MAX_PARTS * ((s - 1) // 2 * 2)) // s for s in CLUSTERS}
    return next((s for s in CLUSTERS if programs <= fitting[s]), 1)


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
        times tiles come to twice the processors at most, of MAX_ROWS rows of one key-value head."""
        rows = max(2 * MAX_SPLITS, 4 * processors * MAX_ROWS // heads)
        return cls(
            part=torch.empty(rows, heads, size, dtype=torch.float32, device=device),
            lse=torch.empty(rows, heads, dtype=torch.float32, device=device),
            arrived=torch.zeros(4096 * processors, dtype=torch.int32, device=device),
        )
