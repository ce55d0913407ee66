"""How products of a few rows with a large frozen matrix are cut: the plans that were fastest on a Hopper GPU
(docs/performance.md). `Tiles` are Triton's (matmul.py), and every plan of them fits an A100's shared memory with
elements of 16 bits; `RingTiles` are Hopper's own (ring_product.py, ring_bytes.py).

Shapes as in matmul.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from medusa.kernels.hopper import HALF_TYPES, ROW_COLUMNS, has_compiler
from medusa.kernels.launch import has_warpgroups
from medusa.quantization import QuantizedWeight

Weight = torch.Tensor | QuantizedWeight

LIBRARY_ROWS = 128  # rows from which the library's products are at least as fast as these
LARGEST_MATRIX = 2**31  # elements: offsets are of 32 bits
LIBRARY_COLUMNS = 16384  # columns from which 64 rows still are ours

RING_ROWS = 128  # of X, at most
ROW_UNIT = 8  # rows, of the swizzled layout
ROW_CLASSES = (8, 16, 32, 64, 96, RING_ROWS)  # rows of X in a tile: few, since a kernel is compiled for each
RING_BYTES = 224 * 1024  # of shared memory, which leaves room for the barriers
BYTE_COLUMNS = 128  # of a tile, where a value has one byte
BYTE_SPLITS = (
    4  # a program of a 7B model's out and down then has 128 rows of W, eight warps' worth; with two half as many
)
SHORT_RING_BYTES = 168 * 1024  # faster up to 32 rows of X, where tiles of the matrix are nearly all of the ring
EARLY_ROWS = 64  # up to which products by a ring start early: steps of 65 to 128 rows gained nothing by it, or lost


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


@dataclass(frozen=True)
class RingTiles:
    """How a product by a ring of tiles is cut: rows of X and of W that a program takes (of gate and of up each, where
    gated), splits of K and tiles under way."""

    rows_x: int
    rows_w: int
    splits: int
    stages: int


def plan_product(num_rows: int, num_out: int, size: int, *, may_split: bool) -> Tiles | None:
    """Of Triton's tiles those that were fastest for such a product on a Hopper GPU (docs/performance.md); None where
    the library's own product was. `may_split`: whether the result may come as partial sums. Every plan fits an A100's
    shared memory with elements of 16 bits."""
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


def plan_ring(
    num_rows: int, num_out: int, size: int, *, processors: int, may_split: bool = False, gated: bool = False
) -> RingTiles | None:
    """The same for a product by a ring: an even share of W for each multiprocessor. None where a share is too large for
    a program's registers, or less than half of the rows of X that the tensor cores multiply."""
    if not 0 < num_rows <= RING_ROWS or num_out % 8 or size % 8:
        return None
    halves = 2 if gated else 1
    multiplied = multiplied_rows(num_rows)
    # 4 of gate and of up cut W most evenly; by 8, which leaves some multiprocessors out, is faster with many rows of X.
    unit = 4 if gated and multiplied == 64 else 8
    most, fewest = 256 // halves, multiplied // (2 * halves)
    for splits in _ring_splits(multiplied, size) if may_split else (1,):
        rows_w = -(-num_out // max(1, processors // splits) // unit) * unit
        if fewest <= rows_w <= most:
            # What the tensor cores read for rows beyond those of X are the rows of W behind them.
            rows_x = max(_row_class(num_rows), multiplied - halves * rows_w)
            stages = RING_BYTES // ((rows_x + halves * rows_w) * ROW_COLUMNS * 2)
            return RingTiles(rows_x, rows_w, splits, stages)
    return None


def plan_ring_bytes(
    num_rows: int, num_out: int, size: int, *, processors: int, may_split: bool = False, gated: bool = False
) -> RingTiles | None:
    """The same for a weight of one byte a value, of which each of a program's warps has 16 rows to widen."""
    if not 0 < num_rows <= RING_ROWS or num_out % 8 or size % 16:
        return None
    halves, splits = 2 if gated else 1, BYTE_SPLITS if may_split and size >= 1024 else 1
    rows_w = -(-num_out // max(1, processors // splits) // ROW_UNIT) * ROW_UNIT
    rows_x = _row_class(num_rows)
    if not 32 <= halves * rows_w <= most_rows_of_bytes(rows_x):  # fewer are less than half of a warpgroup's
        return None
    room = SHORT_RING_BYTES if rows_x <= 32 else RING_BYTES
    return RingTiles(rows_x, rows_w, splits, room // ((2 * rows_x + halves * rows_w) * BYTE_COLUMNS))


def most_rows_of_bytes(rows_x: int) -> int:
    """Rows of W, of both halves, of whose sums a program's threads have registers enough."""
    return 256 if rows_x < RING_ROWS else 192


def multiplied_rows(num_rows: int) -> int:
    """Of X: a warpgroup's or two's."""
    return 64 if num_rows <= 64 else RING_ROWS


def rows_read(num_rows: int) -> int:
    """Rows of memory that X should have, for no ring to read beyond them: half of a warpgroup's at least, since shares
    of W have as many or more."""
    return max(32, _row_class(num_rows)) if num_rows <= RING_ROWS else num_rows


def _row_class(num_rows: int) -> int:
    return next(rows for rows in ROW_CLASSES if num_rows <= rows)


def _ring_splits(multiplied: int, size: int) -> tuple[int, ...]:
    """How many splits of K to try, in turn. Whoever adds up three partial sums reads a quarter less than of four, which
    are for matrices whose shares would otherwise have too few rows."""
    if size < 1024:
        return (1,)
    return (2,) if multiplied == 64 or size < 8192 else (3, 4)


def plan_of(num_rows: int, weight: Weight, dtype: torch.dtype, *, may_split: bool) -> Tiles | RingTiles | None:
    """The plan for a weight of either kind, on its device; `dtype` is of X."""
    if isinstance(weight, QuantizedWeight):
        bytes_ring = _ring_bytes_of(num_rows, weight, dtype, may_split=may_split)
        return bytes_ring or plan_quantized(num_rows, *weight.shape, may_split=may_split)
    ring = _ring_of(num_rows, weight, may_split=may_split)
    return ring or plan_product(num_rows, *weight.shape, may_split=may_split)


def plan_gated_of(num_rows: int, weight: Weight, dtype: torch.dtype) -> Tiles | RingTiles | None:
    """The same for a gated product, gate above up; None: take `product` and gate after it."""
    if isinstance(weight, QuantizedWeight):
        bytes_ring = _ring_bytes_of(num_rows, weight, dtype, gated=True)
        return bytes_ring or (Tiles(16, 32, 128, stages=6, warps=2) if num_rows <= 16 else None)
    return _ring_of(num_rows, weight, gated=True) or plan_gated(num_rows)


def starts_early(num_rows: int, tiles: Tiles | RingTiles | None) -> bool:
    """Whether the kernel ahead of a product should let it start before having its own inputs: a ring then fetches its
    matrix meanwhile. With Triton's products a step took longer so."""
    return isinstance(tiles, RingTiles) and num_rows <= EARLY_ROWS


def _ring_of(num_rows: int, weight: torch.Tensor, *, may_split: bool = False, gated: bool = False) -> RingTiles | None:
    if num_rows > RING_ROWS or weight.dtype not in HALF_TYPES or not _has_ring(weight):
        return None
    num_out, size = weight.shape
    return plan_ring(
        num_rows, num_out // 2 if gated else num_out, size,
        processors=_processors(weight.device), may_split=may_split, gated=gated,
    )  # fmt: skip


def _ring_bytes_of(
    num_rows: int, weight: QuantizedWeight, dtype: torch.dtype, *, may_split: bool = False, gated: bool = False
) -> RingTiles | None:
    if num_rows > RING_ROWS or dtype not in HALF_TYPES or not _has_ring(weight.values):
        return None
    num_out, size = weight.shape
    return plan_ring_bytes(
        num_rows, num_out // 2 if gated else num_out, size,
        processors=_processors(weight.values.device), may_split=may_split, gated=gated,
    )  # fmt: skip


def _has_ring(weight: torch.Tensor) -> bool:
    """Whether a ring can read the weight: on Hopper, whole rows from a multiple of 16 bytes on, and NVIDIA's compiler
    and driver within reach, which torch's builds for CUDA bring."""
    return has_warpgroups(weight.device) and weight.is_contiguous() and weight.data_ptr() % 16 == 0 and has_compiler()


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
