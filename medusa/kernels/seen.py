"""What a head sees of a path, and a block's last deed: two launches between the products of Hydra heads.

Shapes: C slots of asked nodes, J tokens ahead, d hidden size, R batch rows, M flat nodes, S partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.launch import await_inputs, options


@triton.jit
def _see(
    ASKED,
    ROW,
    HIDDEN,
    EMBEDDED,
    SEEN,
    R,
    J: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    c, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BD)
    inside = d < D
    out = SEEN + (c * (J + 1) + j) * D + d
    if j == 0:
        m = tl.load(ASKED + c)
        row = tl.load(ROW + m, mask=m >= 0, other=R - 1).to(tl.int64)
        tl.store(out, tl.load(HIDDEN + row * D + d, mask=inside, other=0.0), mask=inside)
    else:
        x = tl.load(EMBEDDED + (c * J + j - 1) * D + d, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(wide * wide, 0) / D + 1e-12)
        scaled = wide * scale.to(x.dtype).to(tl.float32)  # as torch rounds
        tl.store(out, scaled.to(x.dtype), mask=inside)


@triton.jit
def _add_silu(
    PARTIAL,
    BIAS,
    RESIDUAL,
    OUT,
    sp_split,
    sp,
    sr,
    D: tl.constexpr,
    S: tl.constexpr,
    BD: tl.constexpr,
    SHARING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BD)
    inside = d < D
    added = tl.zeros([BD], tl.float32)
    if HAS_BIAS:
        added = tl.load(BIAS + d, mask=inside, other=0.0).to(tl.float32)
    for s in tl.static_range(S):
        added += tl.load(PARTIAL + s * sp_split + row * sp + d, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(RESIDUAL + row // SHARING * sr + d, mask=inside, other=0.0)
    added = added.to(x.dtype).to(tl.float32)
    added = (added * tl.sigmoid(added)).to(x.dtype).to(tl.float32)
    tl.store(OUT + row * D + d, (x.to(tl.float32) + added).to(x.dtype), mask=inside)


def see(
    asked_C: torch.Tensor,
    row_M: torch.Tensor,
    hidden_Rd: torch.Tensor,
    embedded_CJd: torch.Tensor,
    seen: torch.Tensor,
    *,
    pdl: bool = False,
) -> None:
    """Writes `seen` [C, (J + 1) * d]: the hidden state of each asked node's row (an empty slot's is the last row's),
    then its path's embeddings scaled as by `medusa.hydra.embed_path`."""
    slots, num_tokens, size = embedded_CJd.shape
    check("asked_C", asked_C, torch.int32, slots)
    check("hidden_Rd", hidden_Rd, seen.dtype, None, size)
    check("embedded_CJd", embedded_CJd, seen.dtype, slots, num_tokens, size)
    check("seen", seen, seen.dtype, slots, (num_tokens + 1) * size)
    block = triton.next_power_of_2(size)
    _see[(slots, num_tokens + 1)](
        asked_C, row_M, hidden_Rd, embedded_CJd, seen, len(hidden_Rd), J=num_tokens, D=size, BD=block, PDL=pdl,
        num_warps=8 if block >= 2048 else 4, **options(pdl),
    )  # fmt: skip


def add_silu(
    partial_SCd: torch.Tensor, bias_d: torch.Tensor | None, residual_Cd: torch.Tensor, out_Cd: torch.Tensor,
    *, sharing: int = 1, pdl: bool = False,
) -> None:  # fmt: skip
    """out = residual + SiLU(sum of the partial sums + bias). Rows of the residual may lie apart; so many rows of `out`
    after another share one."""
    splits, rows, size = partial_SCd.shape
    if bias_d is not None:
        check("bias_d", bias_d, bias_d.dtype, size)
    check("out_Cd", out_Cd, residual_Cd.dtype, rows, size)
    if len(residual_Cd) * sharing != rows:
        raise ValueError(
            f"{rows} rows of which {sharing} share one of the residual were given {len(residual_Cd)} of it"
        )
    block = triton.next_power_of_2(size)
    _add_silu[(rows,)](
        partial_SCd, bias_d, residual_Cd, out_Cd, partial_SCd.stride(0), partial_SCd.stride(1), residual_Cd.stride(0),
        D=size, S=splits, BD=block, SHARING=sharing, HAS_BIAS=bias_d is not None, PDL=pdl,
        num_warps=8 if block >= 2048 else 4, **options(pdl),
    )  # fmt: skip
