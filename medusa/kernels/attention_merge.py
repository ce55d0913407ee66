"""Putting the splits of an attention tile together, by their log-sum-exp (FlashDecoding).

Shapes: M flat nodes, H query heads, D head size, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.attention_plan import Scratch
from medusa.kernels.launch import await_inputs, options


@triton.jit
def store_rows(pointers, values, inside, d, D: tl.constexpr, BD: tl.constexpr):
    if D == BD:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def merge_tile(
    PART,
    LSE,
    out,
    flat,
    head,
    live,
    d,
    num_nodes,
    SPLITS,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Weighs the splits of a tile by their log-sum-exp, TOGETHER of them read at once."""
    peak = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for first in tl.range(0, SPLITS, TOGETHER):
        s = first + tl.arange(0, TOGETHER)
        at = (s[:, None] * num_nodes + flat[None, :]) * H + head[None, :]
        inside = (s < SPLITS)[:, None] & live[None, :]
        lse = tl.load(LSE + at, mask=inside, other=-float("inf"), cache_modifier=".cg")
        columns = inside[:, :, None] & (d < D)[None, None, :]
        part = tl.load(PART + at[:, :, None] * D + d[None, None, :], mask=columns, other=0.0, cache_modifier=".cg")
        new = tl.maximum(peak, tl.max(lse, 0))
        shrink = tl.exp(peak - new)
        weight = tl.exp(lse - new[None, :])
        acc = acc * shrink[:, None] + tl.sum(part * weight[:, :, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        peak = new
    store_rows(out, acc / tl.where(total > 0, total, 1.0)[:, None], live, d, D, BD)


@triton.jit(do_not_specialize=["SPLITS", "num_nodes"])
def _merge_all(
    PART,
    LSE,
    OUT,
    so_m,
    so_h,
    num_nodes,
    SPLITS,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    HB: tl.constexpr,
    PDL: tl.constexpr,
):
    """The merge as a launch of its own: a program a node and HB heads."""
    head = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, BD)
    flat = tl.program_id(0).to(tl.int64) + tl.zeros([HB], tl.int64)
    out = OUT + flat[:, None] * so_m + head[:, None] * so_h + d[None, :]
    await_inputs(PDL)
    merge_tile(PART, LSE, out, flat, head, head < H, d, num_nodes, SPLITS, H, D, BD, HB, 64 // HB)


def merge_splits(scratch: Scratch, splits: int, out_MHD: torch.Tensor, *, pdl: bool) -> None:
    """Merges what a launch of so many splits left in `scratch` for every node and head."""
    num_nodes, heads, size = out_MHD.shape
    block = min(8, triton.next_power_of_2(heads))
    _merge_all[(num_nodes, triton.cdiv(heads, block))](
        scratch.part, scratch.lse, out_MHD, out_MHD.stride(0), out_MHD.stride(1), num_nodes, splits,
        H=heads, D=size, BD=triton.next_power_of_2(size), HB=block, PDL=pdl, num_warps=4, **options(pdl),
    )  # fmt: skip
