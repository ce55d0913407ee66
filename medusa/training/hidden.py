"""The frozen backbone's hidden states where a batch predicts reply tokens: computed, or remembered over epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from medusa.model import Backbone, UnsupportedModelError
from medusa.training.batch import Batch, Row, collate


class HiddenCacheError(ValueError):
    """The hidden states of the rows do not fit the memory allowed for them; the message holds both sizes."""


def forward(backbone: Backbone, batch: Batch) -> Tensor:
    """The hidden states at the batch's positions, [N, d], with whatever gradient the backbone's weights ask for."""
    hidden_BTd = backbone.trainable_hidden_states(batch.tokens_BT, batch.rows)
    return hidden_BTd.flatten(0, 1)[batch.positions_N]


@torch.no_grad()
def check_packing(backbone: Backbone) -> None:
    """Raises UnsupportedModelError where a row's hidden states depend on the row before it in a packed line."""
    vocab = backbone.vocab_size
    rows = [
        Row.of([(7 * i + 3 * j) % vocab for j in range(5)], [(5 * i + j) % vocab for j in range(4)]) for i in (1, 2)
    ]
    packed, apart = (collate(rows, [0, 1], 1, packed=packed).to(backbone.device) for packed in (True, False))
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


class RememberedHidden:
    """One backbone forward a row, whose hidden states are kept: a frozen backbone answers alike every epoch.

    They lie in `home`, main memory or the device's own. The size is known from the rows, so that too large a memory is
    refused before any work. Each worker keeps the rows it meets, at most all of them. Values equal `ComputedHidden`'s
    up to the rounding of another batch. Batches come with their hidden states, and without tokens unless
    `with_tokens` asks for them: then neither padding nor labels are made again.
    """

    def __init__(
        self,
        compute: Callable[[Batch], Tensor],
        rows: Sequence[Row],
        num_heads: int,
        row_bytes: int,
        *,
        limit_gib: float,
        home: torch.device,
        device: torch.device,
        packed: bool = False,
        with_tokens: bool = False,
    ) -> None:
        needed_gib = sum(row.num_positions for row in rows) * row_bytes / 2**30
        if needed_gib > limit_gib:
            raise HiddenCacheError(
                f"hidden states of {len(rows)} rows need {needed_gib:.2f} GiB, hidden_cache_gib allows "
                f"{limit_gib:g}; raise it, or set it to 0 to compute them every epoch"
            )
        self._compute, self._rows, self._num_heads = compute, rows, num_heads
        self._home, self._device, self._packed, self._with_tokens = home, device, packed, with_tokens
        self._starts = np.concatenate([[0], np.cumsum([row.num_positions for row in rows])])
        self._known = np.zeros(len(rows), dtype=bool)
        self._hidden_Pd: Tensor | None = None  # P positions of all rows, one row behind the other
        self._next_P = torch.zeros(int(self._starts[-1]), dtype=torch.long, device=home)
        self._labels_PK = torch.zeros(int(self._starts[-1]), num_heads, dtype=torch.long, device=home)

    def batch(self, row_indices: Sequence[int]) -> Batch:
        """What `collate` makes of the rows, on the device, with their hidden states."""
        missing = [index for index in row_indices if not self._known[index]]
        if missing or self._hidden_Pd is None:
            self._remember(missing)
        whole = None
        if self._with_tokens:
            whole = collate(self._rows, row_indices, self._num_heads, packed=self._packed).to(self._device)
        places_N = self._places(row_indices)
        hidden_Nd, next_N, labels_NK = (
            kept[places_N].to(self._device, non_blocking=True)
            for kept in (self._hidden_Pd, self._next_P, self._labels_PK)
            if kept is not None
        )
        if whole is not None:
            return replace(whole, hidden_Nd=hidden_Nd)
        return Batch(
            tokens_BT=next_N.new_empty(0, 0),
            positions_N=next_N.new_empty(0),
            next_N=next_N,
            labels_NK=labels_NK,
            row_indices=tuple(row_indices),
            positions_per_row=tuple(self._rows[index].num_positions for index in row_indices),
            hidden_Nd=hidden_Nd,
        )

    def fill(self, batch_tokens: int) -> None:
        """Remembers every row now, in batches of about so many tokens of like length: larger ones than a step's."""
        by_length = sorted(np.flatnonzero(~self._known).tolist(), key=lambda index: len(self._rows[index]))
        some: list[int] = []
        for index in by_length:
            if some and (len(some) + 1) * len(self._rows[index]) > batch_tokens:
                self._remember(some)
                some = []
            some.append(index)
        self._remember(some)

    @torch.no_grad()
    def _remember(self, row_indices: Sequence[int]) -> None:
        batch = collate(self._rows, row_indices, self._num_heads, packed=self._packed).to(self._device)
        hidden_Nd = self._compute(batch).to(self._home)
        if self._hidden_Pd is None:
            self._hidden_Pd = hidden_Nd.new_zeros(len(self._next_P), hidden_Nd.shape[1])
        places_N = self._places(batch.row_indices)
        self._hidden_Pd[places_N] = hidden_Nd
        self._next_P[places_N] = batch.next_N.to(self._home)
        self._labels_PK[places_N] = batch.labels_NK.to(self._home)
        self._known[list(row_indices)] = True

    def _places(self, row_indices: Sequence[int]) -> Tensor:
        """Where the rows' positions lie, one row behind the other."""
        ranges = [np.arange(self._starts[index], self._starts[index + 1]) for index in row_indices]
        places = np.concatenate([*ranges, np.empty(0, dtype=np.int64)])
        return torch.from_numpy(places).to(self._home, non_blocking=True)
