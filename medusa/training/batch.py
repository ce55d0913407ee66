"""From rows of token ids to batches with shifted labels, in four steps.

1. `fit_rows` cuts rows to `max_length`, drops those that leave nothing to learn, and counts both.
2. `EpochSampler` says which rows make up a step: a pure function of the step, so its state is the step.
3. `make_labels` shifts the labels once: labels_BTK[b, t, k] = token[b, t + k + 2]. The loss only indexes.
4. `collate` pads the rows of a step, or packs them into one line, and keeps the positions that predict a reply token.

A position carries a label for head k only if the tokens t+1 .. t+k+2 all lie inside one reply. So prompts,
padding and the next row of a packed line are never labels, and positions before the last prompt token
carry none: serving never asks the heads for a guess there.

Axes: B lines (rows, or one with all of them packed), T tokens of a line, K heads, N positions that predict a reply
token: of a row, from its last prompt token to its last token but one, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from medusa.attention import PackedRows

IGNORE = -100
PAD_ID = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its reply, as one tensor of ids; the reply starts at `prompt_length`."""

    token_ids: Tensor
    prompt_length: int

    @classmethod
    def of(cls, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Row:
        if len(prompt_ids) == 0:
            raise ValueError("a row needs a prompt of at least one token, got none")
        prompt, completion = (torch.tensor(ids, dtype=torch.int32) for ids in (prompt_ids, completion_ids))
        return cls(torch.cat([prompt, completion]), len(prompt_ids))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_positions(self) -> int:
        """Positions that predict a reply token, from the last prompt token on."""
        return max(len(self) - self.prompt_length, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """What became of the rows: read = kept + without_labels; `truncated` counts cut rows of both kinds."""

    read: int
    kept: int
    truncated: int
    tokens_cut: int
    without_labels: int


def fit_rows(rows: Iterable[Row], max_length: int) -> tuple[list[Row], RowCounts]:
    """Rows of at most `max_length` tokens that carry a label, in their order, and what was lost."""
    if max_length < 3:
        raise ValueError(f"max_length must be at least 3 (prompt, next token, first label), got {max_length}")
    kept: list[Row] = []
    read = truncated = tokens_cut = 0
    for row in rows:
        read += 1
        excess = len(row) - max_length
        if excess > 0:
            truncated += 1
            tokens_cut += excess
            row = Row(row.token_ids[:max_length], row.prompt_length)
        if row.num_positions > 1:  # head 0's label is the reply's second token
            kept.append(row)
    counts = RowCounts(
        read=read, kept=len(kept), truncated=truncated, tokens_cut=tokens_cut, without_labels=read - len(kept)
    )
    return kept, counts


def make_labels(tokens_BT: Tensor, reply_mask_BT: Tensor, num_heads: int) -> Tensor:
    """labels_BTK[b, t, k] = token[b, t + k + 2] where t+1 .. t+k+2 are all reply tokens, else IGNORE."""
    length = tokens_BT.shape[1]
    ids = pad(tokens_BT.long(), (0, num_heads + 1), value=IGNORE)
    inside = pad(reply_mask_BT, (0, num_heads + 1), value=False)
    labels_BTK = ids[:, 2:].unfold(1, num_heads, 1)
    next_inside_BT1 = inside[:, 1 : length + 1, None]
    unbroken_BTK = inside[:, 2:].unfold(1, num_heads, 1).cumprod(-1).bool() & next_inside_BT1
    return labels_BTK.masked_fill(~unbroken_BTK, IGNORE)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one forward pass. `positions_N` indexes the flattened [B * T], row after row in the order of
    `row_indices`; `next_N` is the token after each of them (the LM head's label), `labels_NK` the heads'.

    `rows` lie packed in one line; None where every line is one row. `hidden_Nd` are the base model's hidden states at
    the positions where they are remembered (medusa/training/hidden.py).
    """

    tokens_BT: Tensor
    positions_N: Tensor
    next_N: Tensor
    labels_NK: Tensor
    row_indices: tuple[int, ...]
    positions_per_row: tuple[int, ...]
    rows: PackedRows | None = None
    hidden_Nd: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Padding included: what the backbone computes."""
        return self.tokens_BT.numel()

    @property
    def ahead_NK(self) -> Tensor:
        """ahead[n, k] = token[t + k + 1], the tokens that head k is given by a drafter that sees its own path; 0 past
        the end of a reply, where head k has no label either."""
        return torch.cat([self.next_N[:, None], self.labels_NK[:, :-1].clamp_min(0)], dim=1)

    def to(self, device: torch.device) -> Batch:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens_BT", "positions_N", "next_N", "labels_NK", "hidden_Nd")
            if getattr(self, name) is not None
        }
        return replace(self, **moved, rows=self.rows and self.rows.to(device))


def collate(rows: Sequence[Row], row_indices: Sequence[int], num_heads: int, *, packed: bool = False) -> Batch:
    """Pads the named rows on the right, or packs them into one line. No rows give one line of padding, so that a worker
    without rows still takes part in the step's collectives."""
    named = [rows[index] for index in row_indices]
    longest = sum(map(len, named)) if packed else max(map(len, named), default=0)
    tokens_BT = torch.full((1 if packed else max(len(named), 1), max(longest, 1)), PAD_ID, dtype=torch.long)
    reply_mask_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    positions: list[Tensor] = []
    start = 0
    for b, row in enumerate(named):
        line, end = (0, start + len(row)) if packed else (b, len(row))
        tokens_BT[line, start:end] = row.token_ids
        reply_mask_BT[line, start + row.prompt_length : end] = True
        positions.append(torch.arange(start + row.prompt_length - 1, end - 1) + line * longest)
        start = end if packed else 0
    labels_BTK = make_labels(tokens_BT, reply_mask_BT, num_heads)
    positions_N = torch.cat([torch.empty(0, dtype=torch.long), *positions])
    return Batch(
        tokens_BT=tokens_BT,
        positions_N=positions_N,
        next_N=tokens_BT.flatten()[positions_N + 1],
        labels_NK=labels_BTK.flatten(0, 1)[positions_N],
        row_indices=tuple(row_indices),
        positions_per_row=tuple(map(len, positions)),
        rows=PackedRows.of(list(map(len, named)) or [1]) if packed else None,
    )


class EpochSampler:
    """step -> this rank's row indices. Every row once an epoch; the same global batches for any world size.

    Rows are shuffled, cut into buckets of `bucket_batches` batches, sorted by length inside a bucket, and
    the batches are shuffled: little padding, no drift from short to long, and nothing to save but the step.
    The last batch of an epoch's shuffle may be short. A rank takes every world_size-th row of a batch.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        lengths: Sequence[int] | None = None,
        bucket_batches: int = 16,
    ) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(f"need at least one row and one row a batch, got {num_rows} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if lengths is not None and len(lengths) != num_rows:
            raise ValueError(f"lengths must hold one entry for each of {num_rows} rows, got {len(lengths)}")
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._lengths = torch.tensor(lengths if lengths is not None else [1] * num_rows)
        self._bucket_rows = bucket_batches * batch_size
        self._epoch_batches = lru_cache(maxsize=2)(self._plan_epoch)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __call__(self, step: int) -> list[int]:
        return self.global_rows(step)[self.rank :: self.world_size]

    def global_rows(self, step: int) -> list[int]:
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch_batches(epoch)[position]

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.num_rows, generator=generator)
        buckets = [self._sorted_by_length(bucket) for bucket in shuffled.split(self._bucket_rows)]
        batches = [batch.tolist() for bucket in buckets for batch in bucket.split(self.batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _sorted_by_length(self, bucket: Tensor) -> Tensor:
        return bucket[self._lengths[bucket].argsort(stable=True)]
