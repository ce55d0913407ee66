"""The attention functions that this project registers with transformers: over token trees, and of packed rows.

A forward with a `tree` keyword sends each layer's query, key and value to that tree's `attend`; one with `rows` attends
within each row of a packed line. Everything else of the model stays transformers' own. What such a forward cannot
carry is refused by name.

Shapes: B sequences, N tree nodes or tokens of a packed line, R rows of it, T tokens of the longest, H query heads,
G key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch.nn import functional
from transformers import AttentionInterface

TREE_ATTENTION = "medusa_tree"
PACKED_ATTENTION = "medusa_packed"


class UnsupportedModelError(ValueError):
    """The model is of a kind that tree decoding does not cover; the message names the kind."""


class TreeAttention(Protocol):
    """What a tree forward needs: attention of one layer's nodes over their ancestors and the committed tokens."""

    def attend(
        self,
        layer: int,
        query_BHND: torch.Tensor,
        key_BHND: torch.Tensor,
        value_BHND: torch.Tensor,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Returns [B, N, H, D]; keys and values have their own, possibly smaller, number of heads."""
        ...


@dataclass(frozen=True)
class PackedRows:
    """Rows that lie behind each other in one line of N tokens.

    `position_1N` restarts at each row; `place_RT` is where in the line each token of each row lies (0 past its end),
    `slot_N` where in [R * T] each token of the line does.
    """

    position_1N: torch.Tensor
    place_RT: torch.Tensor
    slot_N: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        length_R1 = torch.tensor(lengths)[:, None]
        inside_RT = torch.arange(int(length_R1.max())) < length_R1
        place_RT = torch.zeros(inside_RT.shape, dtype=torch.long)
        place_RT[inside_RT] = torch.arange(sum(lengths))
        return cls(inside_RT.nonzero()[None, :, 1], place_RT, inside_RT.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> Self:
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.position_1N, self.place_RT, self.slot_N))
        return type(self)(*moved)

    def apart(self, line_1HND: torch.Tensor) -> torch.Tensor:
        """The line's heads as [R, H, T, D], padded with what stands first in the line."""
        rows_RTHD = line_1HND[0].transpose(0, 1)[self.place_RT]
        return rows_RTHD.transpose(1, 2)

    def packed(self, rows_RHTD: torch.Tensor) -> torch.Tensor:
        """The inverse, as [1, N, H, D]."""
        return rows_RHTD.transpose(1, 2).flatten(0, 1)[self.slot_N][None]


def _check_plain(module: torch.nn.Module, what: str, brought: object, others: dict[str, Any]) -> None:
    """Refuses a model that did not hand down what its forward brought; and a mask of its own, attention sinks, position
    biases, chosen blocks: all change what a token attends to."""
    kind = module.config.model_type  # type: ignore[union-attr]
    if brought is None:
        raise UnsupportedModelError(f"{kind} does not hand keyword arguments down to its attention")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{kind} is not causal here; only decoders can carry Medusa heads")
    if asked := sorted(name for name, given in others.items() if given is not None and given is not False):
        raise UnsupportedModelError(f"{kind} attends with {asked}, which {what} attention does not cover")


def _tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    tree: TreeAttention | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    _check_plain(module, "tree", tree, others | {"attention_mask": attention_mask})
    assert tree is not None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree.attend(int(module.layer_idx), query, key, value, scaling, sliding_window, softcap), None  # type: ignore[arg-type]


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    rows: PackedRows | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Each row apart, padded to the longest for attention alone: a row's tokens see none behind them, so that neither
    padding nor neighbours need a mask, and kernels without one are the fast ones."""
    _check_plain(module, "packed", rows, others | {"attention_mask": attention_mask})
    assert rows is not None
    query_RHTD, key_RGTD, value_RGTD = (rows.apart(heads) for heads in (query, key, value))
    length = query_RHTD.shape[2]
    if softcap is not None:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        seen_TT = _window(length, sliding_window, query.device)
        out_RHTD = _capped(query_RHTD, key_RGTD, value_RGTD, seen_TT, scaling, softcap)
    else:
        is_cut = sliding_window is not None and sliding_window < length
        out_RHTD = functional.scaled_dot_product_attention(
            query_RHTD, key_RGTD, value_RGTD,
            attn_mask=_window(length, sliding_window, query.device) if is_cut else None, is_causal=not is_cut,
            dropout_p=dropout, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
    return rows.packed(out_RHTD), None


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which tokens of a row each of its tokens sees: those before it and itself, `window` in all."""
    behind_TT = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (behind_TT >= 0) & (behind_TT < (window or length))


def _capped(
    query_RHTD: torch.Tensor,
    key_RGTD: torch.Tensor,
    value_RGTD: torch.Tensor,
    seen_TT: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Scores softly capped before their softmax, which torch's own attention does not do."""
    group = query_RHTD.shape[1] // key_RGTD.shape[1]
    key_RHTD, value_RHTD = (heads.repeat_interleave(group, 1) for heads in (key_RGTD, value_RGTD))
    scores_RHTT = softcap * torch.tanh(query_RHTD @ key_RHTD.mT * scaling / softcap)
    scores_RHTT = scores_RHTT.masked_fill(~seen_TT, float("-inf"))
    weights_RHTT = scores_RHTT.softmax(-1, dtype=torch.float32).to(query_RHTD.dtype)
    return weights_RHTT @ value_RHTD


# A name without an entry in transformers' mask registry gets no mask built: trees and rows bring their own.
AttentionInterface.register(TREE_ATTENTION, _tree_attention)
AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
