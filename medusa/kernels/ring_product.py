"""Products of up to 128 rows on Hopper that keep memory busy: launches ring_product.cu.

Triton's pipelined loops (matmul.py) begin to stream a matrix when the kernel ahead has ended, and for 64 rows do so
below the speed of memory: the warps that multiply are those that load. Here warps of their own load, by the hardware's
tensor copies, and before that. Their plain twin is matmul.py, which every other device takes.

Shapes: M rows of X, N rows of W (columns of the result), K the reduced axis, S splits of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from medusa.kernels.hopper import HALF_TYPES, ROW_COLUMNS, SHARED_BYTES, launch, source_of, tensor_map
from medusa.kernels.ring import ahead_of, check_result, check_rows, rows_there
from medusa.kernels.tiles import ROW_UNIT, RingTiles, multiplied_rows


@dataclass(frozen=True)
class ProductKernel:
    """What the kernel is compiled for."""

    tiles: RingTiles
    halves: int
    pdl: bool
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "ring_product"

    @property
    def warpgroups(self) -> int:
        """That multiply, each 64 rows of X."""
        return multiplied_rows(self.tiles.rows_x) // 64

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + 64

    @property
    def shared_bytes(self) -> int:
        tile = (self.tiles.rows_x + self.halves * self.tiles.rows_w) * ROW_COLUMNS * 2
        return self.tiles.stages * (tile + 3 * 8) + 8  # and three barriers, and one for all

    @property
    def source(self) -> str:
        tiles = self.tiles
        defined: dict[str, int | str] = {
            "WARPGROUPS": self.warpgroups, "ROWS_X": tiles.rows_x, "FEATURES": tiles.rows_w,
            "HALVES": self.halves, "SPLITS": tiles.splits,
            "STAGES": tiles.stages, "AHEAD": ahead_of(tiles.rows_x), "PDL": int(self.pdl),
            "OUT_TYPE": "float" if tiles.splits > 1 else "u16",
        }  # fmt: skip
        multiply = _multiply(self.halves * tiles.rows_w, HALF_TYPES[self.dtype])
        return source_of(self.name, defined, self.dtype, multiply)


def _multiply(rows_w: int, half: str) -> str:
    """The tensor cores' instruction for 64 rows of X and so many of W: its registers are named one by one."""
    count, address = rows_w // 2, "unsigned long long"
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return (
        f"__device__ __forceinline__ void multiply(float (&sums)[{count}], {address} x, {address} w) {{"
        f' asm volatile("wgmma.mma_async.sync.aligned.m64n{rows_w}k16.f32.{half}.{half}'
        f' {{{registers}}}, %{count}, %{count + 1}, 1, 1, 1, 0, 0;" : {sums} : "l"(x), "l"(w)); }}'
    )


def ring_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    tiles: RingTiles,
    bias: torch.Tensor | None = None,
    *,
    gated: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed: into out [M, N], or with splits partial sums [S, M, N] in float32.
    `gated`: weight is gate above up [2N, K], and out silu(gate) * up. A bias goes with a whole product only. ValueError
    for tensors or tiles that the kernel does not take."""
    halves = 2 if gated else 1
    (num_rows, size), num_out = x.shape, weight.shape[0] // halves
    kernel = ProductKernel(tiles, halves, pdl, x.dtype)
    _check(x, weight, out, kernel, bias)
    row = weight.stride(0)
    maps = [
        tensor_map(weight, [size, num_out, halves], [row, num_out * row], [ROW_COLUMNS, tiles.rows_w, halves]),
        tensor_map(x, [size, rows_there(x, tiles.rows_x)], [x.stride(0)], [ROW_COLUMNS, tiles.rows_x]),
    ]
    others = [
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_int(num_rows), ctypes.c_int(num_out), ctypes.c_int(-(-size // ROW_COLUMNS)),
        ctypes.c_long(out.stride(-2)), ctypes.c_long(out.stride(0) if tiles.splits > 1 else 0),
    ]  # fmt: skip
    launch(kernel, x.device.index, (-(-num_out // tiles.rows_w), tiles.splits, 1), [*maps, *others])
    return out


def _check(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, kernel: ProductKernel, bias: torch.Tensor | None
) -> None:
    tiles = kernel.tiles
    check_rows(x, tiles)
    rows_w, multiplied = kernel.halves * tiles.rows_w, 64 * kernel.warpgroups
    if tiles.rows_x % ROW_UNIT or rows_w % ROW_UNIT or not multiplied <= tiles.rows_x + rows_w:
        raise ValueError(
            f"tiles have multiples of {ROW_UNIT} rows of X and of W, together {multiplied} or more; got {tiles.rows_x}"
            f" and {rows_w}"
        )
    if tiles.stages < 2 or kernel.shared_bytes > SHARED_BYTES:
        raise ValueError(
            f"{tiles.stages} tiles of {rows_w} rows of W take {kernel.shared_bytes} bytes of shared memory; a program"
            f" has {SHARED_BYTES}, and takes at least 2 tiles"
        )
    check_result(out, tiles, bias, gated=kernel.halves == 2)
    wanted = [x.dtype, x.dtype, torch.float32 if tiles.splits > 1 else x.dtype, *[x.dtype] * (bias is not None)]
    dtypes = [x.dtype, weight.dtype, out.dtype, *([bias.dtype] if bias is not None else [])]
    if x.dtype not in HALF_TYPES or dtypes != wanted:
        raise ValueError(f"X, W, out and bias must be {wanted}, of 16 bits a value; got {dtypes}")
