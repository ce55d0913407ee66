"""The end of both acceptance kernels (`walk.py`): clips what a sequence emits and moves its row's state on.

Shapes: B sequences, M flat nodes, R batch rows, E stop ids, D deepest depth + 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from medusa.kernels.checks import check
from medusa.kernels.state import Drafts, Emitted, RowState, Trees


@triton.jit
def commit(
    b,
    row,
    start,
    live,
    emitted,
    path,
    length,
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
    E: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
):
    """Clips `length` emitted tokens, writes the sequence's outputs, and moves its row's state on."""
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    output, remaining = tl.load(NUM_OUTPUT + row), tl.load(REMAINING + row)
    stops = tl.load(STOP + row * E + e, mask=e < E, other=-1)
    is_stop = tl.max(((emitted[:, None] == stops[None, :]) & (stops >= 0)[None, :]).to(tl.int32), 1) != 0
    is_stop = is_stop & (d < length) & (output + d + 1 >= tl.load(MIN_TOKENS + row))
    to_stop = tl.min(tl.where(is_stop, d, BD), 0) + 1
    num = tl.where(live, tl.minimum(tl.minimum(length, to_stop), remaining), 0)
    finished = tl.where(to_stop <= num, 1, tl.where(num == remaining, 2, 0))
    finished = tl.where(live, finished, 0)
    last = tl.where(live, start + tl.max(tl.where(d == num - 1, path, -1), 0), tl.minimum(start, M - 1))
    tl.store(OUT + b * D + d, tl.where(d < num, emitted, -1), mask=d < D)
    tl.store(PATH + b * D + d, tl.where(d < num, path, -1), mask=d < D)
    tl.store(NUM + b, num)
    tl.store(LAST + b, last)
    tl.store(FINISHED + b, finished)
    total = tl.load(LENGTH + row) + num
    tl.debug_barrier()  # no warp may still read the row's state when another writes it
    if live:
        tl.store(LENGTH + row, total)
        tl.store(ROOT + row, tl.max(tl.where(d == num - 1, emitted, -1), 0))
        tl.store(NUM_OUTPUT + row, output + num)
        tl.store(REMAINING + row, remaining - num)
        tl.store(LIVE + row, (finished == 0).to(tl.int32))
        tl.store(NUM_GUESSED + row, num_guessed)


def check_step(
    rows_B: torch.Tensor, count_B: torch.Tensor, drafts: Drafts, trees: Trees, state: RowState, out: Emitted
) -> None:
    """Raises ValueError unless an acceptance kernel can be launched on these."""
    (batch,) = rows_B.shape
    check("rows_B", rows_B, torch.int32, batch)
    check("count_B", count_B, torch.int32, batch)
    check("start_B", drafts.start_B, torch.int32, batch)
    check("tokens_BD", out.tokens_BD, torch.int64, batch, None)
    check("parent_RN", trees.parent_RN, torch.int32, state.num_rows, None)


def outputs(state: RowState, out: Emitted) -> tuple[torch.Tensor, ...]:
    """`commit`'s tensors from STOP to FINISHED, in the order of its parameters."""
    return (
        state.stop_ids_RE,
        state.min_tokens_R,
        state.length_R,
        state.root_R,
        state.num_output_R,
        state.remaining_R,
        state.live_R,
        state.num_guessed_R,
        out.tokens_BD,
        out.path_BD,
        out.num_B,
        out.last_B,
        out.finished_B,
    )


def sizes(state: RowState, out: Emitted) -> dict[str, int]:
    """`commit`'s sizes."""
    num_stops, num_depths = state.stop_ids_RE.shape[1], out.tokens_BD.shape[1]
    return {
        "E": num_stops,
        "D": num_depths,
        "BD": triton.next_power_of_2(num_depths),
        "BE": triton.next_power_of_2(max(1, num_stops)),
    }
