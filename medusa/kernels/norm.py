"""Adding a block's output to the residual stream and normalising it for the next block, in one launch.

Shapes: M rows, d channels, S partial sums of a split product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.launch import await_inputs, options


@triton.jit
def _add_norm(
    PARTIAL,
    BIAS,
    RESIDUAL,
    WEIGHT,
    OUT,
    eps,
    sp_split,
    sp,
    sr,
    so,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    weight = tl.load(WEIGHT + d, mask=inside, other=0.0).to(tl.float32)  # no kernel writes it: read before waiting
    await_inputs(PDL, EARLY)
    x = tl.load(RESIDUAL + row * sr + d, mask=inside, other=0.0)
    if S > 0:
        added = tl.zeros([BD], tl.float32)
        for s in tl.static_range(S):
            added += tl.load(PARTIAL + s * sp_split + row * sp + d, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            added += tl.load(BIAS + d, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + added.to(x.dtype).to(tl.float32)).to(x.dtype)  # as the model rounds
        tl.store(RESIDUAL + row * sr + d, x, mask=inside)
    wide = x.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps)
    normed = (wide * scale).to(x.dtype).to(tl.float32) * weight
    tl.store(OUT + row * so + d, normed.to(OUT.dtype.element_ty), mask=inside)


def add_norm(
    partial_SMd: torch.Tensor | None,
    residual_Md: torch.Tensor,
    weight_d: torch.Tensor,
    eps: float,
    out_Md: torch.Tensor,
    bias_d: torch.Tensor | None = None,
    *,
    pdl: bool = False,
    early: bool = False,
) -> torch.Tensor:
    """residual += sum of the partial sums (in place; None: nothing to add), then out = RMSNorm(residual) * weight.

    `early`, with `pdl` alone: the next kernel may start before this one waits, and while the kernel ahead of both still
    runs. Until it waits itself, it must read nothing that either of the two writes (`await_inputs`)."""
    num_rows, size = residual_Md.shape
    splits = 0 if partial_SMd is None else partial_SMd.shape[0]
    partial = residual_Md[None] if partial_SMd is None else partial_SMd
    block = triton.next_power_of_2(size)
    _add_norm[(num_rows,)](
        partial, bias_d, residual_Md, weight_d, out_Md, eps, partial.stride(0), partial.stride(1),
        residual_Md.stride(0), out_Md.stride(0), D=size, S=splits, BD=block,
        HAS_BIAS=bias_d is not None, EARLY=early and pdl, PDL=pdl,
        num_warps=8 if block >= 2048 else 4, num_stages=1, **options(pdl),
    )  # fmt: skip
    return out_Md


def add_norm_reference(
    partial_SMd: torch.Tensor | None, residual_Md: torch.Tensor, weight_d: torch.Tensor, eps: float,
    bias_d: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same in torch, out of place: (residual, out)."""
    residual = residual_Md
    if partial_SMd is not None:
        added = partial_SMd.float().sum(0)
        if bias_d is not None:
            added = added + bias_d.float()
        residual = residual + added.to(residual.dtype)
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return residual, normed.to(residual.dtype) * weight_d
