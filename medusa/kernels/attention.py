"""Tree attention over pages on a GPU: every node looks at its sequence's committed tokens and at its ancestors.

One launch. Each sequence's committed tokens are split over programs, with the query heads that share a key-value head
packed as rows of one tile; the last split adds the step's own nodes under their ancestor bits. The program that arrives
last merges the splits by their log-sum-exp, in their order, so that the result does not depend on who is last. A tree of one node is plain decoding; a chain (each node sees all nodes
before it) is a chunk of a prompt. The plain twin is `medusa.kernels.tree_attention`.

Shapes: M flat nodes, B sequences (b owns nodes start_B[b] .. + count_B[b]), H query heads, G key-value heads, D head
size, R batch rows, N nodes a tree at most, W words of 64 ancestor bits, S splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from medusa.kernels.launch import await_inputs, options

MAX_SPLITS = 64
MAX_ROWS = 64  # query rows of a tile


@triton.jit
def _load(pointers, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D values; a mask over columns only where the head size is no power of two."""
    if D == BD:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(pointers, values, inside, d, D: tl.constexpr, BD: tl.constexpr):
    if D == BD:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _scores(q, k, scaling, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    if SOFTCAP:
        half = tl.sigmoid(2 * qk / softcap)  # tanh(x) = 2 sigmoid(2x) - 1
        qk = softcap * (2 * half - 1)
    return qk


@triton.jit
def _update(qk, seen, v, m, l, acc, PRECISION: tl.constexpr):
    """One step of the online softmax; columns not seen weigh nothing, even where no column is."""
    qk = tl.where(seen, qk, -float("inf"))
    peak = tl.maximum(m, tl.max(qk, 1))
    shrink = tl.exp(m - peak)
    p = tl.exp(qk - peak[:, None])
    l = l * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return peak, l, acc


@triton.jit
def _merge(
    PART,
    LSE,
    out,
    flat,
    head,
    live,
    d,
    num_nodes,
    H: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weighs the splits of a tile by their log-sum-exp."""
    peak = tl.full([BM], -1e30, tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for s in tl.range(SPLITS):
        at = (s * num_nodes + flat) * H + head
        lse = tl.load(LSE + at, mask=live, other=-float("inf"), cache_modifier=".cg")
        part = tl.load(
            PART + at[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0, cache_modifier=".cg"
        )
        new = tl.maximum(peak, lse)
        shrink = tl.exp(peak - new)
        weight = tl.exp(lse - new)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        peak = new
    _store(out, acc / tl.where(total > 0, total, 1.0)[:, None], live, d, D, BD)


@triton.jit
def _attend(
    Q,
    KEYS,
    VALUES,
    ROWS,
    START,
    COUNT,
    LENGTH,
    TABLES,
    BITS,
    DEPTH,
    OUT,
    PART,
    LSE,
    ARRIVED,
    scaling,
    softcap,
    window,
    sq_m,
    sq_h,
    so_m,
    so_h,
    sp,
    ss,
    sh,
    st,
    num_nodes,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CHAIN: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    b = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    head_kv = tl.program_id(1)
    split = tl.program_id(2)
    await_inputs(PDL)
    count = tl.load(COUNT + b)
    start = tl.load(START + b)
    if tile * BM >= count * GROUP:
        return
    row = tl.load(ROWS + b).to(tl.int64)
    length = tl.load(LENGTH + row).to(tl.int32)
    r = tile * BM + tl.arange(0, BM)
    node = r // GROUP
    head = head_kv * GROUP + r % GROUP
    live = node < count
    d = tl.arange(0, BD)
    flat = (start + node).to(tl.int64)
    q = _load(Q + flat[:, None] * sq_m + head[:, None] * sq_h + d[None, :], live, d, D, BD)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    if CHAIN:
        depth = node
    else:
        depth = tl.load(DEPTH + row * N + node, mask=live, other=0).to(tl.int32)
    first = 0
    if WINDOW:  # the shallowest node of the tile looks furthest back
        first = tl.maximum(length + tl.min(tl.where(live, depth, 1 << 30), 0) - window + 1, 0) // BN * BN
    per = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), SPLITS), BN) * BN
    low = first + split * per
    high = tl.minimum(low + per, length)
    for t0 in range(low, high, BN):
        t = t0 + tl.arange(0, BN)
        inside = t < high
        page = tl.load(TABLES + row * st + t // PAGE, mask=inside, other=0).to(tl.int64)
        at = page * sp + (t % PAGE) * ss + head_kv * sh
        k = _load(KEYS + at[:, None] + d[None, :], inside, d, D, BD)
        v = _load(VALUES + at[:, None] + d[None, :], inside, d, D, BD)
        seen = inside[None, :]
        if WINDOW:
            seen = seen & (length + depth[:, None] - t[None, :] < window)
        qk = _scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
        m, l, acc = _update(qk, seen, v, m, l, acc, PRECISION)
    if split == SPLITS - 1:
        last = tl.minimum(count, ((tile + 1) * BM - 1) // GROUP + 1)  # no node sees a later one
        for j0 in range(0, last, BN):
            j = j0 + tl.arange(0, BN)
            inside = j < last
            t = length + j
            page = tl.load(TABLES + row * st + t // PAGE, mask=inside, other=0).to(tl.int64)
            at = page * sp + (t % PAGE) * ss + head_kv * sh
            k = _load(KEYS + at[:, None] + d[None, :], inside, d, D, BD)
            v = _load(VALUES + at[:, None] + d[None, :], inside, d, D, BD)
            if CHAIN:
                seen = (j[None, :] <= node[:, None]) & inside[None, :]
                if WINDOW:
                    seen = seen & (node[:, None] - j[None, :] < window)
            else:
                bits = tl.load(BITS + (row * N + node) * W + j0 // 64, mask=live, other=0)
                seen = (((bits[:, None] >> (j % 64).to(tl.int64)[None, :]) & 1) != 0) & inside[None, :]
                if WINDOW:
                    other = tl.load(DEPTH + row * N + j, mask=inside, other=0).to(tl.int32)
                    seen = seen & (depth[:, None] - other[None, :] < window)
            qk = _scores(q, k, scaling, softcap, SOFTCAP, PRECISION)
            m, l, acc = _update(qk, seen, v, m, l, acc, PRECISION)
    total = tl.where(l > 0, l, 1.0)
    out = OUT + flat[:, None] * so_m + head[:, None] * so_h + d[None, :]
    if SPLITS == 1:
        _store(out, acc / total[:, None], live, d, D, BD)
    else:
        at = (split * num_nodes + flat) * H + head
        _store(PART + at[:, None] * D + d[None, :], acc / total[:, None], live, d, D, BD)
        tl.store(LSE + at, tl.where(l > 0, m + tl.log(total), -float("inf")), mask=live)
        tl.debug_barrier()  # all of this program's stores come before its count
        counter = ARRIVED + tl.program_id(0) * (H // GROUP) + head_kv
        if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:  # the last to arrive merges
            tl.store(counter, 0)
            _merge(PART, LSE, out, flat, head, live, d, num_nodes, H, D, BD, BM, SPLITS)


@dataclass(frozen=True)
class AttentionPlan:
    """How a step's attention is cut: splits of the committed tokens, query rows and cached tokens a tile, warps, stages,
    and the most nodes that one sequence brings."""

    splits: int
    rows: int
    columns: int
    max_nodes: int
    warps: int = 4
    stages: int = 2

    @classmethod
    def of(cls, *, batch_size: int, max_nodes: int, group: int, num_kv_heads: int, processors: int) -> AttentionPlan:
        """A plan that keeps the GPU's multiprocessors busy about twice over."""
        packed = max_nodes * group
        rows = 16 if packed <= 16 else 32 if packed <= 32 else MAX_ROWS
        tiles = triton.cdiv(packed, rows)
        wanted = max(1, 2 * processors // (batch_size * num_kv_heads * tiles))
        splits = min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))
        return cls(splits=splits, rows=rows, columns=64, max_nodes=max_nodes, warps=4, stages=2)


@dataclass(frozen=True)
class Visible:
    """Which nodes each sequence of a step brings, and what they see: the committed tokens on its pages, and each other.

    `bits_RNW` and `depth_RN` are kept by batch row; None stands for chains. `rows_B` names each sequence's batch row.
    """

    rows_B: torch.Tensor
    start_B: torch.Tensor
    count_B: torch.Tensor
    length_R: torch.Tensor
    tables_RP: torch.Tensor
    bits_RNW: torch.Tensor | None
    depth_RN: torch.Tensor | None


@dataclass(frozen=True)
class Scratch:
    """What the splits of one launch leave for the one that merges them; launches in one stream may share it."""

    part: torch.Tensor
    lse: torch.Tensor
    arrived: torch.Tensor

    @classmethod
    def of(cls, *, max_nodes: int, heads: int, size: int, processors: int, device: torch.device) -> Scratch:
        """For plans made by `AttentionPlan.of` over at most `max_nodes` nodes."""
        rows = max(max_nodes, MAX_SPLITS, 2 * processors * MAX_ROWS // heads)
        return cls(
            part=torch.empty(rows, heads, size, dtype=torch.float32, device=device),
            lse=torch.empty(rows, heads, dtype=torch.float32, device=device),
            arrived=torch.zeros(2 * processors, dtype=torch.int32, device=device),
        )


def attend(
    query_MHD: torch.Tensor,
    cache_layer: torch.Tensor,
    visible: Visible,
    plan: AttentionPlan,
    out_MHD: torch.Tensor,
    scratch: Scratch,
    scaling: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of M nodes whose keys and values are written already; `cache_layer` is [2, P, page size, G, D].

    Rows of `out_MHD` that belong to no sequence keep what they hold.
    """
    num_nodes, heads, size = query_MHD.shape
    _, _, page_size, groups, _ = cache_layer.shape
    group = heads // groups
    tiles = triton.cdiv(plan.max_nodes * group, plan.rows)
    counters = visible.rows_B.shape[0] * tiles * groups
    if plan.splits > 1 and (plan.splits * num_nodes > len(scratch.part) or counters > len(scratch.arrived)):
        raise ValueError(f"{plan} over {num_nodes} nodes needs more scratch than {tuple(scratch.part.shape)}")
    keys, values = cache_layer[0], cache_layer[1]
    num_kept, words = (1, 1) if visible.bits_RNW is None else visible.bits_RNW.shape[1:]
    _attend[(visible.rows_B.shape[0] * tiles, groups, plan.splits)](
        query_MHD, keys, values, visible.rows_B, visible.start_B, visible.count_B, visible.length_R, visible.tables_RP,
        visible.bits_RNW, visible.depth_RN, out_MHD, scratch.part, scratch.lse, scratch.arrived, scaling, softcap or 1.0, window or 0,
        query_MHD.stride(0), query_MHD.stride(1), out_MHD.stride(0), out_MHD.stride(1), keys.stride(0), keys.stride(1),
        keys.stride(2), visible.tables_RP.stride(0), num_nodes, H=heads, GROUP=group, D=size, BD=triton.next_power_of_2(size), N=num_kept, W=words,
        PAGE=page_size, SPLITS=plan.splits, TILES=tiles, BM=plan.rows, BN=plan.columns, CHAIN=visible.bits_RNW is None,
        WINDOW=window is not None, SOFTCAP=softcap is not None,
        PRECISION="ieee" if query_MHD.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=plan.warps, num_stages=plan.stages, **options(pdl),
    )  # fmt: skip
    return out_MHD
