"""Weights of one byte on their way to the tensor cores, as bfloat16, two at a time, in Triton's products; ring_bytes.cu
has its own way, which leaves a factor to the scale.

With the hardware's conversions of e4m3 a step took longer than its bytes (docs/performance.md). Here a value's bits are
moved into place and one multiply-add makes it exact:

    int8   0x4300 | low 7 bits is 128 + them; 128, or with the sign bit 256, is taken off
    e4m3   sign, exponent and fraction at bfloat16's places are the value times 2^-120, the smallest ones included

e4m3's two NaNs become +-480: no quantised weight has any (medusa/quantization.py refuses them).
"""

from __future__ import annotations

import triton
import triton.language as tl

# prmt: two of four bytes, each beside a byte of zeros. lop3 0xea: (a & b) | c.
INT8_TO_BF16 = tl.constexpr("""{
    .reg .b32 pair<2>, whole<2>, off<2>, one;
    mov.b32 one, 0x3f803f80;
    prmt.b32 pair0, $2, 0, 0x4140;
    prmt.b32 pair1, $2, 0, 0x4342;
    lop3.b32 whole0, pair0, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 whole1, pair1, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 off0, pair0, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 off1, pair1, 0x00800080, 0xc300c300, 0xea;
    fma.rn.bf16x2 $0, whole0, one, off0;
    fma.rn.bf16x2 $1, whole1, one, off1;
}""")
E4M3_TO_BF16 = tl.constexpr("""{
    .reg .b32 pair<2>, low<2>, power, zero;
    mov.b32 power, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    prmt.b32 pair0, $2, 0, 0x1404;
    prmt.b32 pair1, $2, 0, 0x3424;
    shr.b32 low0, pair0, 4;
    shr.b32 low1, pair1, 4;
    and.b32 low0, low0, 0x07f007f0;
    and.b32 low1, low1, 0x07f007f0;
    lop3.b32 low0, pair0, zero, low0, 0xea;
    lop3.b32 low1, pair1, zero, low1, 0xea;
    fma.rn.bf16x2 $0, low0, power, zero;
    fma.rn.bf16x2 $1, low1, power, zero;
}""")


@triton.jit
def widened(w, dtype: tl.constexpr, PACKED: tl.constexpr):
    """w in `dtype`, exactly. PACKED: by the instructions above where they apply; they are a GPU's."""
    if PACKED and dtype == tl.bfloat16 and w.dtype == tl.int8:
        return tl.inline_asm_elementwise(INT8_TO_BF16, "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)
    elif PACKED and dtype == tl.bfloat16 and w.dtype == tl.float8e4nv:
        bits = w.to(tl.int8, bitcast=True)
        return tl.inline_asm_elementwise(E4M3_TO_BF16, "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        return w.to(dtype)
