"""What a decoding step keeps on the device between steps, by batch row, and what it works on.

Shapes: R batch rows, of which the last is nobody's (padding points there; it is never live), N nodes a tree (W words
of 64 bits), K heads, S guesses a head, E stop ids, B sequences of a step, M flat nodes of a step.
Sequence b of a step owns the flat nodes start_B[b] .. start_B[b] + count_B[b] - 1: the first nodes of its row's tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medusa.kernels.checks import check


@dataclass(frozen=True)
class Trees:
    """Each row's token tree in growth order, parents before children, so that any first nodes are a tree too.

    `parent_RN` is -1 for the root; `rank_RN` is which guess of its head a node takes; bit j % 64 of word j // 64 of
    `bits_RNW` says that a node sees node j (an ancestor, or itself). Unused nodes have depth K + 1: never valid.
    """

    parent_RN: torch.Tensor
    depth_RN: torch.Tensor
    rank_RN: torch.Tensor
    bits_RNW: torch.Tensor

    def __post_init__(self) -> None:
        rows, nodes = self.parent_RN.shape
        if nodes % 64:
            raise ValueError(f"a tree has room for a multiple of 64 nodes, got {nodes}; round it up")
        for name in ("parent_RN", "depth_RN", "rank_RN"):
            check(name, getattr(self, name), torch.int32, rows, nodes)
        check("bits_RNW", self.bits_RNW, torch.int64, rows, nodes, nodes // 64)

    @classmethod
    def roots(cls, num_rows: int, num_nodes: int, num_heads: int, device: torch.device) -> Trees:
        """Trees of one node each, with room for `num_nodes`."""
        shape = (num_rows, num_nodes)
        parent_RN = torch.full(shape, -1, dtype=torch.int32, device=device)
        depth_RN = torch.full(shape, num_heads + 1, dtype=torch.int32, device=device)
        depth_RN[:, 0] = 0
        rank_RN = torch.full(shape, -1, dtype=torch.int32, device=device)
        bits_RNW = torch.zeros(*shape, num_nodes // 64, dtype=torch.int64, device=device)
        node = torch.arange(num_nodes, device=device)
        bits_RNW[:, node, node // 64] = torch.ones_like(node) << (node % 64)
        return cls(parent_RN, depth_RN, rank_RN, bits_RNW)


@dataclass(frozen=True)
class RowState:
    """Each row's sequence. `root_R`: its last token, not in the cache yet. `guesses_RKS`: what its heads guess after
    it; `num_guessed_R`: by how many heads (deeper nodes take no part). `length_R`: committed positions of its cache.
    `live_R`: 0 or 1. `remaining_R`: tokens the reply may still get, 1 or more while live. `num_output_R`: tokens it
    has. `stop_ids_RE` is padded with -1. `exact_R`: 1 where typical acceptance gives way to drafts as drawn (as it does
    at temperature 0 anyway). The others are the sampling parameters (`top_k_R` 0: all tokens)."""

    root_R: torch.Tensor
    guesses_RKS: torch.Tensor
    num_guessed_R: torch.Tensor
    length_R: torch.Tensor
    live_R: torch.Tensor
    remaining_R: torch.Tensor
    num_output_R: torch.Tensor
    min_tokens_R: torch.Tensor
    stop_ids_RE: torch.Tensor
    temperature_R: torch.Tensor
    top_p_R: torch.Tensor
    min_p_R: torch.Tensor
    top_k_R: torch.Tensor
    seed_R: torch.Tensor
    choice_R: torch.Tensor
    exact_R: torch.Tensor

    def __post_init__(self) -> None:
        (rows,) = self.root_R.shape
        for name in ("root_R", "length_R", "seed_R", "choice_R"):
            check(name, getattr(self, name), torch.int64, rows)
        for name in ("num_guessed_R", "live_R", "remaining_R", "num_output_R", "min_tokens_R", "top_k_R", "exact_R"):
            check(name, getattr(self, name), torch.int32, rows)
        for name in ("temperature_R", "top_p_R", "min_p_R"):
            check(name, getattr(self, name), torch.float32, rows)
        check("guesses_RKS", self.guesses_RKS, torch.int64, rows, None, None)
        check("stop_ids_RE", self.stop_ids_RE, torch.int64, rows, None)

    @classmethod
    def empty(cls, num_rows: int, num_heads: int, width: int, num_stop_ids: int, device: torch.device) -> RowState:
        """Rows without a sequence: not live, greedy, unrestricted."""

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        def column(dtype: torch.dtype) -> torch.Tensor:
            return zeros(num_rows, dtype=dtype)

        return cls(
            root_R=column(torch.int64),
            guesses_RKS=zeros(num_rows, num_heads, width, dtype=torch.int64),
            num_guessed_R=column(torch.int32),
            length_R=column(torch.int64),
            live_R=column(torch.int32),
            remaining_R=column(torch.int32),
            num_output_R=column(torch.int32),
            min_tokens_R=column(torch.int32),
            stop_ids_RE=zeros(num_rows, num_stop_ids, dtype=torch.int64) - 1,
            temperature_R=column(torch.float32),
            top_p_R=column(torch.float32) + 1,
            min_p_R=column(torch.float32),
            top_k_R=column(torch.int32),
            seed_R=column(torch.int64),
            choice_R=column(torch.int64),
            exact_R=column(torch.int32),
        )

    @property
    def num_rows(self) -> int:
        return self.root_R.shape[0]


@dataclass(frozen=True)
class Drafts:
    """A step's flat nodes. One takes part where `valid_M` is 1; the others hold token 0. Nodes beyond the sequences'
    are the last row's, node 0, position 0."""

    tokens_M: torch.Tensor
    position_M: torch.Tensor
    row_M: torch.Tensor
    node_M: torch.Tensor
    valid_M: torch.Tensor
    start_B: torch.Tensor

    def __post_init__(self) -> None:
        (nodes,), (batch,) = self.tokens_M.shape, self.start_B.shape
        for name in ("tokens_M", "position_M"):
            check(name, getattr(self, name), torch.int64, nodes)
        for name in ("row_M", "node_M", "valid_M"):
            check(name, getattr(self, name), torch.int32, nodes)
        check("start_B", self.start_B, torch.int32, batch)

    @classmethod
    def empty(cls, num_nodes: int, batch: int, device: torch.device) -> Drafts:
        """Buffers for `draft` to fill."""

        def column(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return cls(
            tokens_M=column(num_nodes, torch.int64),
            position_M=column(num_nodes, torch.int64),
            row_M=column(num_nodes, torch.int32),
            node_M=column(num_nodes, torch.int32),
            valid_M=column(num_nodes, torch.int32),
            start_B=column(batch, torch.int32),
        )

    @property
    def num_nodes(self) -> int:
        return self.tokens_M.shape[0]


@dataclass(frozen=True)
class Emitted:
    """What a step adds to its sequences. `tokens_BD` and `path_BD` (the accepted nodes) hold `num_B` entries, then -1.
    `last_B` is the flat index of the last accepted node (a dead sequence's: any flat index). `finished_B`: 0 no, 1 by
    a stop id, 2 by length. D is the deepest depth + 1."""

    tokens_BD: torch.Tensor
    path_BD: torch.Tensor
    num_B: torch.Tensor
    last_B: torch.Tensor
    finished_B: torch.Tensor

    def __post_init__(self) -> None:
        batch, depths = self.tokens_BD.shape
        check("tokens_BD", self.tokens_BD, torch.int64, batch, depths)
        check("path_BD", self.path_BD, torch.int32, batch, depths)
        for name in ("num_B", "last_B", "finished_B"):
            check(name, getattr(self, name), torch.int32, batch)

    @classmethod
    def empty(cls, batch: int, num_depths: int, device: torch.device) -> Emitted:
        """Buffers for a walk to fill; `num_depths` is the deepest depth of a tree + 1."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            tokens_BD=zeros(batch, num_depths, dtype=torch.int64),
            path_BD=zeros(batch, num_depths),
            num_B=zeros(batch),
            last_B=zeros(batch),
            finished_B=zeros(batch),
        )
