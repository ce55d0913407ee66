"""Putting the splits of an attention tile together, by their log-sum-exp (FlashDecoding), to the base of two.

Shapes: M flat nodes, H query heads, D head size, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.attention_plan import Scratch
from medusa.kernels.head_rows import store_rows
from medusa.kernels.launch import await_inputs, options


@triton.jit
def _merged(
    PART,
    LSE,
    at,
    across,
    live,
    d,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Rows `at` of all splits, which lie `across` rows apart, weighed by their log-sum-exp. The loads of up to eight
    splits are under way at once."""
    TOGETHER: tl.constexpr = SPLITS if SPLITS < 8 else 8
    peak = tl.full([BM], -1e30, tl.float32)
    for first in range(0, SPLITS, TOGETHER):
        for s in tl.static_range(TOGETHER):
            there = live & (first + s < SPLITS)
            lse = tl.load(LSE + (first + s) * across + at, mask=there, other=-float("inf"), cache_modifier=".cg")
            peak = tl.maximum(peak, lse)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for first in range(0, SPLITS, TOGETHER):
        for s in tl.static_range(TOGETHER):
            there = live & (first + s < SPLITS)
            row = (first + s) * across + at
            lse = tl.load(LSE + row, mask=there, other=-float("inf"), cache_modifier=".cg")
            weight = tl.exp2(lse - peak)
            columns = there[:, None] & (d < D)[None, :]
            part = tl.load(PART + row[:, None] * D + d[None, :], mask=columns, other=0.0, cache_modifier=".cg")
            acc += part * weight[:, None]
            total += weight
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def merge_in_place(
    PART,
    LSE,
    counter,
    out,
    flat,
    head,
    live,
    d,
    num_nodes,
    SPLITS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
):
    """Last call of a program that has written its share: the last of a tile's to arrive merges them, in their order."""
    tl.debug_barrier()  # all of this program's stores come before its count
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:
        tl.store(counter, 0)
        store_rows(out, _merged(PART, LSE, flat * H + head, num_nodes * H, live, d, SPLITS, D, BD, BM), live, d, D, BD)


@triton.jit(do_not_specialize=["num_nodes"])
def _merge_all(
    PART,
    LSE,
    OUT,
    so_m,
    so_h,
    num_nodes,
    SPLITS: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HB: tl.constexpr,
    PDL: tl.constexpr,
):
    """The merge as a launch of its own: a program a node and HB heads."""
    node = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, BD)
    live = head < H
    await_inputs(PDL)
    found = _merged(PART, LSE, node * H + head, num_nodes * H, live, d, SPLITS, D, BD, HB)
    store_rows(OUT + node * so_m + head[:, None] * so_h + d[None, :], found, live, d, D, BD)


def merge_splits(scratch: Scratch, splits: int, out_MHD: torch.Tensor, *, pdl: bool) -> None:
    """Merges what a launch of so many splits left in `scratch` for every node and head."""
    num_nodes, heads, size = out_MHD.shape
    block = min(8, triton.next_power_of_2(heads))
    _merge_all[(num_nodes, triton.cdiv(heads, block))](
        scratch.part, scratch.lse, out_MHD, out_MHD.stride(0), out_MHD.stride(1), num_nodes, SPLITS=splits,
        H=heads, D=size, BD=triton.next_power_of_2(size), HB=block, PDL=pdl, num_warps=4, **options(pdl),
    )  # fmt: skip
