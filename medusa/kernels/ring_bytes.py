"""Products of up to 128 rows with weights of one byte on Hopper that keep memory busy: launches ring_bytes.cu.

As ring_product.py, but the matrix is the operand that the tensor cores take from registers, where warps widen it. Its
plain twin is matmul.py's product of a quantised weight, which every other device takes.

Shapes: M rows of X, N rows of W (columns of the result), K the reduced axis, S splits of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from medusa.kernels.hopper import HALF_TYPES, ROW_COLUMNS, SHARED_BYTES, launch, source_of, tensor_map
from medusa.kernels.ring import ahead_of, check_result, check_rows, rows_there
from medusa.kernels.tiles import BYTE_COLUMNS, RING_ROWS, ROW_UNIT, RingTiles, most_rows_of_bytes
from medusa.quantization import LARGEST, QuantizedWeight


@dataclass(frozen=True)
class BytesKernel:
    """What the kernel is compiled for; `dtype` is of X, `stored` of the matrix."""

    tiles: RingTiles
    halves: int
    pdl: bool
    dtype: torch.dtype
    stored: torch.dtype

    @property
    def name(self) -> str:
        return "ring_bytes"

    @property
    def sets(self) -> int:
        """Of warpgroups that share the columns of a tile: two, where that many threads have registers enough."""
        return 2 if self._groups <= 2 and self.tiles.rows_x <= 96 else 1

    @property
    def warpgroups(self) -> int:
        """That multiply, each up to 64 rows of W."""
        return self._groups * self.sets

    @property
    def rows_w(self) -> int:
        """Of both halves."""
        return self.halves * self.tiles.rows_w

    @property
    def _groups(self) -> int:
        return -(-self.rows_w // 64)

    @property
    def threads(self) -> int:
        return self.warpgroups * 128 + 64

    @property
    def tile_bytes(self) -> int:
        """Of all that are under way."""
        return self.tiles.stages * (self.tiles.rows_x * 2 + self.rows_w) * BYTE_COLUMNS

    @property
    def sum_stride(self) -> int:
        """Between rows of the sums that meet where the ring was: those of a warp then lie in banks of their own."""
        return -(-self.rows_w // 16) * 16 + 4

    @property
    def sum_bytes(self) -> int:
        return self.sets * self.tiles.rows_x * self.sum_stride * 4

    @property
    def shared_bytes(self) -> int:
        barriers = self.tiles.stages * 3 + 1
        return self.tile_bytes + self.rows_w * 4 + barriers * 8  # each row has a scale

    @property
    def source(self) -> str:
        tiles = self.tiles
        defined: dict[str, int | str] = {
            "WARPGROUPS": self.warpgroups, "SETS": self.sets, "ROWS_X": tiles.rows_x, "FEATURES": tiles.rows_w,
            "HALVES": self.halves, "SPLITS": tiles.splits, "STAGES": tiles.stages,
            "SUM_STRIDE": self.sum_stride,
            "AHEAD": ahead_of(tiles.rows_x), "PDL": int(self.pdl),
            "IS_E4M3": int(self.stored == torch.float8_e4m3fn), "OUT_TYPE": "float" if tiles.splits > 1 else "u16",
        }  # fmt: skip
        return source_of(self.name, defined, self.dtype, _multiply(tiles.rows_x, HALF_TYPES[self.dtype]))


def _multiply(rows_x: int, half: str) -> str:
    """The tensor cores' instruction for 64 rows of W in registers and so many of X: its registers are named one by
    one."""
    count = rows_x // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    pairs = ", ".join(f"%{count + i}" for i in range(4))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(w[{i}])' for i in range(4))
    return (
        f"__device__ __forceinline__ void multiply(float (&sums)[{count}], const unsigned int (&w)[4],"
        " unsigned long long x) {"
        f' asm volatile("wgmma.mma_async.sync.aligned.m64n{rows_x}k16.f32.{half}.{half}'
        f' {{{registers}}}, {{{pairs}}}, %{count + 4}, 1, 1, 1, 0;" : {sums} : {inputs}, "l"(x)); }}'
    )


def ring_bytes(
    x: torch.Tensor,
    weight: QuantizedWeight,
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
    kernel = BytesKernel(tiles, halves, pdl, x.dtype, weight.values.dtype)
    _check(x, weight, out, kernel, bias)
    maps = [
        tensor_map(
            weight.values, [size, num_out, halves], [size, num_out * size], [BYTE_COLUMNS, tiles.rows_w, halves]
        ),
        tensor_map(x, [size, rows_there(x, tiles.rows_x)], [x.stride(0)], [ROW_COLUMNS, tiles.rows_x]),
    ]
    others = [
        ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(weight.scale.data_ptr()),
        ctypes.c_void_p(0 if bias is None else bias.data_ptr()),
        ctypes.c_int(num_rows), ctypes.c_int(num_out), ctypes.c_int(-(-size // BYTE_COLUMNS)),
        ctypes.c_long(out.stride(-2)), ctypes.c_long(out.stride(0) if tiles.splits > 1 else 0),
    ]  # fmt: skip
    launch(kernel, x.device.index, (-(-num_out // tiles.rows_w), tiles.splits, 1), [*maps, *others])
    return out


def _check(
    x: torch.Tensor, weight: QuantizedWeight, out: torch.Tensor, kernel: BytesKernel, bias: torch.Tensor | None
) -> None:
    tiles, values, scale = kernel.tiles, weight.values, weight.scale
    check_rows(x, tiles)
    most = most_rows_of_bytes(tiles.rows_x)
    if tiles.rows_x % ROW_UNIT or tiles.rows_x > RING_ROWS or tiles.rows_w % ROW_UNIT or kernel.rows_w > most:
        raise ValueError(
            f"tiles have multiples of {ROW_UNIT} rows of X, at most {RING_ROWS}, and of W, at most {most} in all; got"
            f" {tiles.rows_x} and {kernel.halves} x {tiles.rows_w}"
        )
    if tiles.stages < 2 or kernel.shared_bytes > SHARED_BYTES or kernel.sum_bytes > kernel.tile_bytes:
        raise ValueError(
            f"{tiles.stages} tiles of {tiles.rows_w} rows of W take {kernel.shared_bytes} bytes of shared memory; a"
            f" program has {SHARED_BYTES}, takes at least 2 tiles, and leaves {kernel.sum_bytes} bytes of sums there"
        )
    check_result(out, tiles, bias, gated=kernel.halves == 2)
    if not values.is_contiguous() or scale.dtype != torch.float32 or scale.shape != (len(values),):
        raise ValueError(
            "W must be contiguous, with one float32 scale a row; got strides"
            f" {values.stride()} of {tuple(values.shape)} and scales {tuple(scale.shape)} in {scale.dtype}"
        )
    if out.stride(-2) % 8 or out.data_ptr() % 16:
        raise ValueError(f"rows of out must start at multiples of 16 bytes; got stride {out.stride(-2)}")
    half = x.dtype if x.dtype in HALF_TYPES else torch.bfloat16
    wanted = [half, torch.float32 if tiles.splits > 1 else half, *[half] * (bias is not None)]
    dtypes = [x.dtype, out.dtype, *([bias.dtype] if bias is not None else [])]
    if dtypes != wanted or values.dtype not in LARGEST:
        raise ValueError(f"X, out and bias must be {wanted}, W of one byte a value; got {dtypes} and {values.dtype}")
