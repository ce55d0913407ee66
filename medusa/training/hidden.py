"""The frozen backbone's hidden states where a batch predicts reply tokens: computed, or remembered over epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa.model import Backbone, UnsupportedModelError
from medusa.training.batch import Batch, Row, collate


class HiddenCacheError(ValueError):
    """The hidden states of the rows do not fit the memory allowed for them; the message holds both sizes."""


def forward(backbone: Backbone, batch: Batch) -> Tensor:
    """The hidden states at the batch's positions, [N, d], with whatever gradient the backbone's weights ask for."""
    hidden_BTd = backbone.trainable_hidden_states(batch.tokens_BT, batch.position_ids_BT)
    return hidden_BTd.flatten(0, 1)[batch.positions_N]


@torch.no_grad()
def check_packing(backbone: Backbone) -> None:
    """Raises UnsupportedModelError where a row's hidden states depend on the row before it in a packed line."""
    vocab = backbone.vocab_size
    rows = [
        Row.of([(7 * i + 3 * j) % vocab for j in range(5)], [(5 * i + j) % vocab for j in range(4)]) for i in (1, 2)
    ]
    packed, apart = (collate(rows, [0, 1], 1, pack_to).to(backbone.device) for pack_to in (18, None))
    difference = (forward(backbone, packed) - forward(backbone, apart)).abs().max()
    scale = forward(backbone, apart).abs().max()
    if difference > scale * (1e-4 if backbone.dtype == torch.float32 else 5e-2):
        raise UnsupportedModelError(
            f"{backbone.config.model_type} attends across the rows of a packed line (hidden states differ by "
            f"{float(difference):.3g} of {float(scale):.3g}); set packing to false"
        )


class ComputedHidden:
    """One backbone forward a batch."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """[N, d], in the order of `positions_N`."""
        return forward(self._backbone, batch)


class CachedHidden:
    """One backbone forward a row: kept in main memory, since a frozen backbone answers alike every epoch.

    The size is known from the rows, so that too large a cache is refused before any work. Each worker keeps the
    rows it meets, at most all of them. Values equal `ComputedHidden`'s up to the rounding of another batch.
    """

    def __init__(self, backbone: Backbone, rows: Sequence[Row], limit_gib: float, pack_to: int | None = None) -> None:
        row_bytes = backbone.hidden_size * backbone.dtype.itemsize
        needed_gib = sum(row.num_positions for row in rows) * row_bytes / 2**30
        if needed_gib > limit_gib:
            raise HiddenCacheError(
                f"hidden states of {len(rows)} rows need {needed_gib:.2f} GiB, hidden_cache_gib allows "
                f"{limit_gib:g}; raise it, or set it to 0 to compute them every epoch"
            )
        self._backbone = backbone
        self._rows = rows
        self._pack_to = pack_to
        self._hidden_of_row: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """[N, d], in the order of `positions_N`."""
        missing = [index for index in batch.row_indices if index not in self._hidden_of_row]
        if missing:
            self._remember(missing)
        hidden = [self._hidden_of_row[index] for index in batch.row_indices]
        hidden.append(torch.empty(0, self._backbone.hidden_size, dtype=self._backbone.dtype))
        return torch.cat(hidden).to(self._backbone.device, non_blocking=True)

    def _remember(self, row_indices: Sequence[int]) -> None:
        batch = collate(self._rows, row_indices, 1, self._pack_to)
        hidden_Nd = forward(self._backbone, batch.to(self._backbone.device)).cpu()
        for index, hidden in zip(batch.row_indices, hidden_Nd.split(list(batch.positions_per_row)), strict=True):
            self._hidden_of_row[index] = hidden.clone()
