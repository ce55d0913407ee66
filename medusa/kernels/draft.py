"""A step's flat nodes from the sequences' trees and their heads' guesses, in one launch.

Shapes: B sequences of the step, M flat nodes (the bucket), R batch rows (the last is nobody's), N nodes a tree,
K heads, S guesses a head. Sequence b owns the flat nodes start_B[b] .. start_B[b] + count_B[b] - 1, in b's order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.launch import await_inputs, options
from medusa.kernels.state import Drafts, RowState, Trees

BLOCK = 32


@triton.jit
def _draft(
    ROWS,
    COUNT,
    DEPTH,
    RANK,
    ROOT,
    GUESSES,
    NUM_GUESSED,
    LENGTH,
    LIVE,
    TOKENS,
    POSITION,
    ROW,
    NODE,
    VALID,
    START,
    B,
    M,
    R,
    N: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BB: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    b = tl.arange(0, BB)
    count = tl.load(COUNT + b, mask=b < B, other=0)
    end = tl.cumsum(count, 0)
    if tl.program_id(0) == 0:
        tl.store(START + b, end - count, mask=b < B)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = (end[None, :] <= m[:, None]) & (b < B)[None, :]
    sequence = tl.sum(before.to(tl.int32), 1)
    node = m - tl.max(tl.where(before, end[None, :], 0), 1)
    owned = (m < M) & (sequence < B)
    row = tl.load(ROWS + sequence, mask=owned, other=R - 1)
    node = tl.where(owned, node, 0)
    depth = tl.load(DEPTH + row * N + node, mask=owned, other=0)
    rank = tl.load(RANK + row * N + node, mask=owned, other=0)
    live = tl.load(LIVE + row, mask=owned, other=0)
    guessed = tl.load(NUM_GUESSED + row, mask=owned, other=0)
    valid = owned & (live != 0) & (depth <= guessed) & (depth <= K)
    root = tl.load(ROOT + row, mask=valid & (depth == 0), other=0)
    place = (row.to(tl.int64) * K + depth - 1) * S + rank
    guess = tl.load(GUESSES + place, mask=valid & (depth > 0), other=0)
    length = tl.load(LENGTH + row, mask=owned, other=0)
    inside = m < M
    tl.store(TOKENS + m, tl.where(depth == 0, root, guess), mask=inside)
    tl.store(POSITION + m, length + depth, mask=inside)
    tl.store(ROW + m, row, mask=inside)
    tl.store(NODE + m, node, mask=inside)
    tl.store(VALID + m, valid.to(tl.int32), mask=inside)


def draft(
    rows_B: torch.Tensor, count_B: torch.Tensor, trees: Trees, state: RowState, out: Drafts, *, pdl: bool = False
) -> None:
    """Writes every element of `out`. Node n of a live row is valid when it is no deeper than `num_guessed_R`.

    The counts sum to M at most and each is N at most; padding sequences (row R - 1) count 0. Positions are length +
    depth. `rows_B` and `count_B` are int32.
    """
    (batch,), (num_rows, num_nodes), num_flat = rows_B.shape, trees.depth_RN.shape, out.num_nodes
    _, num_heads, width = state.guesses_RKS.shape
    check("rows_B", rows_B, torch.int32, batch)
    check("count_B", count_B, torch.int32, batch)
    check("start_B", out.start_B, torch.int32, batch)
    check("root_R", state.root_R, torch.int64, num_rows)
    _draft[(triton.cdiv(num_flat, BLOCK),)](
        rows_B,
        count_B,
        trees.depth_RN,
        trees.rank_RN,
        state.root_R,
        state.guesses_RKS,
        state.num_guessed_R,
        state.length_R,
        state.live_R,
        out.tokens_M,
        out.position_M,
        out.row_M,
        out.node_M,
        out.valid_M,
        out.start_B,
        batch,
        num_flat,
        num_rows,
        N=num_nodes,
        K=num_heads,
        S=width,
        BB=max(16, triton.next_power_of_2(batch)),
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **options(pdl),
    )


def draft_reference(
    rows_B: torch.Tensor, count_B: torch.Tensor, trees: Trees, state: RowState, num_flat: int
) -> Drafts:
    """The same in plain torch, node by node."""
    out = Drafts.empty(num_flat, len(rows_B), rows_B.device)
    out.row_M.fill_(state.num_rows - 1)
    m = 0
    for b, (row, count) in enumerate(zip(rows_B.tolist(), count_B.tolist(), strict=True)):
        out.start_B[b] = m
        for node in range(count):
            depth, rank = int(trees.depth_RN[row, node]), int(trees.rank_RN[row, node])
            out.row_M[m], out.node_M[m], out.position_M[m] = row, node, state.length_R[row] + depth
            if state.live_R[row] and depth <= state.num_guessed_R[row]:
                out.valid_M[m] = 1
                out.tokens_M[m] = state.guesses_RKS[row, depth - 1, rank] if depth else state.root_R[row]
            m += 1
    return out
