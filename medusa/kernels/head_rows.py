"""Rows of one head each, as attention's launches read, rotate and write them.

Shapes: D channels of a head, of a tile as wide as BD, the next power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(pointers, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D values; a mask over columns only where the head size is no power of two."""
    if D == BD:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(pointers, values, inside, d, D: tl.constexpr, BD: tl.constexpr):
    if D == BD:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def load_angles(POSITION, COS, SIN, sc, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """cos and sin of the positions at the pointers, for each channel of a head."""
    position = tl.load(POSITION, mask=inside, other=0)
    angle = position[:, None] * sc + (d % (D // 2))[None, :]
    return load_rows(COS + angle, inside, d, D, BD), load_rows(SIN + angle, inside, d, D, BD)


@triton.jit
def load_rotated(rows, cos, sin, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """Heads at the pointers `rows`, rotated in float32 and rounded once."""
    half: tl.constexpr = D // 2
    partner = tl.where(d < half, d + half, d - half)
    x = load_rows(rows[:, None] + d[None, :], inside, d, D, BD)
    y = load_rows(rows[:, None] + partner[None, :], inside, d, D, BD)
    across = tl.where((d < half)[None, :], -y.to(tl.float32), y.to(tl.float32))
    return (x.to(tl.float32) * cos.to(tl.float32) + across * sin.to(tl.float32)).to(x.dtype)
