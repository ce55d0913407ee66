"""The heads' best guesses with their log-probabilities, in two launches and without a sort.

Each split of the vocabulary gives its best S tokens, packed (value, token) pairs taken by repeated maximum, and its
share of the normaliser; the second launch does the same over the splits' pairs. Lowest token first among equals.

Shapes: B sequences, K heads, S guesses a head, V vocabulary of the heads, X splits of it, R batch rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check, check_logits
from medusa.kernels.launch import await_inputs, options, pack_pair, packed_index, packed_value

BLOCK = 2048
MAX_WIDTH = 32


@dataclass(frozen=True)
class TopkScratch:
    """Between the two launches: pairs [B * K, X, S], and each split's maximum and sum of exponentials [B * K, X, 2]."""

    pairs: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, batch: int, num_heads: int, width: int, vocab_size: int, device: torch.device) -> TopkScratch:
        shape = (batch * num_heads, triton.cdiv(vocab_size, BLOCK))
        return cls(
            torch.zeros(*shape, width, dtype=torch.int64, device=device),
            torch.zeros(*shape, 2, dtype=torch.float32, device=device),
        )


@triton.jit
def _best_of_split(
    LOGITS,
    stride_b,
    stride_k,
    PAIRS,
    SUMS,
    V,
    K: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    line, split = tl.program_id(0), tl.program_id(1)
    b, k = (line // K).to(tl.int64), line % K
    v = split * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    logits = tl.load(LOGITS + b * stride_b + k * stride_k + v, mask=inside, other=-float("inf")).to(tl.float32)
    place = line * tl.num_programs(1) + split
    highest = tl.max(logits, 0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    tl.store(SUMS + place * 2, highest)
    tl.store(SUMS + place * 2 + 1, tl.sum(tl.exp(logits - shift), 0))
    pairs = tl.where(inside, pack_pair(logits, v), -(2**63))
    for s in range(S):
        pair = tl.max(pairs, 0)
        tl.store(PAIRS + place * S + s, pair)
        pairs = tl.where(pairs == pair, -(2**63), pairs)


@triton.jit
def _best_of_all(
    PAIRS,
    SUMS,
    ROWS,
    TOKEN_MAP,
    GUESSES,
    LOGPROB,
    X,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    MAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    line = tl.program_id(0)
    b, k = line // K, line % K
    place = (tl.load(ROWS + b).to(tl.int64) * HEADS + k) * S
    x, c = tl.arange(0, BX), tl.arange(0, BC)
    highest = tl.load(SUMS + (line * X + x) * 2, mask=x < X, other=-float("inf"))
    total = tl.load(SUMS + (line * X + x) * 2 + 1, mask=x < X, other=0.0)
    top = tl.max(highest, 0)
    shift = tl.where(top == -float("inf"), 0.0, top)
    normaliser = shift + tl.log(tl.sum(tl.where(total > 0.0, total * tl.exp(highest - shift), 0.0), 0))
    pairs = tl.load(PAIRS + line * X * S + c, mask=c < X * S, other=-(2**63))
    for s in range(S):
        pair = tl.max(pairs, 0)
        pairs = tl.where(pairs == pair, -(2**63), pairs)
        token = packed_index(pair)
        if MAPPED:
            token = tl.load(TOKEN_MAP + token)
        tl.store(GUESSES + place + s, token)
        tl.store(LOGPROB + place + s, packed_value(pair) - normaliser)


def topk(
    logits_BKV: torch.Tensor,
    rows_B: torch.Tensor,
    guesses_RKS: torch.Tensor,
    logprob_RKS: torch.Tensor,
    scratch: TopkScratch,
    *,
    token_map: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Writes the first heads' best S guesses, best first, and logit - logsumexp, into the sequences' rows.

    `logits_BKV` may lie head by head or sequence by sequence (any strides but the last); its K may be fewer heads than
    the rows have. `token_map` turns a truncated vocabulary's tokens into the backbone's.
    """
    batch, num_heads, vocab_size = logits_BKV.shape
    _, heads, width = guesses_RKS.shape
    check_logits("logits_BKV", logits_BKV, 3)
    check("rows_B", rows_B, torch.int32, batch)
    check("guesses_RKS", guesses_RKS, torch.int64, None, heads, width)
    check("logprob_RKS", logprob_RKS, torch.float32, *guesses_RKS.shape)
    if not 1 <= width <= min(MAX_WIDTH, vocab_size) or num_heads > heads:
        raise ValueError(
            f"{num_heads} heads' best {width} of {vocab_size} tokens were asked for rows of {heads} heads; at most "
            f"{heads} heads and {min(MAX_WIDTH, vocab_size)} guesses are possible"
        )
    splits = triton.cdiv(vocab_size, BLOCK)
    check("scratch.pairs", scratch.pairs, torch.int64, batch * num_heads, splits, width)
    check("scratch.sums", scratch.sums, torch.float32, batch * num_heads, splits, 2)
    if token_map is not None:
        check("token_map", token_map, torch.int64, vocab_size)
    _best_of_split[(batch * num_heads, splits)](
        logits_BKV,
        logits_BKV.stride(0),
        logits_BKV.stride(1),
        scratch.pairs,
        scratch.sums,
        vocab_size,
        K=num_heads,
        S=width,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **options(pdl),
    )
    _best_of_all[(batch * num_heads,)](
        scratch.pairs,
        scratch.sums,
        rows_B,
        rows_B if token_map is None else token_map,
        guesses_RKS,
        logprob_RKS,
        splits,
        HEADS=heads,
        K=num_heads,
        S=width,
        BX=triton.next_power_of_2(splits),
        BC=triton.next_power_of_2(splits * width),
        MAPPED=token_map is not None,
        PDL=pdl,
        num_warps=1 if splits * width <= 512 else 4,
        **options(pdl),
    )
