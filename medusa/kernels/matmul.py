"""Products of a few rows with a large frozen matrix: what a decoding step spends its time on.

The matrix is read once from memory, so such a product costs its bytes, and everything here serves to keep reads in
flight: the weight tile is the tall operand (rows of W fill the tensor cores even for one row of X), and the reduction
is split over programs where there would be too few of them.

A quantised weight (medusa/quantization.py) halves those bytes: its tile becomes X's dtype on the way to the tensor
cores, and the scale of a row of W is applied to float32 sums, so that no whole copy of it is ever made.

Shapes: M rows of X, N rows of W (columns of the result), K the reduced axis, S splits of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.launch import await_inputs, options
from medusa.kernels.ring_bytes import ring_bytes
from medusa.kernels.ring_product import ring_product
from medusa.kernels.tiles import RingTiles, Tiles, Weight, plan_of, rows_read
from medusa.kernels.widen import widened
from medusa.quantization import QuantizedWeight

AHEAD_COLUMNS = 256  # of each row of the weight, fetched while the kernel before ends


@triton.jit
def _ask_ahead(rows, W, AHEAD: tl.constexpr):
    """Asks for the first AHEAD values of each row to be brought into L2, without waiting for them."""
    if AHEAD > 0:
        line: tl.constexpr = 1024 // W.dtype.element_ty.primitive_bitwidth  # values in 128 bytes
        address = (rows[:, None] + tl.arange(0, AHEAD // line)[None, :] * line).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _tile(
    X,
    W,
    m,
    n,
    k0,
    k1,
    M,
    N,
    sx,
    K: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
):
    """W[n, k0:k1] @ X[m, k0:k1].T, [BN, BM] in float32."""
    k = tl.arange(0, BK)
    acc = tl.zeros([BN, BM], tl.float32)
    for start in range(k0, k1, BK):
        at = start + k
        if EVEN:
            w = tl.load(W + n[:, None] * K + at[None, :], eviction_policy="evict_first")
            x = tl.load(X + m[:, None] * sx + at[None, :], mask=(m < M)[:, None], other=0.0)
        else:
            inside = at < k1
            w = tl.load(W + n[:, None] * K + at[None, :], mask=(n < N)[:, None] & inside[None, :], other=0.0)
            x = tl.load(X + m[:, None] * sx + at[None, :], mask=(m < M)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(widened(w, X.dtype.element_ty, PACKED), tl.trans(x), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["M"])
def _matmul(
    X,
    W,
    SCALE,
    BIAS,
    OUT,
    M,
    N,
    sx,
    so,
    so_split,
    K: tl.constexpr,
    PER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    k0 = tl.program_id(2) * PER
    _ask_ahead(W + n * K + k0, W, AHEAD)
    await_inputs(PDL)
    acc = _tile(X, W, m, n, k0, min(k0 + PER, K), M, N, sx, K, BK, BM, BN, EVEN, PRECISION, PACKED)
    if W.dtype.element_ty.primitive_bitwidth == 8:
        acc *= tl.load(SCALE + n, mask=n < N, other=0.0)[:, None]
    if HAS_BIAS:
        acc += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = OUT + tl.program_id(2) * so_split + m[None, :] * so + n[:, None]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
def _gated(
    X,
    W,
    SCALE,
    OUT,
    M,
    N,
    sx,
    so,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """silu(X @ W[:N].T) * (X @ W[N:].T): both halves of a gated MLP, so that neither is written out."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    _ask_ahead(W + n * K, W, AHEAD)
    _ask_ahead(W + N * K + n * K, W, AHEAD)
    await_inputs(PDL)
    k = tl.arange(0, BK)
    gate = tl.zeros([BN, BM], tl.float32)
    up = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        at = start + k
        if EVEN:
            wg = tl.load(W + n[:, None] * K + at[None, :], eviction_policy="evict_first")
            wu = tl.load(W + N * K + n[:, None] * K + at[None, :], eviction_policy="evict_first")
            x = tl.load(X + m[:, None] * sx + at[None, :], mask=(m < M)[:, None], other=0.0)
        else:
            inside = (n < N)[:, None] & (at < K)[None, :]
            wg = tl.load(W + n[:, None] * K + at[None, :], mask=inside, other=0.0)
            wu = tl.load(W + N * K + n[:, None] * K + at[None, :], mask=inside, other=0.0)
            x = tl.load(X + m[:, None] * sx + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0.0)
        x = tl.trans(x)
        gate = tl.dot(widened(wg, X.dtype.element_ty, PACKED), x, gate, input_precision=PRECISION)
        up = tl.dot(widened(wu, X.dtype.element_ty, PACKED), x, up, input_precision=PRECISION)
    if W.dtype.element_ty.primitive_bitwidth == 8:
        gate *= tl.load(SCALE + n, mask=n < N, other=0.0)[:, None]
        up *= tl.load(SCALE + N + n, mask=n < N, other=0.0)[:, None]
    out = gate * tl.sigmoid(gate) * up
    tl.store(OUT + m[None, :] * so + n[:, None], out.to(OUT.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def matmul(
    x: torch.Tensor,
    weight: Weight,
    out: torch.Tensor,
    tiles: Tiles,
    bias: torch.Tensor | None = None,
    *,
    pdl: bool = False,
) -> torch.Tensor:
    """x [M, K] times weight [N, K] transposed, written to out: [M, N], or with splits [S, M, N] partial sums in float32
    that the reader adds up (`add_norm`). A bias goes with a whole product only."""
    num_rows, (num_out, size) = x.shape[0], weight.shape
    values, scale = _parts(weight)
    splits = out.shape[0] if out.dim() == 3 else 1
    if splits != tiles.splits or (bias is not None and splits > 1):
        raise ValueError(
            f"{tiles.splits} splits write [S, M, N] without bias; got out {tuple(out.shape)}, bias {bias is not None}"
        )
    even = size % tiles.columns == 0 and num_out % tiles.rows_w == 0
    grid = (triton.cdiv(num_out, tiles.rows_w), triton.cdiv(num_rows, tiles.rows_x), splits)
    _matmul[grid](
        x, values, scale, bias, out, num_rows, num_out, x.stride(0), out.stride(-2), out.stride(0) if splits > 1 else 0,
        K=size, PER=_per_split(tiles, size), BM=tiles.rows_x, BN=tiles.rows_w, BK=tiles.columns, EVEN=even,
        HAS_BIAS=bias is not None, PRECISION=_precision(x), PACKED=x.is_cuda, AHEAD=_ahead(tiles, size, even, pdl),
        PDL=pdl, num_warps=tiles.warps, num_stages=_stages(tiles, x), **options(pdl),
    )  # fmt: skip
    return out


def product(
    x: torch.Tensor, weight: Weight, out: torch.Tensor, bias: torch.Tensor | None = None, *, pdl: bool = False
) -> torch.Tensor:
    """x @ weight.T (+ bias) into `out` [M, N] by whatever is fastest; into `out` [S, M, N] as partial sums, where S is
    what `plan_of` splits it into."""
    tiles = plan_of(len(x), weight, x.dtype, may_split=out.dim() == 3)
    target = out[0] if out.dim() == 3 and len(out) == 1 else out
    if isinstance(tiles, Tiles):
        return matmul(x, weight, target, tiles, bias, pdl=pdl)
    if isinstance(weight, QuantizedWeight):
        assert tiles is not None  # a quantised one always has a plan
        return ring_bytes(x, weight, target, tiles, bias, pdl=pdl)
    if tiles is not None:
        return ring_product(x, weight, target, tiles, bias, pdl=pdl)
    if bias is not None:
        return torch.addmm(bias, x, weight.t(), out=target)
    return torch.mm(x, weight.t(), out=target)


def rows_for_product(num_rows: int, *shape: int, like: torch.Tensor) -> torch.Tensor:
    """[num_rows, *shape] of anything, to be multiplied: in memory of as many rows as products read."""
    return like.new_empty(rows_read(num_rows), *shape)[:num_rows]


def gated(
    x: torch.Tensor, weight: Weight, out: torch.Tensor, tiles: Tiles | RingTiles, *, pdl: bool = False
) -> torch.Tensor:
    """silu(x @ gate.T) * (x @ up.T) -> out [M, N], where weight [2N, K] is gate above up."""
    if isinstance(tiles, RingTiles):
        if isinstance(weight, QuantizedWeight):
            return ring_bytes(x, weight, out, tiles, gated=True, pdl=pdl)
        return ring_product(x, weight, out, tiles, gated=True, pdl=pdl)
    num_rows, (num_both, size) = x.shape[0], weight.shape
    values, scale = _parts(weight)
    num_out = num_both // 2
    even = size % tiles.columns == 0 and num_out % tiles.rows_w == 0
    grid = (triton.cdiv(num_out, tiles.rows_w), triton.cdiv(num_rows, tiles.rows_x))
    _gated[grid](
        x, values, scale, out, num_rows, num_out, x.stride(0), out.stride(0),
        K=size, BM=tiles.rows_x, BN=tiles.rows_w, BK=tiles.columns, EVEN=even, PRECISION=_precision(x),
        PACKED=x.is_cuda, AHEAD=_ahead(tiles, size, even, pdl), PDL=pdl, num_warps=tiles.warps,
        num_stages=_stages(tiles, x), **options(pdl),
    )  # fmt: skip
    return out


def _parts(weight: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (weight.values, weight.scale) if isinstance(weight, QuantizedWeight) else (weight, None)


def _per_split(tiles: Tiles, size: int) -> int:
    """Columns of the weight that a split takes: whole tiles; the last may have fewer, or none."""
    return triton.cdiv(triton.cdiv(size, tiles.splits), tiles.columns) * tiles.columns


def _ahead(tiles: Tiles, size: int, even: bool, pdl: bool) -> int:
    """Columns of the weight to ask for before the inputs are there: with few rows the memory bus is idle then. None of
    a weight whose last split has fewer: the last row's would lie behind its end."""
    fits = (tiles.splits - 1) * _per_split(tiles, size) + AHEAD_COLUMNS <= size
    return AHEAD_COLUMNS if pdl and even and fits and tiles.rows_x == 16 else 0


def _precision(x: torch.Tensor) -> str:
    """float32 products are exact to float32; Triton's default for them would be tf32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _stages(tiles: Tiles, x: torch.Tensor) -> int:
    """Elements of 32 bits take twice the shared memory: half as many tiles are under way."""
    return max(1, tiles.stages * 2 // x.element_size())
