"""Trees that follow the heads' confidence: each sequence's tree grown best first from its guesses' log-probabilities.

The device twin of `medusa.tree.grow`: a node's value is the sum of log-probabilities along its path, and each round
adds the most valuable node whose parent and better siblings are in. A head's guesses are best first, so each node
offers one child at a time. In growth order parents come first, and the first n nodes are the best tree of n nodes.

Shapes: B sequences, R batch rows, N nodes a tree (W words of bits), K heads, S guesses a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.launch import await_inputs, options, pack_pair, packed_index, packed_value
from medusa.kernels.state import Trees


@triton.jit
def _grow(
    ROWS,
    LOGPROB,
    NUM_GUESSED,
    PARENT,
    DEPTH,
    RANK,
    BITS,
    N: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.load(ROWS + tl.program_id(0))
    heads = tl.minimum(tl.load(NUM_GUESSED + row), K)
    logprob = LOGPROB + row.to(tl.int64) * K * S
    j, w = tl.arange(0, BN), tl.arange(0, BW)
    parent = tl.full([BN], -1, tl.int32)
    depth = tl.where(j == 0, 0, K + 1)
    rank = tl.full([BN], -1, tl.int32)
    bits = tl.where(
        (j // 64)[None, :] == w[:, None], tl.full([BW, BN], 1, tl.int64) << (j % 64).to(tl.int64)[None, :], 0
    )
    value = tl.zeros([BN], tl.float32)
    next_rank = tl.zeros([BN], tl.int32)
    none = -float("inf")
    first = tl.load(logprob, mask=heads > 0, other=none)
    offer = tl.where(j == 0, first, none)  # the value of the child that each node offers next
    node = row * 0 + 1
    growing = ((heads > 0) & (first > none)).to(tl.int32)
    while growing != 0:
        pair = tl.max(pack_pair(offer, j), 0)
        of, gained = packed_index(pair).to(tl.int32), packed_value(pair)
        chosen, new = j == of, j == node
        of_depth = tl.sum(tl.where(chosen, depth, 0), 0)
        of_rank = tl.sum(tl.where(chosen, next_rank, 0), 0)
        of_value = tl.sum(tl.where(chosen, value, 0.0), 0)
        of_bits = tl.sum(tl.where(chosen[None, :], bits, 0), 1)
        parent, depth, rank = (
            tl.where(new, of, parent),
            tl.where(new, of_depth + 1, depth),
            tl.where(new, of_rank, rank),
        )
        bits = tl.where(new[None, :], bits | of_bits[:, None], bits)
        value = tl.where(new, gained, value)
        next_rank = tl.where(chosen, of_rank + 1, next_rank)
        sibling = tl.load(logprob + of_depth * S + of_rank + 1, mask=of_rank + 1 < S, other=none)
        child = tl.load(logprob + (of_depth + 1) * S, mask=of_depth + 1 < heads, other=none)
        offer = tl.where(chosen, of_value + sibling, tl.where(new, gained + child, offer))
        node += 1
        growing = ((node < N) & (tl.max(offer, 0) > none)).to(tl.int32)
    tl.store(PARENT + row * N + j, parent, mask=j < N)
    tl.store(DEPTH + row * N + j, depth, mask=j < N)
    tl.store(RANK + row * N + j, rank, mask=j < N)
    inside = (j < N)[None, :] & (w < N // 64)[:, None]
    tl.store(BITS + ((row * N + j) * (N // 64))[None, :] + w[:, None], bits, mask=inside)


def grow_trees(
    rows_B: torch.Tensor, logprob_RKS: torch.Tensor, num_guessed_R: torch.Tensor, trees: Trees, *, pdl: bool = False
) -> None:
    """Writes the sequences' rows of `trees` from `topk`'s log-probabilities (best first a head) of their first
    `num_guessed_R` heads. Of equal values the earliest node's child comes first. Where the guesses run out (or are
    -inf) the nodes left are unused: depth K + 1."""
    (batch,), (num_rows, num_nodes) = rows_B.shape, trees.parent_RN.shape
    _, num_heads, width = logprob_RKS.shape
    check("rows_B", rows_B, torch.int32, batch)
    check("logprob_RKS", logprob_RKS, torch.float32, num_rows, num_heads, width)
    check("num_guessed_R", num_guessed_R, torch.int32, num_rows)
    _grow[(batch,)](
        rows_B,
        logprob_RKS,
        num_guessed_R,
        trees.parent_RN,
        trees.depth_RN,
        trees.rank_RN,
        trees.bits_RNW,
        N=num_nodes,
        BN=triton.next_power_of_2(num_nodes),
        BW=triton.next_power_of_2(num_nodes // 64),
        K=num_heads,
        S=width,
        PDL=pdl,
        num_warps=1,
        **options(pdl),
    )
