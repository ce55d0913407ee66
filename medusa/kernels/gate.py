"""SiLU(gate) * up of a gated MLP where its product was left to a library: one launch.

Shapes: M rows, F channels of the MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.launch import await_inputs, options


@triton.jit
def _silu_mul(BOTH, OUT, sb, so, F: tl.constexpr, BF: tl.constexpr, PDL: tl.constexpr):
    m = tl.program_id(1).to(tl.int64)
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    await_inputs(PDL)
    gate = tl.load(BOTH + m * sb + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(BOTH + m * sb + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(OUT + m * so + f, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=f < F)


def silu_mul(both_M2F: torch.Tensor, out_MF: torch.Tensor, *, pdl: bool = False) -> torch.Tensor:
    """out = SiLU(first half of the channels) * second half."""
    num_rows, size = out_MF.shape
    block = min(1024, triton.next_power_of_2(size))
    _silu_mul[(triton.cdiv(size, block), num_rows)](
        both_M2F,
        out_MF,
        both_M2F.stride(0),
        out_MF.stride(0),
        F=size,
        BF=block,
        PDL=pdl,
        num_warps=4,
        num_stages=1,
        **options(pdl),
    )
    return out_MF
