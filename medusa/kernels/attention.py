"""Tree attention over pages on a GPU: every node looks at its sequence's committed tokens and at its ancestors.

Each sequence's committed tokens are split over programs, with the query heads that share a key-value head packed as
rows of one tile; the last split adds the step's own nodes under their ancestor bits. The splits are merged by their
log-sum-exp, in their order: few by the program that arrives last, more in a second launch. A tree of one node is plain
decoding; a chain (each node sees all nodes before it) is a chunk of a prompt. The plain twin is
`medusa.kernels.tree_attention`.

Shapes: M flat nodes, B sequences (b owns nodes start_B[b] .. + count_B[b]), H query heads, G key-value heads, D head
size, R batch rows, N nodes a tree at most, W words of 64 ancestor bits, S splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.attention_merge import merge_splits, merge_tile, store_rows
from medusa.kernels.attention_plan import AttentionPlan, Rotation, Scratch, Visible
from medusa.kernels.launch import await_inputs, options


@triton.jit
def _load(pointers, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """Rows of D values; a mask over columns only where the head size is no power of two."""
    if D == BD:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _angles(POSITION, COS, SIN, sc, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """cos and sin of the positions at the pointers, for each channel of a head."""
    position = tl.load(POSITION, mask=inside, other=0)
    angle = position[:, None] * sc + (d % (D // 2))[None, :]
    return _load(COS + angle, inside, d, D, BD), _load(SIN + angle, inside, d, D, BD)


@triton.jit
def _turned(rows, cos, sin, inside, d, D: tl.constexpr, BD: tl.constexpr):
    """Heads at the pointers `rows`, rotated in float32 and rounded once."""
    half: tl.constexpr = D // 2
    partner = tl.where(d < half, d + half, d - half)
    x = _load(rows[:, None] + d[None, :], inside, d, D, BD)
    y = _load(rows[:, None] + partner[None, :], inside, d, D, BD)
    across = tl.where((d < half)[None, :], -y.to(tl.float32), y.to(tl.float32))
    return (x.to(tl.float32) * cos.to(tl.float32) + across * sin.to(tl.float32)).to(x.dtype)


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


@triton.jit(do_not_specialize=["SPLITS", "TILES", "num_nodes", "window"])
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
    POSITION,
    COS,
    SIN,
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
    sc,
    num_nodes,
    SPLITS,
    TILES,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    PAGE: tl.constexpr,
    WHOLE: tl.constexpr,
    MERGES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    CHAIN: tl.constexpr,
    FRESH: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    b = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    head_kv = tl.program_id(1)
    split = tl.program_id(2)
    # Up to the wait: what the kernel just ahead does not write. It is found by a chain of loads, each a trip to memory.
    count = tl.load(COUNT + b)
    start = tl.load(START + b)
    row = tl.load(ROWS + b).to(tl.int64)
    length = tl.load(LENGTH + row).to(tl.int32)
    r = tile * BM + tl.arange(0, BM)
    node = r // GROUP
    head = head_kv * GROUP + r % GROUP
    live = node < count
    d = tl.arange(0, BD)
    flat = (start + node).to(tl.int64)
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
    if FRESH:
        cos, sin = _angles(POSITION + flat, COS, SIN, sc, live, d, D, BD)
    await_inputs(PDL)
    if tile * BM >= count * GROUP:
        return
    if FRESH:
        q = _turned(Q + flat * sq_m + head * sq_h, cos, sin, live, d, D, BD)
    else:
        q = _load(Q + flat[:, None] * sq_m + head[:, None] * sq_h + d[None, :], live, d, D, BD)
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for t0 in range(low, high, BN):  # a tile is of one page: one number, so that the loads after it can be pipelined
        t = t0 + tl.arange(0, BN)
        inside = t < high
        page = tl.load(TABLES + row * st + t0 // PAGE).to(tl.int64)
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
        for j0 in tl.range(0, last, BT, num_stages=1):
            j = j0 + tl.arange(0, BT)
            inside = j < last
            t = length + j
            page = tl.load(TABLES + row * st + t // PAGE, mask=inside, other=0).to(tl.int64)
            at = page * sp + (t % PAGE) * ss + head_kv * sh
            if FRESH:
                fresh = (start + j).to(tl.int64)
                source = Q + fresh * sq_m + (H + head_kv) * sq_h
                its_cos, its_sin = _angles(POSITION + fresh, COS, SIN, sc, inside, d, D, BD)
                k = _turned(source, its_cos, its_sin, inside, d, D, BD)
                v = _load(source[:, None] + (H // GROUP) * sq_h + d[None, :], inside, d, D, BD)
                mine = inside & (j >= tile * BM // GROUP)  # each tile writes its own nodes
                store_rows(KEYS + at[:, None] + d[None, :], k, mine, d, D, BD)
                store_rows(VALUES + at[:, None] + d[None, :], v, mine, d, D, BD)
            else:
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
    if WHOLE:
        store_rows(out, acc / total[:, None], live, d, D, BD)
    else:
        at = (split * num_nodes + flat) * H + head
        store_rows(PART + at[:, None] * D + d[None, :], acc / total[:, None], live, d, D, BD)
        tl.store(LSE + at, tl.where(l > 0, m + tl.log(total), -float("inf")), mask=live)
        if MERGES:
            tl.debug_barrier()  # all of this program's stores come before its count
            counter = ARRIVED + tl.program_id(0) * (H // GROUP) + head_kv
            if tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1:  # the last to arrive merges
                tl.store(counter, 0)
                merge_tile(PART, LSE, out, flat, head, live, d, num_nodes, SPLITS, H, D, BD, BM, 1)


def registers(rows: int, group: int, *, merges: bool, pdl: bool) -> dict[str, int]:
    """The launch option that lets small tiles have more registers than the assembler would give them by itself, where
    those are too few. With 168 three programs of 128 threads fit a multiprocessor at once."""
    if rows > 32:
        return {}
    if not pdl or group > 1 or rows > 16:
        return {"maxnreg": 255}
    return {"maxnreg": 168} if merges else {}


def attend(
    query_MHD: torch.Tensor,
    cache_layer: torch.Tensor,
    visible: Visible,
    plan: AttentionPlan,
    out_MHD: torch.Tensor,
    scratch: Scratch,
    scaling: float,
    *,
    rotation: Rotation | None = None,
    window: int | None = None,
    softcap: float | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """Attention of M nodes; `cache_layer` is [2, P, page size, G, D].

    Without `rotation` the nodes' keys and values are written already. With it `query_MHD` is [M, H + 2G, D], queries,
    keys and values as the projections gave them, and the launch itself rotates and writes them. Not for chains, whose
    tiles would each do it for all nodes before.

    Rows of `out_MHD` that belong to no sequence are left with anything.
    """
    num_nodes, size = query_MHD.shape[0], query_MHD.shape[2]
    _, _, page_size, groups, _ = cache_layer.shape
    heads = out_MHD.shape[1]
    if (rotation is not None) != (query_MHD.shape[1] > heads) or (rotation and visible.bits_RNW is None):
        raise ValueError(f"rotation goes with trees and [M, H + 2G, D], got {tuple(query_MHD.shape)}")
    group = heads // groups
    tiles = triton.cdiv(plan.max_nodes * group, plan.rows)
    counters = visible.rows_B.shape[0] * tiles * groups
    too_many = plan.merges and counters > len(scratch.arrived)
    if plan.splits > 1 and (plan.splits * num_nodes > len(scratch.part) or too_many):
        raise ValueError(f"{plan} over {num_nodes} nodes needs more scratch than {tuple(scratch.part.shape)}")
    if page_size % plan.columns:
        raise ValueError(f"pages of {page_size} tokens do not hold whole tiles of {plan.columns}")
    keys, values = cache_layer[0], cache_layer[1]
    num_kept, words = (1, 1) if visible.bits_RNW is None else visible.bits_RNW.shape[1:]
    angles = (None, None, None) if rotation is None else (rotation.position_M, rotation.cos_TD, rotation.sin_TD)
    _attend[(visible.rows_B.shape[0] * tiles, groups, plan.splits)](
        query_MHD, keys, values, visible.rows_B, visible.start_B, visible.count_B, visible.length_R, visible.tables_RP,
        visible.bits_RNW, visible.depth_RN, *angles, out_MHD, scratch.part, scratch.lse,
        scratch.arrived, scaling, softcap or 1.0, window or 0, query_MHD.stride(0), query_MHD.stride(1),
        out_MHD.stride(0), out_MHD.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        visible.tables_RP.stride(0), 0 if rotation is None else rotation.cos_TD.stride(0), num_nodes, plan.splits,
        tiles, H=heads, GROUP=group, D=size, BD=triton.next_power_of_2(size), N=num_kept, W=words,
        PAGE=page_size, WHOLE=plan.splits == 1, MERGES=plan.merges, BM=plan.rows, BN=plan.columns,
        BT=plan.tree_columns, CHAIN=visible.bits_RNW is None, FRESH=rotation is not None,
        WINDOW=window is not None, SOFTCAP=softcap is not None,
        PRECISION="ieee" if query_MHD.dtype == torch.float32 else "tf32", PDL=pdl,
        num_warps=plan.warps, num_stages=plan.stages_of(size, keys.element_size()),
        **registers(plan.rows, group, merges=plan.merges, pdl=pdl), **options(pdl),
    )  # fmt: skip
    if plan.splits > 1 and not plan.merges:
        merge_splits(scratch, plan.splits, out_MHD, pdl=pdl)
    return out_MHD
