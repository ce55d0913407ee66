"""The frozen backbone's hidden states at a batch's labelled positions: computed, or remembered over epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa.model import Backbone
from medusa.training.batch import Batch, Row


class HiddenCacheError(ValueError):
    """The hidden states of the rows do not fit the memory allowed for them; the message holds both sizes."""


class ComputedHidden:
    """One backbone forward a batch."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """[N, d], in the order of `positions_N`."""
        return self._backbone.hidden_states(batch.tokens_BT).flatten(0, 1)[batch.positions_N]


class CachedHidden:
    """One backbone forward a row: kept in main memory, since a frozen backbone answers alike every epoch.

    The size is known from the rows, so that too large a cache is refused before any work. Each worker keeps the
    rows it meets, at most all of them. Values equal `ComputedHidden`'s up to the rounding of another batch.
    """

    def __init__(self, backbone: Backbone, rows: Sequence[Row], limit_gib: float) -> None:
        row_bytes = backbone.hidden_size * backbone.dtype.itemsize
        needed_gib = sum(row.num_positions for row in rows) * row_bytes / 2**30
        if needed_gib > limit_gib:
            raise HiddenCacheError(
                f"hidden states of {len(rows)} rows need {needed_gib:.2f} GiB, hidden_cache_gib allows "
                f"{limit_gib:g}; raise it, or set it to 0 to compute them every epoch"
            )
        self._backbone = backbone
        self._hidden_of_row: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """[N, d], in the order of `positions_N`."""
        self._remember_missing(batch)
        hidden = [self._hidden_of_row[index] for index in batch.row_indices]
        hidden.append(torch.empty(0, self._backbone.hidden_size, dtype=self._backbone.dtype))
        return torch.cat(hidden).to(self._backbone.device, non_blocking=True)

    def _remember_missing(self, batch: Batch) -> None:
        missing = [b for b, index in enumerate(batch.row_indices) if index not in self._hidden_of_row]
        if not missing:
            return
        hidden_MTd = self._backbone.hidden_states(batch.tokens_BT[missing])
        positions_of_row = batch.positions_N.split(list(batch.positions_per_row))
        for m, b in enumerate(missing):
            t = positions_of_row[b] - b * batch.tokens_BT.shape[1]
            self._hidden_of_row[batch.row_indices[b]] = hidden_MTd[m, t].cpu()
