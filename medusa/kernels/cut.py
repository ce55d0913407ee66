"""Where top-k, top-p and min-p cut each restricted node's distribution, exactly, without a sort.

A node's cut is the lowest scaled logit that stays and, of the tokens equal to it, the last that stays. It is found by
search over order-preserving integer keys of the logits: a pass over the vocabulary weighs the tokens above three keys
at once and so quarters the range of keys. Equal logits of 16 bits stay equal over temperature, so their keys are cut
to the bits that they have: 8 passes instead of 16. One program a node; a node without restriction costs nothing.

Order as in vLLM: min-p, then top-k, then top-p over what is left; of equal logits the first tokens stay.
Shapes: M flat nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check, check_logits
from medusa.kernels.launch import await_inputs, options, order_key
from medusa.kernels.logits import is_restricted, load_scaled, may_not_stop
from medusa.kernels.state import Drafts, RowState

BLOCK = 4096  # with 16 warps: no spills, and a pass of 32,000 logits is 8 rounds
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # low bits of a key that say nothing


@dataclass(frozen=True)
class Cuts:
    """A token stays where its scaled logit is above `value_M`, or equal and its id at most `token_M`.

    Written for restricted nodes only."""

    value_M: torch.Tensor
    token_M: torch.Tensor

    @classmethod
    def empty(cls, num_nodes: int, device: torch.device) -> Cuts:
        return cls(
            torch.zeros(num_nodes, dtype=torch.float32, device=device),
            torch.zeros(num_nodes, dtype=torch.int32, device=device),
        )


@triton.jit
def _load_keys(base, v, V, temperature, early, stops, E: tl.constexpr, SHIFT: tl.constexpr):
    """Tokens v's scaled logits and their keys."""
    logits, scaled = load_scaled(base, v, V, temperature, early, stops, E)
    if SHIFT == 0:
        return scaled, order_key(scaled)
    else:
        return scaled, order_key(logits) >> SHIFT


@triton.jit
def _search(
    target,
    low,
    high,
    best,
    floor,
    base,
    V,
    temperature,
    early,
    stops,
    E: tl.constexpr,
    SHIFT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key t with weight(keys >= t, not below `floor`) >= target, given that `low` has it and `high` not.

    A token weighs 1 (COUNT) or its exp(scaled - best). Keys are int64 here, as a range may not fit 32 bits.
    """
    while high - low > 1:
        step = (high - low + 3) // 4
        t1 = low + step
        t2 = tl.minimum(t1 + step, high)
        t3 = tl.minimum(t2 + step, high)
        above1 = tl.zeros([BLOCK], tl.float32)
        above2 = tl.zeros([BLOCK], tl.float32)
        above3 = tl.zeros([BLOCK], tl.float32)
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            scaled, key = _load_keys(base, v, V, temperature, early, stops, E, SHIFT)
            weight = tl.where((v < V) & (scaled >= floor), 1.0 if COUNT else tl.exp(scaled - best), 0.0)
            above1 += tl.where(key >= t1.to(tl.int32), weight, 0.0)
            above2 += tl.where(key >= t2.to(tl.int32), weight, 0.0)
            above3 += tl.where(key >= t3.to(tl.int32), weight, 0.0)
        has1 = (tl.sum(above1, 0) >= target) & (t1 < high)
        has2 = (tl.sum(above2, 0) >= target) & (t2 < high)
        has3 = (tl.sum(above3, 0) >= target) & (t3 < high)
        high = tl.where(has3, high, tl.where(has2, t3, tl.where(has1, t2, t1)))
        low = tl.where(has3, t3, tl.where(has2, t2, tl.where(has1, t1, low)))
    return low


@triton.jit
def _around(
    cut,
    best,
    floor,
    base,
    V,
    temperature,
    early,
    stops,
    E: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number and mass of the tokens above key `cut`, the number at it, and the scaled logit there."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.int32)
    value = tl.full([BLOCK], -float("inf"), tl.float32)
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        scaled, key = _load_keys(base, v, V, temperature, early, stops, E, SHIFT)
        stays = (v < V) & (scaled >= floor)
        above = stays & (key > cut.to(tl.int32))
        at = stays & (key == cut.to(tl.int32))
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(scaled - best), 0.0)
        equal += at.to(tl.int32)
        value = tl.maximum(value, tl.where(at, scaled, -float("inf")))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.sum(equal, 0), tl.max(value, 0)


@triton.jit
def _nth_equal(number, value, base, V, temperature, early, stops, E: tl.constexpr, BLOCK: tl.constexpr):
    """The id of the number-th token (from 1) whose scaled logit is `value`."""
    seen = number * 0
    token = number * 0
    for first in range(0, V, BLOCK):
        v = first + tl.arange(0, BLOCK)
        _, scaled = load_scaled(base, v, V, temperature, early, stops, E)
        equal = ((v < V) & (scaled == value)).to(tl.int32)
        place = seen + tl.cumsum(equal, 0)
        token += tl.sum(tl.where((equal != 0) & (place == number), v, 0), 0)
        seen += tl.sum(equal, 0)
    return token


@triton.jit
def _cut(
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
    CUT_VALUE,
    CUT_TOKEN,
    V,
    E: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    m = tl.program_id(0)
    row = tl.load(ROW + m)
    if (tl.load(VALID + m) != 0) & is_restricted(row, TEMPERATURE, TOP_P, TOP_K, MIN_P):
        early = may_not_stop(row, tl.load(POSITION + m), LENGTH, NUM_OUTPUT, MIN_TOKENS)
        temperature = tl.load(TEMPERATURE + row)
        top_k, top_p, min_p = tl.load(TOP_K + row), tl.load(TOP_P + row), tl.load(MIN_P + row)
        base = LOGITS + m.to(tl.int64) * stride_m
        stops = STOP + row * E
        highest = tl.full([BLOCK], -float("inf"), tl.float32)
        top_key = tl.full([BLOCK], -(2**31), tl.int32)
        for first in range(0, V, BLOCK):
            v = first + tl.arange(0, BLOCK)
            scaled, key = _load_keys(base, v, V, temperature, early, stops, E, SHIFT)
            highest = tl.maximum(highest, scaled)
            top_key = tl.maximum(top_key, key)
        best = tl.max(highest, 0)
        beyond = tl.max(top_key, 0).to(tl.int64) + 1
        floor = tl.where(min_p > 0.0, best + tl.log(tl.where(min_p > 0.0, min_p, 1.0)), -float("inf"))
        # Nothing is cut but by min-p: the key of -inf, above which everything counts.
        cut = tl.zeros_like(beyond) + (-2139095041 >> SHIFT)
        count, mass, equal, value = _around(cut, best, floor, base, V, temperature, early, stops, E, SHIFT, BLOCK)
        kept = equal
        if (top_k > 0) & (top_k < count + equal):
            cut = _search(
                top_k.to(tl.float32),
                cut,
                beyond,
                best,
                floor,
                base,
                V,
                temperature,
                early,
                stops,
                E,
                SHIFT,
                True,
                BLOCK,
            )
            count, mass, equal, value = _around(cut, best, floor, base, V, temperature, early, stops, E, SHIFT, BLOCK)
            kept = top_k - count
        if top_p < 1.0:
            limit, allowed = cut, kept
            target = top_p * (mass + kept.to(tl.float32) * tl.exp(value - best))
            cut = _search(target, cut, beyond, best, floor, base, V, temperature, early, stops, E, SHIFT, False, BLOCK)
            count, mass, equal, value = _around(cut, best, floor, base, V, temperature, early, stops, E, SHIFT, BLOCK)
            allowed = tl.where(cut == limit, allowed, equal)
            wanted = tl.ceil((target - mass) / tl.exp(value - best))
            kept = tl.maximum(tl.minimum(wanted, allowed.to(tl.float32)), 1.0).to(tl.int32)
        token = tl.zeros_like(kept) + V
        if kept < equal:
            token = _nth_equal(kept, value, base, V, temperature, early, stops, E, BLOCK)
        tl.store(CUT_VALUE + m, tl.maximum(value, floor))
        tl.store(CUT_TOKEN + m, token)


def find_cuts(logits_MV: torch.Tensor, drafts: Drafts, state: RowState, cuts: Cuts, *, pdl: bool = False) -> None:
    """Writes the cuts of the valid nodes whose rows draw (temperature above 0) under top-k, top-p or min-p."""
    num_nodes, vocab_size = logits_MV.shape
    check_logits("logits_MV", logits_MV, 2)
    check("tokens_M", drafts.tokens_M, torch.int64, num_nodes)
    check("cuts.value_M", cuts.value_M, torch.float32, num_nodes)
    check("cuts.token_M", cuts.token_M, torch.int32, num_nodes)
    _cut[(num_nodes,)](
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
        cuts.value_M,
        cuts.token_M,
        vocab_size,
        E=state.stop_ids_RE.shape[1],
        SHIFT=SHIFTS[logits_MV.dtype],
        BLOCK=BLOCK,
        PDL=pdl,
        num_warps=16,
        **options(pdl),
    )
