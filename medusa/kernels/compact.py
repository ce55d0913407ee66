"""Moves the keys and values of a step's accepted nodes next to the committed ones, over all layers in one launch.

A step writes node n of a sequence at its committed length + n; the d-th node of the accepted path belongs at length +
d. Parents come before children, so path[d] >= d and rising: every source lies at or behind its target. A program reads
all its sources before it writes the first target, which makes the move safe in place.

Shapes: B sequences, R batch rows, P pages of a row, D deepest depth + 1; the cache is [layers, 2, pages, page size,
heads, head size].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.launch import await_inputs, options
from medusa.kernels.state import Emitted

TILE = 8192  # elements a program moves: 8 warps' registers hold them without spilling


@triton.jit
def _compact(
    CACHE,
    TABLES,
    ROWS,
    PATH,
    NUM,
    LENGTH,
    plane,
    P,
    D: tl.constexpr,
    BD: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    b = tl.program_id(1)
    num = tl.load(NUM + b)
    if num > 1:
        row = tl.load(ROWS + b)
        base = tl.load(LENGTH + row) - num
        d = tl.arange(0, BD)
        node = tl.load(PATH + b * D + d, mask=d < D, other=-1)
        moves = (d < num) & (node > d)
        if tl.max(moves.to(tl.int32), 0) != 0:
            source, target = base + tl.where(moves, node, 0), base + d
            table = TABLES + row.to(tl.int64) * P
            source_page = tl.load(table + source // PAGE, mask=moves, other=0).to(tl.int64)
            target_page = tl.load(table + target // PAGE, mask=moves, other=0).to(tl.int64)
            e = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
            mask = moves[:, None] & (e < SIZE)[None, :]
            layer = CACHE + tl.program_id(0).to(tl.int64) * plane + e[None, :]
            found = tl.load(layer + ((source_page * PAGE + source % PAGE) * SIZE)[:, None], mask=mask)
            tl.debug_barrier()  # a target may be another thread's source
            tl.store(layer + ((target_page * PAGE + target % PAGE) * SIZE)[:, None], found, mask=mask)


def compact(
    cache: torch.Tensor,
    tables_RP: torch.Tensor,
    rows_B: torch.Tensor,
    emitted: Emitted,
    length_R: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Runs after the walk, which has moved `length_R` on by `num_B`. `tables_RP` is int32."""
    layers, two, _, page_size, heads, head_size = cache.shape
    if two != 2 or not cache.is_contiguous():
        raise ValueError(f"the cache must be contiguous [layers, 2, pages, page size, heads, head size], {cache.shape}")
    (batch,), num_depths = rows_B.shape, emitted.path_BD.shape[1]
    check("rows_B", rows_B, torch.int32, batch)
    check("path_BD", emitted.path_BD, torch.int32, batch, num_depths)
    check("length_R", length_R, torch.int64, None)
    check("tables_RP", tables_RP, torch.int32, length_R.shape[0], None)
    size, depths = heads * head_size, triton.next_power_of_2(num_depths)
    block = min(TILE // depths, triton.next_power_of_2(size))
    _compact[(layers * 2, batch, triton.cdiv(size, block))](
        cache,
        tables_RP,
        rows_B,
        emitted.path_BD,
        emitted.num_B,
        length_R,
        cache.stride(1),
        tables_RP.shape[1],
        D=num_depths,
        BD=depths,
        PAGE=page_size,
        SIZE=size,
        BLOCK=block,
        PDL=pdl,
        num_warps=8,
        **options(pdl),
    )


def compact_reference(
    cache: torch.Tensor, tables_RP: torch.Tensor, rows_B: torch.Tensor, emitted: Emitted, length_R: torch.Tensor
) -> torch.Tensor:
    """A new cache with the nodes moved, in plain torch."""
    moved, page_size = cache.clone(), cache.shape[3]
    for b, row in enumerate(rows_B.tolist()):
        num = int(emitted.num_B[b])
        for d in range(num):
            base = int(length_R[row]) - num
            source, target = base + int(emitted.path_BD[b, d]), base + d
            pages = tables_RP[row]
            found = cache[:, :, pages[source // page_size], source % page_size]
            moved[:, :, pages[target // page_size], target % page_size] = found
    return moved
