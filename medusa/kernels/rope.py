"""Rotating queries and keys, and writing keys and values into the cache's pages, in one launch.

Shapes: M nodes, H query heads, G key-value heads, D head size, P pages, S positions a page, R batch rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.launch import await_inputs, options


@triton.jit
def _rope_write(
    QKV,
    COS,
    SIN,
    QNORM,
    KNORM,
    KEYS,
    VALUES,
    TABLES,
    LENGTH,
    ROW,
    NODE,
    POSITION,
    eps,
    sq,
    sc,
    st,
    sp,
    ss,
    sh,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BH: tl.constexpr,
    PAGE: tl.constexpr,
    HB: tl.constexpr,
    HEADS: tl.constexpr,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    blocks: tl.constexpr = (HEADS + HB - 1) // HB
    m = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * HB + tl.arange(0, HB)
    half: tl.constexpr = D // 2
    d = tl.arange(0, BH)
    await_inputs(PDL)
    column = (d < half)[None, :]
    inside = (h < H + 2 * G)[:, None] & column
    source = QKV + m * sq + h[:, None] * D + d[None, :]
    x1 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / D + eps)[:, None]
        is_query = (h < H)[:, None] & column
        normed = (h < H + G)[:, None]
        w1 = tl.where(
            is_query,
            tl.load(QNORM + d, mask=d < half, other=0.0)[None, :],
            tl.load(KNORM + d, mask=d < half, other=0.0)[None, :],
        ).to(tl.float32)
        w2 = tl.where(
            is_query,
            tl.load(QNORM + half + d, mask=d < half, other=0.0)[None, :],
            tl.load(KNORM + half + d, mask=d < half, other=0.0)[None, :],
        ).to(tl.float32)
        dtype = QKV.dtype.element_ty
        x1 = tl.where(normed, (x1 * scale).to(dtype).to(tl.float32) * w1, x1).to(dtype).to(tl.float32)
        x2 = tl.where(normed, (x2 * scale).to(dtype).to(tl.float32) * w2, x2).to(dtype).to(tl.float32)
    if ROTATE:
        position = tl.load(POSITION + m)
        cos = tl.load(COS + position * sc + d, mask=d < half, other=0.0)[None, :].to(tl.float32)
        sin = tl.load(SIN + position * sc + d, mask=d < half, other=0.0)[None, :].to(tl.float32)
        turned = (h < H + G)[:, None]
        y1 = tl.where(turned, x1 * cos - x2 * sin, x1)
        y2 = tl.where(turned, x2 * cos + x1 * sin, x2)
    else:
        y1 = x1
        y2 = x2
    y1 = y1.to(QKV.dtype.element_ty)
    y2 = y2.to(QKV.dtype.element_ty)
    query = (h < H)[:, None] & column
    tl.store(source, y1, mask=query)
    tl.store(source + half, y2, mask=query)
    row = tl.load(ROW + m).to(tl.int64)
    slot = tl.load(LENGTH + row).to(tl.int64) + tl.load(NODE + m).to(tl.int64)
    page = tl.load(TABLES + row * st + slot // PAGE).to(tl.int64)
    target = page * sp + (slot % PAGE) * ss
    key = ((h >= H) & (h < H + G))[:, None] & column
    value = ((h >= H + G) & (h < H + 2 * G))[:, None] & column
    at_key = KEYS + target + (h[:, None] - H) * sh + d[None, :]
    at_value = VALUES + target + (h[:, None] - H - G) * sh + d[None, :]
    tl.store(at_key, y1, mask=key)
    tl.store(at_key + half, y2, mask=key)
    tl.store(at_value, y1, mask=value)
    tl.store(at_value + half, y2, mask=value)


def rope_write(
    qkv_MHD: torch.Tensor,
    cache_layer: torch.Tensor,
    tables_RP: torch.Tensor,
    length_R: torch.Tensor,
    row_M: torch.Tensor,
    node_M: torch.Tensor,
    position_M: torch.Tensor | None = None,
    cos_TD: torch.Tensor | None = None,
    sin_TD: torch.Tensor | None = None,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
    *,
    pdl: bool = False,
) -> None:
    """Rotates the queries (in place) and keys of `qkv_MHD` [M, H + 2G, D] and writes node n of batch row r at position
    `length_R[r] + n` of the row's pages. `cache_layer` is [2, P, S, G, D]; cos and sin hold half a head's angles by
    position (None: the queries and keys come rotated). `norms` are RMSNorm weights of queries and keys, applied before.
    """
    num_nodes, heads, size = qkv_MHD.shape
    _, _, page_size, groups, _ = cache_layer.shape
    keys, values = cache_layer[0], cache_layer[1]
    block = 8 if heads >= 8 else triton.next_power_of_2(heads)
    query_norm, key_norm, eps = norms or (None, None, 0.0)
    _rope_write[(num_nodes * triton.cdiv(heads, block),)](
        qkv_MHD, cos_TD, sin_TD, query_norm, key_norm, keys, values, tables_RP, length_R, row_M, node_M, position_M,
        eps,
        qkv_MHD.stride(0), 0 if cos_TD is None else cos_TD.stride(0), tables_RP.stride(0), keys.stride(0),
        keys.stride(1), keys.stride(2),
        H=heads - 2 * groups, G=groups, D=size, BH=triton.next_power_of_2(size // 2), PAGE=page_size, HB=block,
        HEADS=heads, ROTATE=cos_TD is not None, NORM=norms is not None, PDL=pdl,
        num_warps=4, num_stages=1, **options(pdl),
    )  # fmt: skip
