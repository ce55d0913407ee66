"""Drafts of heads that see their path (medusa/hydra.py): which nodes are asked for guesses, what tokens lead to each,
and which of the guesses every node takes. What lies between, embeddings and products, is no business of this file.

Head k is asked at the nodes of depth k that have children in the step. Shapes: M flat nodes of a step, R batch rows, N
nodes a tree, K heads, A room for asked nodes a head, C slots that a head uses at most, S guesses, J = k + 1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.launch import await_inputs, options
from medusa.kernels.state import Drafts, RowState, Trees

BLOCK = 32
PLANNED = 8192  # comparisons of nodes with nodes of their trees that a program makes at a time


@dataclass(frozen=True)
class Paths:
    """`asked_KA`: each head's asked nodes (flat; -1: the slot is empty), then `slot_M`: where in it an asked node is.
    `guesses_KAS`: what was guessed there."""

    asked_KA: torch.Tensor
    slot_M: torch.Tensor
    guesses_KAS: torch.Tensor

    def __post_init__(self) -> None:
        heads, room, _ = self.guesses_KAS.shape
        check("asked_KA", self.asked_KA, torch.int32, heads, room)
        check("slot_M", self.slot_M, torch.int32, None)
        check("guesses_KAS", self.guesses_KAS, torch.int64, heads, room, None)

    @classmethod
    def empty(cls, num_nodes: int, num_heads: int, width: int, device: torch.device) -> Paths:
        """Buffers for a step of so many nodes."""
        room = num_nodes // 2  # an asked node has a child that no other has

        def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        return cls(
            asked_KA=empty(num_heads, room, dtype=torch.int32),
            slot_M=empty(num_nodes, dtype=torch.int32),
            guesses_KAS=empty(num_heads, room, width, dtype=torch.int64),
        )


def most_asked(head: int, batch: int, num_nodes: int, width: int) -> int:
    """How many nodes a head can be asked at in a step of so many sequences and nodes: one at depth k has a child, and
    those of one tree share a path of k nodes at least."""
    return min(batch * width**head, (num_nodes - head) // 2)


@triton.jit
def _plan_paths(
    ROW,
    NODE,
    VALID,
    PARENT,
    DEPTH,
    ASKED,
    SLOT,
    M,
    A,
    N: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program a head: it meets each asked node once, at the first of its children."""
    await_inputs(PDL)
    head = tl.program_id(0)
    j = tl.arange(0, BN)
    found = head * 0
    for start in range(0, M, BLOCK):
        m = start + tl.arange(0, BLOCK)
        valid = tl.load(VALID + m, mask=m < M, other=0) != 0
        row, node = tl.load(ROW + m, mask=valid, other=0), tl.load(NODE + m, mask=valid, other=0)
        child = valid & (tl.load(DEPTH + row * N + node, mask=valid, other=0) == head + 1)
        parent = tl.load(PARENT + row * N + node, mask=child, other=0)
        sooner = child[:, None] & (j[None, :] < node[:, None])
        parents = tl.load(PARENT + row[:, None] * N + j[None, :], mask=sooner, other=-1)
        siblings = tl.sum((parents == parent[:, None]).to(tl.int32), 1)
        first = (child & (siblings == 0)).to(tl.int32)
        slot = found + tl.cumsum(first, 0) - 1
        asked = m - node + parent
        tl.store(ASKED + head * A + slot, asked, mask=first != 0)
        tl.store(SLOT + asked, slot, mask=first != 0)
        found += tl.sum(first, 0)
    for start in range(0, A, BLOCK):
        a = start + tl.arange(0, BLOCK)
        tl.store(ASKED + head * A + a, tl.full([BLOCK], -1, tl.int32), mask=(a >= found) & (a < A))


@triton.jit
def _read_paths(
    ASKED,
    SLOT,
    GUESSES,
    ROW,
    NODE,
    PARENT,
    RANK,
    ROOT,
    AHEAD,
    C,
    A,
    N: tl.constexpr,
    S: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(ASKED + HEAD * A + c, mask=c < C, other=-1)
    asked = m >= 0
    row, node = tl.load(ROW + m, mask=asked, other=0), tl.load(NODE + m, mask=asked, other=0)
    start = m - node
    for up in tl.static_range(HEAD):
        depth = HEAD - up
        parent = tl.load(PARENT + row * N + node, mask=asked, other=0)
        rank = tl.load(RANK + row * N + node, mask=asked, other=0)
        slot = tl.load(SLOT + start + parent, mask=asked, other=0)
        token = tl.load(GUESSES + ((depth - 1) * A + slot) * S + rank, mask=asked, other=0)
        tl.store(AHEAD + c * (HEAD + 1) + depth, token, mask=c < C)
        node = parent
    tl.store(AHEAD + c * (HEAD + 1), tl.load(ROOT + row, mask=asked, other=0), mask=c < C)


@triton.jit
def _take_guesses(
    SLOT,
    GUESSES,
    ROW,
    NODE,
    VALID,
    PARENT,
    DEPTH,
    RANK,
    TOKENS,
    M,
    A,
    N: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(VALID + m, mask=m < M, other=0) != 0
    row, node = tl.load(ROW + m, mask=valid, other=0), tl.load(NODE + m, mask=valid, other=0)
    depth = tl.load(DEPTH + row * N + node, mask=valid, other=0)
    drafted = depth > 0
    parent = tl.load(PARENT + row * N + node, mask=drafted, other=0)
    rank = tl.load(RANK + row * N + node, mask=drafted, other=0)
    slot = tl.load(SLOT + m - node + parent, mask=drafted, other=0)
    guess = tl.load(GUESSES + ((depth - 1) * A + slot) * S + rank, mask=drafted, other=0)
    tl.store(TOKENS + m, guess, mask=drafted)


def plan_paths(drafts: Drafts, trees: Trees, paths: Paths, *, pdl: bool = False) -> None:
    """Writes all of `asked_KA`, and `slot_M` of the asked nodes. A head is asked for the valid nodes of `drafts`."""
    num_nodes = trees.parent_RN.shape[1]
    heads, room = paths.asked_KA.shape
    padded = triton.next_power_of_2(num_nodes)
    block = min(max(BLOCK, PLANNED // padded), max(BLOCK, triton.next_power_of_2(drafts.num_nodes)))
    check("slot_M", paths.slot_M, torch.int32, drafts.num_nodes)
    _plan_paths[(heads,)](
        drafts.row_M,
        drafts.node_M,
        drafts.valid_M,
        trees.parent_RN,
        trees.depth_RN,
        paths.asked_KA,
        paths.slot_M,
        drafts.num_nodes,
        room,
        N=num_nodes,
        BN=padded,
        BLOCK=block,
        PDL=pdl,
        num_warps=4 if block * padded < PLANNED else 8,
        **options(pdl),
    )


def read_paths(
    head: int, drafts: Drafts, trees: Trees, state: RowState, paths: Paths, ahead_CJ: torch.Tensor, *, pdl: bool = False
) -> None:
    """Writes the tokens from the root to each of the head's first C asked nodes, as the heads before it guessed them;
    zeros for empty slots."""
    (slots, tokens), (_, room, width) = ahead_CJ.shape, paths.guesses_KAS.shape
    check("ahead_CJ", ahead_CJ, torch.int64, slots, head + 1)
    if tokens != head + 1 or slots > room:
        raise ValueError(f"head {head} sees {head + 1} tokens at up to {room} nodes, got {tokens} at {slots}")
    _read_paths[(triton.cdiv(slots, BLOCK),)](
        paths.asked_KA,
        paths.slot_M,
        paths.guesses_KAS,
        drafts.row_M,
        drafts.node_M,
        trees.parent_RN,
        trees.rank_RN,
        state.root_R,
        ahead_CJ,
        slots,
        room,
        N=trees.parent_RN.shape[1],
        S=width,
        HEAD=head,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=1,
        **options(pdl),
    )


def take_guesses(drafts: Drafts, trees: Trees, paths: Paths, *, pdl: bool = False) -> None:
    """Writes the tokens of the valid nodes below the roots."""
    _, room, width = paths.guesses_KAS.shape
    _take_guesses[(triton.cdiv(drafts.num_nodes, BLOCK),)](
        paths.slot_M,
        paths.guesses_KAS,
        drafts.row_M,
        drafts.node_M,
        drafts.valid_M,
        trees.parent_RN,
        trees.depth_RN,
        trees.rank_RN,
        drafts.tokens_M,
        drafts.num_nodes,
        room,
        N=trees.parent_RN.shape[1],
        S=width,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=1,
        **options(pdl),
    )
