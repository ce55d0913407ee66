"""The kernel of attention over pages: every node looks at its sequence's committed tokens and at its ancestors.

A program takes a tile of query rows (nodes times the query heads that share a key-value head) and a share of the
committed tokens. Tiles of few rows have TEAMS of one warp: the tokens are divided among them, and each keeps an online
softmax of its own, so that no warp waits for another before the end, when the program puts its teams together. In tiles
of many rows the warps divide the rows instead (TEAMS = 1). The step's own nodes come last, under their ancestor bits;
where a tree's tokens are split, one program more takes its nodes while the others read the cache. A tree of one node is
plain decoding; a chain (each node sees all nodes before it) is a chunk of a prompt.

Shapes: M flat nodes, B sequences (b owns nodes start_B[b] .. + count_B[b]), H query heads, G key-value heads, D head
size, R batch rows, N nodes a tree at most, W words of 64 ancestor bits, S splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from medusa.kernels.attention_merge import merge_in_place
from medusa.kernels.head_rows import load_angles, load_rotated, load_rows, store_rows
from medusa.kernels.launch import await_inputs

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _scaled(qk, scaling, softcap, SOFTCAP: tl.constexpr):
    """Scores as exponents of two: scaled, capped where the model caps them, times log2(e)."""
    if SOFTCAP:
        half = tl.sigmoid(2 * scaling * qk / softcap)  # tanh(x) = 2 sigmoid(2x) - 1
        return (softcap * LOG2_E) * (2 * half - 1)
    else:
        return qk * (scaling * LOG2_E)


@triton.jit
def _update(qk, seen, v, m, l, acc, PRECISION: tl.constexpr):
    """One step of the online softmax, of one tile or of all teams' at once; columns not seen weigh nothing, even where
    no column is."""
    qk = tl.where(seen, qk, -float("inf"))
    peak = tl.maximum(m, tl.max(qk, -1))
    shrink = tl.exp2(m - peak)
    p = tl.exp2(qk - tl.expand_dims(peak, -1))
    l = l * shrink + tl.sum(p, -1)
    acc = acc * tl.expand_dims(shrink, -1) + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return peak, l, acc


@triton.jit
def _sum_teams(x, TEAMS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """[TEAMS, BM, BD] summed over two or four teams: moved once, then added up in registers, where a reduction over
    warps would move value by value."""
    x = tl.permute(x, (1, 2, 0))
    if TEAMS == 4:
        even, odd = tl.split(tl.reshape(x, (BM, BD, 2, 2)))
        x = even + odd
    even, odd = tl.split(x)
    return even + odd


@triton.jit(do_not_specialize=["SPLITS", "TILES", "num_nodes", "window"])
def attend_tiles(
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
    MERGED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    TEAMS: tl.constexpr,
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
    # A tree's last split has no share of the cache but the step's nodes, which take about as long.
    ways = SPLITS if WHOLE or CHAIN else SPLITS - 1
    per = tl.cdiv(tl.cdiv(tl.maximum(length - first, 0), ways), BN) * BN
    low = first + split * per
    high = tl.minimum(low + per, length)
    if FRESH:
        cos, sin = load_angles(POSITION + flat, COS, SIN, sc, live, d, D, BD)
    await_inputs(PDL)
    if tile * BM >= count * GROUP:
        return
    if FRESH:
        own = load_rotated(Q + flat * sq_m + head * sq_h, cos, sin, live, d, D, BD)
    else:
        own = load_rows(Q + flat[:, None] * sq_m + head[:, None] * sq_h + d[None, :], live, d, D, BD)
    if TEAMS == 1:
        peak = tl.full([BM], -1e30, tl.float32)
        total = tl.zeros([BM], tl.float32)
        found = tl.zeros([BM, BD], tl.float32)
        for t0 in range(low, high, BN):  # a tile is of one page: one number, so that loads after it can be pipelined
            t = t0 + tl.arange(0, BN)
            inside = t < high
            page = tl.load(TABLES + row * st + t0 // PAGE).to(tl.int64)
            at = page * sp + (t0 % PAGE) * ss + head_kv * sh
            offset = (tl.arange(0, BN) * ss)[:, None] + d[None, :]
            k = load_rows(KEYS + at + offset, inside, d, D, BD)
            v = load_rows(VALUES + at + offset, inside, d, D, BD)
            seen = inside[None, :]
            if WINDOW:
                seen = seen & (length + depth[:, None] - t[None, :] < window)
            qk = _scaled(tl.dot(own, tl.trans(k), input_precision=PRECISION), scaling, softcap, SOFTCAP)
            peak, total, found = _update(qk, seen, v, peak, total, found, PRECISION)
    else:
        q = tl.broadcast_to(own[None, :, :], (TEAMS, BM, BD))
        m = tl.full([TEAMS, BM], -1e30, tl.float32)
        l = tl.zeros([TEAMS, BM], tl.float32)
        acc = tl.zeros([TEAMS, BM, BD], tl.float32)
        token = tl.arange(0, TEAMS)[:, None] * (BN // TEAMS) + tl.arange(0, BN // TEAMS)[None, :]
        offset = (token * ss)[:, :, None] + d[None, None, :]
        for t0 in range(low, high, BN):
            t = t0 + token
            inside = t < high
            page = tl.load(TABLES + row * st + t0 // PAGE).to(tl.int64)
            at = page * sp + (t0 % PAGE) * ss + head_kv * sh
            there = inside[:, :, None] if D == BD else inside[:, :, None] & (d < D)[None, None, :]
            k = tl.load(KEYS + at + offset, mask=there, other=0.0)
            v = tl.load(VALUES + at + offset, mask=there, other=0.0)
            seen = inside[:, None, :]
            if WINDOW:
                seen = seen & (length + depth[None, :, None] - t[:, None, :] < window)
            qk = _scaled(tl.dot(q, tl.trans(k, (0, 2, 1)), input_precision=PRECISION), scaling, softcap, SOFTCAP)
            m, l, acc = _update(qk, seen, v, m, l, acc, PRECISION)
        peak = tl.max(m, 0)
        weight = tl.exp2(m - peak[None, :])
        total = tl.sum(l * weight, 0)
        found = _sum_teams(acc * weight[:, :, None], TEAMS, BM, BD)
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
                its_cos, its_sin = load_angles(POSITION + fresh, COS, SIN, sc, inside, d, D, BD)
                k = load_rotated(source, its_cos, its_sin, inside, d, D, BD)
                v = load_rows(source[:, None] + (H // GROUP) * sq_h + d[None, :], inside, d, D, BD)
                mine = inside & (j >= tile * BM // GROUP)  # each tile writes its own nodes
                store_rows(KEYS + at[:, None] + d[None, :], k, mine, d, D, BD)
                store_rows(VALUES + at[:, None] + d[None, :], v, mine, d, D, BD)
            else:
                k = load_rows(KEYS + at[:, None] + d[None, :], inside, d, D, BD)
                v = load_rows(VALUES + at[:, None] + d[None, :], inside, d, D, BD)
            its_depth = j
            if CHAIN:
                seen = (j[None, :] <= node[:, None]) & inside[None, :]
            else:
                bits = tl.load(BITS + (row * N + node) * W + j0 // 64, mask=live, other=0)
                seen = (((bits[:, None] >> (j % 64).to(tl.int64)[None, :]) & 1) != 0) & inside[None, :]
                if WINDOW:
                    its_depth = tl.load(DEPTH + row * N + j, mask=inside, other=0).to(tl.int32)
            if WINDOW:
                seen = seen & (depth[:, None] - its_depth[None, :] < window)
            qk = _scaled(tl.dot(own, tl.trans(k), input_precision=PRECISION), scaling, softcap, SOFTCAP)
            peak, total, found = _update(qk, seen, v, peak, total, found, PRECISION)
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    out = OUT + flat[:, None] * so_m + head[:, None] * so_h + d[None, :]
    if WHOLE:
        store_rows(out, found, live, d, D, BD)
    else:
        at = (split * num_nodes + flat) * H + head
        store_rows(PART + at[:, None] * D + d[None, :], found, live, d, D, BD)
        tl.store(LSE + at, tl.where(total > 0, peak + tl.log2(total), -float("inf")), mask=live)
        if MERGED > 0:
            counter = ARRIVED + tl.program_id(0) * (H // GROUP) + head_kv
            merge_in_place(PART, LSE, counter, out, flat, head, live, d, num_nodes, MERGED, H, D, BD, BM)
