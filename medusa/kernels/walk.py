"""Acceptance on the device: what each sequence of a step emits, and the state that follows, one program a sequence.

Exact acceptance (`walk`): emit the root's sample; while a child of the node holds the token just emitted, descend and
emit that child's sample. Typical acceptance (`walk_typical`): the path to the deepest node all of whose ancestors are
kept, of the deepest the one with the best score; then the sample there. Either is clipped after the first stop id that
comes when the reply may end, and at the number of tokens that the reply may still get.

Shapes: B sequences, M flat nodes, R batch rows, N nodes a tree (W words of bits), X splits of the vocabulary, E stop
ids, D deepest depth + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.commit import check_step, commit, outputs, sizes
from medusa.kernels.launch import await_inputs, options, packed_index
from medusa.kernels.state import Drafts, Emitted, RowState, Trees


@triton.jit(do_not_specialize=["num_guessed"])
def _walk(
    ROWS,
    START,
    COUNT,
    TOKENS,
    VALID,
    SAMPLES,
    PARENT,
    STOP,
    MIN_TOKENS,
    LENGTH,
    ROOT,
    NUM_OUTPUT,
    REMAINING,
    LIVE,
    NUM_GUESSED,
    OUT,
    PATH,
    NUM,
    LAST,
    FINISHED,
    M,
    num_guessed,
    X,
    N: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BX: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    b = tl.program_id(0)
    row, start, count = tl.load(ROWS + b), tl.load(START + b), tl.load(COUNT + b)
    live = (tl.load(LIVE + row) != 0) & (count > 0)
    j, d, x = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BX)
    mine = live & (j < count)
    token = tl.load(TOKENS + start + j, mask=mine, other=-1)
    parent = tl.load(PARENT + row * N + j, mask=mine, other=-1)
    parent = tl.where(tl.load(VALID + start + j, mask=mine, other=0) != 0, parent, -1)
    emitted = tl.full([BD], -1, tl.int64)
    path = tl.full([BD], -1, tl.int32)
    node = count * 0
    length = count * 0
    going = live.to(tl.int32)
    while going != 0:
        if PACKED:
            pairs = tl.load(SAMPLES + (start + node) * X + x, mask=x < X, other=-(2**63))
            drawn = packed_index(tl.max(pairs, 0))
        else:
            drawn = tl.load(SAMPLES + start + node)
        emitted = tl.where(d == length, drawn, emitted)
        path = tl.where(d == length, node, path)
        length += 1
        child = tl.min(tl.where((parent == node) & (token == drawn), j, N), 0)
        going = ((child < N) & (length < D)).to(tl.int32)
        node = tl.where(child < N, child, node)
    commit(
        b, row, start, live, emitted, path, length, STOP, MIN_TOKENS, LENGTH, ROOT, NUM_OUTPUT, REMAINING, LIVE,
        NUM_GUESSED, OUT, PATH, NUM, LAST, FINISHED, M, num_guessed, E, D, BD, BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_guessed"])
def _walk_typical(
    ROWS,
    START,
    COUNT,
    TOKENS,
    VALID,
    SAMPLES,
    KEPT,
    SCORE,
    PARENT,
    DEPTH,
    BITS,
    TEMPERATURE,
    EXACT,
    STOP,
    MIN_TOKENS,
    LENGTH,
    ROOT,
    NUM_OUTPUT,
    REMAINING,
    LIVE,
    NUM_GUESSED,
    OUT,
    PATH,
    NUM,
    LAST,
    FINISHED,
    M,
    num_guessed,
    N: tl.constexpr,
    BN: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    PDL: tl.constexpr,
):
    await_inputs(PDL)
    b = tl.program_id(0)
    row, start, count = tl.load(ROWS + b), tl.load(START + b), tl.load(COUNT + b)
    live = (tl.load(LIVE + row) != 0) & (count > 0)
    j, d = tl.arange(0, BN), tl.arange(0, BD)
    mine = live & (j < count)
    token = tl.load(TOKENS + start + j, mask=mine, other=-1)
    parent = tl.load(PARENT + row * N + j, mask=mine, other=-1)
    depth = tl.load(DEPTH + row * N + j, mask=mine, other=D)
    valid = tl.load(VALID + start + j, mask=mine, other=0) != 0
    drawn = tl.load(SAMPLES + start + tl.maximum(parent, 0), mask=mine, other=-1)
    kept = tl.load(KEPT + start + j, mask=mine, other=0) != 0
    exact = (tl.load(EXACT + row) != 0) | (tl.load(TEMPERATURE + row) <= 0.0)
    kept = tl.where(exact, token == drawn, kept) | (depth == 0)
    kept = kept & valid & (depth < D)
    whole = mine
    for word in tl.static_range(N // 64):
        flags = tl.where((j // 64) == word, kept.to(tl.int64) << (j % 64).to(tl.int64), 0)
        seen = tl.load(BITS + (row * N + j) * (N // 64) + word, mask=mine, other=0)
        whole = whole & ((seen & ~tl.sum(flags, 0)) == 0)
    deepest = tl.max(tl.where(whole, depth, 0), 0)
    score = tl.load(SCORE + start + j, mask=mine, other=0.0)
    score = tl.where(score == score, score, -float("inf"))
    best = whole & (depth == deepest)
    highest = tl.max(tl.where(best, score, -float("inf")), 0)
    last = tl.min(tl.where(best & (score == highest), j, N), 0)
    last = tl.where(live, last, 0)
    words = tl.load(BITS + (row * N + last) * (N // 64) + j // 64, mask=mine, other=0)
    on_path = mine & (((words >> (j % 64).to(tl.int64)) & 1) != 0)
    at = on_path[:, None] & (depth[:, None] == d[None, :])
    path = tl.max(tl.where(at, j[:, None], -1), 0)
    after = on_path[:, None] & (depth[:, None] == d[None, :] + 1)
    emitted = tl.max(tl.where(after, token[:, None], -1), 0)
    bonus = tl.load(SAMPLES + start + last, mask=live, other=-1)
    emitted = tl.where(d == deepest, bonus, emitted)
    length = deepest + 1
    commit(
        b, row, start, live, emitted, path, length, STOP, MIN_TOKENS, LENGTH, ROOT, NUM_OUTPUT, REMAINING, LIVE,
        NUM_GUESSED, OUT, PATH, NUM, LAST, FINISHED, M, num_guessed, E, D, BD, BE,
    )  # fmt: skip


def walk(
    rows_B: torch.Tensor,
    count_B: torch.Tensor,
    drafts: Drafts,
    samples: torch.Tensor,
    trees: Trees,
    state: RowState,
    out: Emitted,
    *,
    num_guessed: int = 0,
    pdl: bool = False,
) -> None:
    """Exact acceptance: writes every element of `out`; moves length, root, num_output, remaining and live on in place.

    `samples` are `sample`'s packed [M, X] int64, or a token a node, [M] int64. A live row occurs once in `rows_B`;
    `num_guessed` heads guess after it, now or when the next step begins.
    Dead and padding sequences emit nothing and change nothing.
    """
    num_nodes = trees.parent_RN.shape[1]
    check_step(rows_B, count_B, drafts, trees, state, out)
    check("samples", samples, torch.int64, drafts.num_nodes, *(None,) * (samples.ndim - 1))
    splits = samples.shape[1] if samples.ndim == 2 else 1
    _walk[(rows_B.shape[0],)](
        rows_B,
        drafts.start_B,
        count_B,
        drafts.tokens_M,
        drafts.valid_M,
        samples,
        trees.parent_RN,
        *outputs(state, out),
        drafts.num_nodes,
        num_guessed,
        splits,
        N=num_nodes,
        BN=triton.next_power_of_2(num_nodes),
        BX=triton.next_power_of_2(splits),
        PACKED=samples.ndim == 2,
        **sizes(state, out),
        PDL=pdl,
        num_warps=1,
        **options(pdl),
    )


def walk_typical(
    rows_B: torch.Tensor,
    count_B: torch.Tensor,
    drafts: Drafts,
    sampled_M: torch.Tensor,
    kept_M: torch.Tensor,
    score_M: torch.Tensor,
    trees: Trees,
    state: RowState,
    out: Emitted,
    *,
    num_guessed: int = 0,
    pdl: bool = False,
) -> None:
    """Typical acceptance, with `walk`'s outputs. `kept_M` (bool) and `score_M` (float32, a path's log-probability) are
    `medusa.kernels.typical.judge`'s. `sampled_M` is what follows the accepted drafts: every node's draw, or its argmax
    (the paper's root). Rows at temperature 0 and `exact_R` rows keep the drafts that match `sampled_M` at their parent.
    """
    num_nodes = trees.parent_RN.shape[1]
    check_step(rows_B, count_B, drafts, trees, state, out)
    check("sampled_M", sampled_M, torch.int64, drafts.num_nodes)
    check("kept_M", kept_M, torch.bool, drafts.num_nodes)
    check("score_M", score_M, torch.float32, drafts.num_nodes)
    _walk_typical[(rows_B.shape[0],)](
        rows_B,
        drafts.start_B,
        count_B,
        drafts.tokens_M,
        drafts.valid_M,
        sampled_M,
        kept_M.view(torch.uint8),
        score_M,
        trees.parent_RN,
        trees.depth_RN,
        trees.bits_RNW,
        state.temperature_R,
        state.exact_R,
        *outputs(state, out),
        drafts.num_nodes,
        num_guessed,
        N=num_nodes,
        BN=triton.next_power_of_2(num_nodes),
        **sizes(state, out),
        PDL=pdl,
        num_warps=1 if num_nodes == 64 else 4,
        **options(pdl),
    )
