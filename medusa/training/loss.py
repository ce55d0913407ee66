"""The heads' loss and the language model's: which rows, targets and weights go into the chunked sums.

`heads_loss` gives each head its own shifted label (paper, section 2.2.1); `lm_loss` keeps the backbone of Medusa-2 what
it was. `heads_loss_eager` is the first in plain torch, all logits at once, kept as the oracle.

Axes: N positions that predict a reply token, K heads, d hidden size, V the vocabulary of a head, M measures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from medusa.heads import DraftHeads
from medusa.training.batch import IGNORE
from medusa.training.chunked import Cap, TeacherLoss, TeacherRows, TokenLoss, chunked, widened
from medusa.training.schedule import HeadsLossConfig

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]  # features, weight, targets -> loss, top-1 and top-5 hits

TOKENS = HeadsLossConfig(kind="tokens")  # the one that asks for no teacher


@dataclass(frozen=True, slots=True)
class HeadTotals:
    """Sums over labels, each [K]: add them over micro-batches and workers, divide at the end.

    `labels` counts all labels, `covered` those that carry loss: inside the head's vocabulary, where the loss is on
    tokens. Hits are out of all labels, so that a label outside a truncated vocabulary is a miss.
    """

    values_MK: Tensor

    @classmethod
    def zeros(cls, num_heads: int, device: torch.device) -> HeadTotals:
        return cls(torch.zeros(5, num_heads, dtype=torch.float64, device=device))

    def __add__(self, other: HeadTotals) -> HeadTotals:
        return HeadTotals(self.values_MK + other.values_MK)

    def detach(self) -> HeadTotals:
        return HeadTotals(self.values_MK.detach())

    @property
    def loss_K(self) -> Tensor:
        return self.values_MK[0]

    @property
    def covered_K(self) -> Tensor:
        return self.values_MK[1]

    @property
    def labels_K(self) -> Tensor:
        return self.values_MK[2]

    @property
    def mean_loss_K(self) -> Tensor:
        return self.loss_K / self.covered_K.clamp_min(1)

    @property
    def coverage_K(self) -> Tensor:
        return self.covered_K / self.labels_K.clamp_min(1)

    @property
    def top1_accuracy_K(self) -> Tensor:
        return self.values_MK[3] / self.labels_K.clamp_min(1)

    @property
    def top5_accuracy_K(self) -> Tensor:
        return self.values_MK[4] / self.labels_K.clamp_min(1)


@dataclass(frozen=True, slots=True)
class Teacher:
    """The distribution that soft targets come from: the backbone's own, at every position of the batch."""

    hidden_Nd: Tensor
    weight_Vd: Tensor
    cap: Cap


def head_weights(num_heads: int, decay: float) -> list[float]:
    """Head k (0-based) weighs decay ** (k + 1)."""
    return [decay ** (k + 1) for k in range(num_heads)]


def head_targets(heads: DraftHeads, labels_NK: Tensor) -> Tensor:
    """Labels as columns of the heads' logits; IGNORE where there is no label or none inside the vocabulary."""
    if heads.config.vocabulary != "truncated":
        return labels_NK
    column_V = torch.full((heads.config.vocab_size,), IGNORE, device=labels_NK.device)
    column_V[heads.token_map] = torch.arange(len(heads.token_map), device=labels_NK.device)
    return column_V[labels_NK.clamp_min(0)].masked_fill(labels_NK == IGNORE, IGNORE)


def count_covered(heads: DraftHeads, labels_NK: Tensor, config: HeadsLossConfig = TOKENS) -> Tensor:
    """Labels that carry loss, [K]: the normaliser, known before any forward."""
    targets_NK = head_targets(heads, labels_NK) if config.kind == "tokens" else labels_NK
    return (targets_NK != IGNORE).sum(0)


def heads_loss(
    heads: DraftHeads,
    hidden_Nd: Tensor,
    labels_NK: Tensor,
    lm_head_weight: Tensor,
    cap: Cap,
    *,
    ahead_NKd: Tensor | None = None,
    teacher: Teacher | None = None,
    config: HeadsLossConfig = TOKENS,
    cross_entropy: CrossEntropy | None = None,
    chunk_size: int = 1024,
) -> HeadTotals:
    """Loss sums (with gradient) and hits of every head, in chunks of `chunk_size` rows. `cap` is Backbone.cap.

    `ahead_NKd` are the embeddings that heads with `sees_path` are given; `teacher` is needed by soft targets;
    `cross_entropy` replaces the chunked one.
    """
    targets_NK = head_targets(heads, labels_NK)
    teacher_rows = None if config.kind == "tokens" else _teacher_rows(heads, teacher, config)
    per_head = []
    for k in range(heads.config.num_heads):
        features_Nd = heads.features(k, hidden_Nd, ahead_NKd)
        weight_Vd = heads.vocabulary_weight(k, lm_head_weight)
        if teacher_rows is None:
            token_loss = cross_entropy or partial(chunked_cross_entropy, cap=cap, chunk_size=chunk_size)
            per_head.append(token_loss(features_Nd, weight_Vd, targets_NK[:, k]))
            continue
        # head k at position t learns what the backbone says at t + k + 1: positions of a reply stand side by side
        row_loss = TeacherLoss(
            teacher_rows.ahead(k + 1),
            counts_N=labels_NK[:, k] != IGNORE,
            targets_N=targets_NK[:, k],
            tokens_share=config.tokens_share,
        )
        sums = chunked(features_Nd, weight_Vd, row_loss, cap, num_sums=row_loss.num_sums, chunk_size=chunk_size)
        per_head.append(sums[:3])
    return _totals(per_head, count_covered(heads, labels_NK, config), labels_NK)


def heads_loss_eager(
    heads: DraftHeads,
    hidden_Nd: Tensor,
    labels_NK: Tensor,
    lm_head_weight: Tensor,
    cap: Cap,
    ahead_NKd: Tensor | None = None,
) -> HeadTotals:
    """The plain twin of `heads_loss` on tokens: all logits at once."""
    targets_NK = head_targets(heads, labels_NK)
    logits = [
        cap(widened(heads.features(k, hidden_Nd, ahead_NKd) @ heads.vocabulary_weight(k, lm_head_weight).T))
        for k in range(heads.config.num_heads)
    ]
    everything = slice(0, len(hidden_Nd))
    per_head = [TokenLoss(targets_NK[:, k])(x, everything) for k, x in enumerate(logits)]
    return _totals(per_head, count_covered(heads, labels_NK), labels_NK)


def chunked_cross_entropy(
    features_Nd: Tensor, weight_Vd: Tensor, targets_N: Tensor, *, cap: Cap, chunk_size: int
) -> Tensor:
    """Loss, top-1 hits and top-5 hits, [3]."""
    loss = TokenLoss(targets_N)
    return chunked(features_Nd, weight_Vd, loss, cap, num_sums=loss.num_sums, chunk_size=chunk_size)


LM_SUMS = ("loss", "top1", "top5", "overlap", "labels")


def lm_loss(
    hidden_Nd: Tensor,
    next_N: Tensor,
    lm_head_weight: Tensor,
    cap: Cap,
    teacher: Teacher | None,
    *,
    cross_entropy: CrossEntropy | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """LM_SUMS over the positions, [5] in float64: KL(teacher || model) with a teacher, else cross-entropy with the next
    token (whose overlap is 0: there is nothing to overlap with)."""
    if teacher is None:
        token_loss = cross_entropy or partial(chunked_cross_entropy, cap=cap, chunk_size=chunk_size)
        sums = token_loss(hidden_Nd, lm_head_weight, next_N)
        return torch.cat([sums, sums.new_zeros(1), sums.new_full((1,), len(next_N))])
    rows = TeacherRows(teacher.hidden_Nd, teacher.weight_Vd, teacher.cap)
    loss = TeacherLoss(rows.ahead(0), torch.ones_like(next_N, dtype=torch.bool), next_N)
    return chunked(hidden_Nd, lm_head_weight, loss, cap, num_sums=loss.num_sums, chunk_size=chunk_size)


def _teacher_rows(heads: DraftHeads, teacher: Teacher | None, config: HeadsLossConfig) -> TeacherRows:
    if teacher is None:
        raise ValueError(f"a loss of kind {config.kind!r} needs the teacher's hidden states, got none")
    return TeacherRows(
        teacher.hidden_Nd,
        teacher.weight_Vd,
        teacher.cap,
        columns=heads.token_map if heads.config.vocabulary == "truncated" else None,
        temperature=config.teacher_temperature,
        reach=heads.config.num_heads,
    )


def _totals(per_head: list[Tensor], covered_K: Tensor, labels_NK: Tensor) -> HeadTotals:
    sums_K3 = torch.stack(per_head).double()
    labels_K = (labels_NK != IGNORE).sum(0)
    loss_K, top1_K, top5_K = sums_K3.unbind(1)
    return HeadTotals(torch.stack([loss_K, covered_K.double(), labels_K.double(), top1_K, top5_K]))
