"""One token a node: the argmax, or a draw by keyed Gumbel noise, with exact top-k, top-p and min-p.

Two stages over the vocabulary: `sample` leaves each split's best (value, token) of a node packed in one int64, lowest
token among equals; the walk reduces those of the nodes that it visits, `reduce_samples` those of all nodes. Which nodes
are greedy, drawn or restricted is data: one compiled kernel serves every mixture. `find_cuts` (medusa/kernels/cut.py)
comes first where a node is restricted. The law is `SamplingBatch.sample`'s, the noise `medusa.noise.gumbel`'s.

Shapes: M flat nodes, V vocabulary, X splits of it, R batch rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check, check_logits
from medusa.kernels.cut import Cuts
from medusa.kernels.launch import await_inputs, options, pack_pair, packed_index
from medusa.kernels.logits import is_restricted, load_scaled, may_not_stop
from medusa.kernels.state import Drafts, RowState

BLOCK = 1024


@triton.jit
def gumbel_words(seed, choice, position, first, BLOCK: tl.constexpr):
    """Philox4x32-10 words of tokens first .. first + BLOCK - 1 (first: a multiple of 4), as medusa/noise.py has them:
    token v takes word v % 4 of the counter (v // 4, position, choice, 0)."""
    group = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = group * 0
    w0, w1, w2, w3 = tl.philox(seed, group, zero + position.to(tl.uint32), zero + choice.to(tl.uint32), zero)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def _sample(
    LOGITS,
    stride_m,
    ROW,
    POSITION,
    VALID,
    LENGTH,
    NUM_OUTPUT,
    MIN_TOKENS,
    STOP,
    TEMPERATURE,
    TOP_P,
    TOP_K,
    MIN_P,
    SEED,
    CHOICE,
    EXACT,
    CUT_VALUE,
    CUT_TOKEN,
    BEST,
    V,
    E: tl.constexpr,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    m, split = tl.program_id(0), tl.program_id(1)
    row = tl.load(ROW + m)
    position = tl.load(POSITION + m)
    early = may_not_stop(row, position, LENGTH, NUM_OUTPUT, MIN_TOKENS)
    temperature = tl.load(TEMPERATURE + row)
    chunk = tl.cdiv(tl.cdiv(V, tl.num_programs(1)), BLOCK) * BLOCK
    low = tl.minimum(split * chunk, V)
    high = tl.where(tl.load(VALID + m) != 0, tl.minimum(low + chunk, V), low)
    base = LOGITS + m.to(tl.int64) * stride_m
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    token = tl.zeros([BLOCK], tl.int32) + tl.minimum(low, V - 1)
    draws = temperature > 0.0
    if GREEDY:
        draws = draws & (tl.load(EXACT + row) != 0)
    if draws:
        seed, choice = tl.load(SEED + row), tl.load(CHOICE + row)
        restricted = is_restricted(row, TEMPERATURE, TOP_P, TOP_K, MIN_P)
        cut_value = tl.where(restricted, tl.load(CUT_VALUE + m), -float("inf"))
        cut_token = tl.where(restricted, tl.load(CUT_TOKEN + m), V)
        for first in range(low, high, BLOCK):
            v = first + tl.arange(0, BLOCK)
            _, scaled = load_scaled(base, v, V, temperature, early, STOP + row * E, E)
            kept = (scaled > cut_value) | ((scaled == cut_value) & (v <= cut_token))
            words = gumbel_words(seed, choice, position + 1, first, BLOCK)
            uniform = ((words >> 9).to(tl.float32) + 0.5) * (2.0**-23)
            value = tl.where(kept, scaled - tl.log(-tl.log(uniform)), -float("inf"))
            better = value > best
            best, token = tl.where(better, value, best), tl.where(better, v, token)
    else:
        for first in range(low, high, BLOCK):
            v = first + tl.arange(0, BLOCK)
            value, _ = load_scaled(base, v, V, 1.0, early, STOP + row * E, E)
            better = value > best
            best, token = tl.where(better, value, best), tl.where(better, v, token)
    tl.store(BEST + m * tl.num_programs(1) + split, tl.max(pack_pair(best, token), 0))


@triton.jit
def _reduce(BEST, SAMPLED, M, X, BM: tl.constexpr, BX: tl.constexpr, PDL: tl.constexpr):
    await_inputs(PDL)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    x = tl.arange(0, BX)
    inside = (m < M)[:, None] & (x < X)[None, :]
    pairs = tl.load(BEST + m[:, None] * X + x[None, :], mask=inside, other=-(2**63))
    tl.store(SAMPLED + m, packed_index(tl.max(pairs, 1)), mask=m < M)


def num_splits(num_nodes: int, vocab_size: int, programs: int = 512) -> int:
    """Splits of the vocabulary that give about `programs` programs, none of them empty."""
    blocks = triton.cdiv(vocab_size, BLOCK)
    wanted = max(1, min(blocks, programs // num_nodes))
    return triton.cdiv(blocks, triton.cdiv(blocks, wanted))


def sample(
    logits_MV: torch.Tensor,
    drafts: Drafts,
    state: RowState,
    cuts: Cuts,
    best_MX: torch.Tensor,
    *,
    greedy: bool = False,
    pdl: bool = False,
) -> None:
    """Writes every element of `best_MX` (int64): the best (value, token) of each split of the vocabulary, packed.

    A node at depth d draws for position length + 1 + d. Stop ids are masked while num_output + d < min_tokens. `cuts`
    are read of drawn, restricted nodes only, so `find_cuts` may be left out where there are none. `greedy` takes the
    argmax of all but `exact_R` rows' nodes (typical acceptance's root). Invalid nodes get some token of the vocabulary.
    """
    num_nodes, vocab_size = logits_MV.shape
    check_logits("logits_MV", logits_MV, 2)
    check("tokens_M", drafts.tokens_M, torch.int64, num_nodes)
    check("best_MX", best_MX, torch.int64, num_nodes, None)
    check("cuts.value_M", cuts.value_M, torch.float32, num_nodes)
    _sample[(num_nodes, best_MX.shape[1])](
        logits_MV,
        logits_MV.stride(0),
        drafts.row_M,
        drafts.position_M,
        drafts.valid_M,
        state.length_R,
        state.num_output_R,
        state.min_tokens_R,
        state.stop_ids_RE,
        state.temperature_R,
        state.top_p_R,
        state.top_k_R,
        state.min_p_R,
        state.seed_R,
        state.choice_R,
        state.exact_R,
        cuts.value_M,
        cuts.token_M,
        best_MX,
        vocab_size,
        E=state.stop_ids_RE.shape[1],
        GREEDY=greedy,
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=4,
        **options(pdl),
    )


def reduce_samples(best_MX: torch.Tensor, sampled_M: torch.Tensor, *, pdl: bool = False) -> None:
    """Writes every node's token (int64)."""
    num_nodes, splits = best_MX.shape
    check("best_MX", best_MX, torch.int64, num_nodes, splits)
    check("sampled_M", sampled_M, torch.int64, num_nodes)
    _reduce[(triton.cdiv(num_nodes, 16),)](
        best_MX,
        sampled_M,
        num_nodes,
        splits,
        BM=16,
        BX=triton.next_power_of_2(splits),
        PDL=pdl,
        num_warps=4,
        **options(pdl),
    )
