"""The heads' best guesses, in two launches and without a sort.

Each split of the vocabulary gives its best S tokens, packed (value, token) pairs taken by repeated maximum; the second
launch does the same over the splits' pairs. Lowest token first among equals.

Shapes: B sequences, K heads, S guesses a head, V vocabulary of the heads, X splits of it, R batch rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check, check_logits
from medusa.kernels.launch import await_inputs, options, pack_pair, packed_index

BLOCK = 2048
MAX_WIDTH = 32


def scratch(batch: int, num_heads: int, width: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Room for the pairs between the two launches, [B * K, X, S]."""
    shape = (batch * num_heads, triton.cdiv(vocab_size, BLOCK), width)
    return torch.empty(*shape, dtype=torch.int64, device=device)


@triton.jit
def _best_of_split(
    LOGITS,
    stride_b,
    stride_k,
    PAIRS,
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
    pairs = tl.where(inside, pack_pair(logits, v), -(2**63))
    for s in range(S):
        pair = tl.max(pairs, 0)
        tl.store(PAIRS + place * S + s, pair)
        pairs = tl.where(pairs == pair, -(2**63), pairs)


@triton.jit
def _best_of_all(
    PAIRS,
    ROWS,
    TOKEN_MAP,
    GUESSES,
    X,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    BC: tl.constexpr,
    MAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    line = tl.program_id(0)
    b, k = line // K, line % K
    place = (tl.load(ROWS + b).to(tl.int64) * HEADS + k) * S
    c = tl.arange(0, BC)
    pairs = tl.load(PAIRS + line * X * S + c, mask=c < X * S, other=-(2**63))
    for s in range(S):
        pair = tl.max(pairs, 0)
        pairs = tl.where(pairs == pair, -(2**63), pairs)
        token = packed_index(pair)
        if MAPPED:
            token = tl.load(TOKEN_MAP + token)
        tl.store(GUESSES + place + s, token)


def topk(
    logits_BKV: torch.Tensor,
    rows_B: torch.Tensor,
    guesses_RKS: torch.Tensor,
    pairs: torch.Tensor,
    *,
    token_map: torch.Tensor | None = None,
    pdl: bool = False,
) -> None:
    """Writes the first heads' best S guesses, best first, into the sequences' rows. `pairs` is `scratch` for them.

    `logits_BKV` may lie head by head or sequence by sequence (any strides but the last); its K may be fewer heads than
    the rows have. `token_map` turns a truncated vocabulary's tokens into the backbone's.
    """
    batch, num_heads, vocab_size = logits_BKV.shape
    _, heads, width = guesses_RKS.shape
    check_logits("logits_BKV", logits_BKV, 3)
    check("rows_B", rows_B, torch.int32, batch)
    check("guesses_RKS", guesses_RKS, torch.int64, None, heads, width)
    if not 1 <= width <= min(MAX_WIDTH, vocab_size) or num_heads > heads:
        raise ValueError(
            f"{num_heads} heads' best {width} of {vocab_size} tokens were asked for rows of {heads} heads; at most "
            f"{heads} heads and {min(MAX_WIDTH, vocab_size)} guesses are possible"
        )
    splits = triton.cdiv(vocab_size, BLOCK)
    check("pairs", pairs, torch.int64, batch * num_heads, splits, width)
    if token_map is not None:
        check("token_map", token_map, torch.int64, vocab_size)
    _best_of_split[(batch * num_heads, splits)](
        logits_BKV,
        logits_BKV.stride(0),
        logits_BKV.stride(1),
        pairs,
        vocab_size,
        K=num_heads,
        S=width,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **options(pdl),
    )
    _best_of_all[(batch * num_heads,)](
        pairs,
        rows_B,
        rows_B if token_map is None else token_map,
        guesses_RKS,
        splits,
        HEADS=heads,
        K=num_heads,
        S=width,
        BC=triton.next_power_of_2(splits * width),
        MAPPED=token_map is not None,
        PDL=pdl,
        num_warps=1 if splits * width <= 512 else 4,
        **options(pdl),
    )
