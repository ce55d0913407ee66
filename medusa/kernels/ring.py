"""What products by a ring of tiles (ring.cuh) share on the host: how far ahead they read, and what they take.

Shapes: M rows of X, N columns of the result, S splits of the reduced axis.
"""

from __future__ import annotations

import torch

from medusa.kernels.tiles import RingTiles

AHEAD = 2  # tiles of the matrix under way at a time until the kernel ahead has ended: more delay its reads
AHEAD_OF_FEW = 3  # the same where that kernel reads no more than FEW_ROWS
FEW_ROWS = 16


def ahead_of(rows_x: int) -> int:
    """Tiles of the matrix under way at a time until the kernel ahead has ended."""
    return AHEAD_OF_FEW if rows_x <= FEW_ROWS else AHEAD


def rows_there(x: torch.Tensor, wanted: int) -> int:
    """How many rows can be read from x on, at most `wanted`: for others the hardware fills in zeros, which takes
    longer. A row gives nothing to another's results."""
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return min(wanted, 1 + (elements - x.shape[1]) // x.stride(0))


def check_rows(x: torch.Tensor, tiles: RingTiles) -> None:
    """Raises ValueError for rows of X that the hardware cannot copy, or more of them than a tile has."""
    if len(x) > tiles.rows_x or x.stride(0) < x.shape[1] or x.stride(0) % 8 or x.data_ptr() % 16:
        raise ValueError(
            f"rows of X must be at most {tiles.rows_x}, apart, and start at multiples of 16 bytes; got {tuple(x.shape)}"
            f" with stride {x.stride(0)}: multiply by `matmul`"
        )


def check_result(out: torch.Tensor, tiles: RingTiles, bias: torch.Tensor | None, *, gated: bool) -> None:
    """Raises ValueError where `out` has not as many partial sums as there are splits, or a bias would go into parts."""
    shares, biased = out.shape[0] if out.dim() == 3 else 1, bias is not None
    if shares != tiles.splits or (biased and (tiles.splits > 1 or gated)):
        raise ValueError(
            f"{tiles.splits} splits write [S, M, N] without bias, a gated product none either; got out"
            f" {tuple(out.shape)}, bias {biased}"
        )
