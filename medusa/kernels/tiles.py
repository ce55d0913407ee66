"""How products of a few rows with a large frozen matrix are cut: the plans that were fastest on a Hopper GPU
(docs/performance.md). Every plan fits an A100's shared memory with elements of 16 bits.

Shapes as in matmul.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medusa.quantization import QuantizedWeight

Weight = torch.Tensor | QuantizedWeight

LIBRARY_ROWS = 128  # rows from which the library's products are at least as fast as these
LARGEST_MATRIX = 2**31  # elements: offsets are of 32 bits
LIBRARY_COLUMNS = 16384  # columns from which 64 rows still are ours


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows of X and of W and columns of both a program takes at a time, splits of K, pipeline
    stages and warps."""

    rows_x: int
    rows_w: int
    columns: int
    splits: int = 1
    stages: int = 4
    warps: int = 4


def plan_product(num_rows: int, num_out: int, size: int, *, may_split: bool) -> Tiles | None:
    """The tiles that were fastest for such a product on a Hopper GPU (docs/performance.md); None where the library's
    own product is. `may_split`: whether the result may come as partial sums. Every plan fits an A100's shared memory
    with elements of 16 bits."""
    if num_rows > LIBRARY_ROWS or num_out * size >= LARGEST_MATRIX:
        return None
    rows_x = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64 if num_rows <= 64 else 128
    if may_split and size >= 1024:
        if rows_x == 128:
            return (
                Tiles(128, 64, 128, splits=2, stages=3, warps=8)
                if size < 8192
                else Tiles(128, 64, 64, splits=4, stages=4)
            )
        return Tiles(rows_x, 64, 128, splits=2, stages={16: 6, 32: 5, 64: 4}[rows_x])
    if num_out >= LIBRARY_COLUMNS:
        return Tiles(rows_x, 64, 128, stages=4 if rows_x <= 32 else 3)
    if rows_x == 16:
        return Tiles(16, 128, 128, stages=4, warps=8)
    return Tiles(rows_x, 128, 64, stages=6, warps=rows_x // 8) if rows_x <= 64 else None


def plan_gated(num_rows: int) -> Tiles | None:
    """The same for a gated product."""
    if num_rows <= 16:
        return Tiles(16, 32, 128, stages=3, warps=2)
    return Tiles(32 if num_rows <= 32 else 64, 64, 64, stages=4) if num_rows <= 64 else None


def plan_quantized(num_rows: int, num_out: int, size: int, *, may_split: bool) -> Tiles:
    """The same for a weight of one byte a value. The library has no such product, so there is always a plan.

    Few rows take 32 rows of W and two warps a program, of which each widens values of its own; four would widen each
    value twice, and four on 64 rows take another way to the tensor cores, which was slower.
    """
    splits = 4 if may_split and size >= 1024 and num_rows <= LIBRARY_ROWS else 1
    if num_rows <= 32:
        return Tiles(16 if num_rows <= 16 else 32, 32, 128, splits, stages=4, warps=2)
    if num_rows <= 64:
        return Tiles(64, 64, 128, splits, stages=3 if num_out >= LIBRARY_COLUMNS else 4)
    if num_rows <= LIBRARY_ROWS:
        return Tiles(128, 64, 128 if splits > 1 else 64, splits, stages=3)
    return Tiles(128, 128, 64, stages=4, warps=8)


def plan_of(num_rows: int, weight: Weight, *, may_split: bool) -> Tiles | None:
    """The plan for a weight of either kind."""
    plan = plan_quantized if isinstance(weight, QuantizedWeight) else plan_product
    return plan(num_rows, *weight.shape, may_split=may_split)


def plan_gated_of(num_rows: int, weight: Weight) -> Tiles | None:
    """The same for a gated product; None: take `product` and gate after it."""
    if isinstance(weight, QuantizedWeight):
        return Tiles(16, 32, 128, stages=6, warps=2) if num_rows <= 16 else None
    return plan_gated(num_rows)
