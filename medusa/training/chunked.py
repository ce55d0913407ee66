"""Losses over a vocabulary whose logits exist for one chunk of rows at a time.

Logits are the large thing: K heads of [N, V]. Loss, hits and gradients of a chunk are all taken while its logits
exist, so nothing of size N x V is ever held. The gradient of the logits is taken in the forward: the backward then
needs no second product with the vocabulary matrix, and holds one gradient of each input until it comes.

Axes: N rows, V the vocabulary of a head, d hidden size, M sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from medusa.training.batch import IGNORE

Cap = Callable[[Tensor], Tensor]
RowLoss = Callable[[Tensor, slice], Tensor]  # capped logits of some rows, which rows -> their sums [M], the loss first


def chunked(
    features_Nd: Tensor, weight_Vd: Tensor, row_loss: RowLoss, cap: Cap, *, num_sums: int, chunk_size: int
) -> Tensor:
    """The sums of `row_loss` over all rows of `cap(features @ weight.T)`, [M] in float64; the first has gradient."""
    sums_M: Tensor = _Chunked.apply(
        features_Nd, weight_Vd, row_loss, cap, num_sums, chunk_size, torch.is_grad_enabled()
    )
    return sums_M


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features_Nd: Tensor,
        weight_Vd: Tensor,
        row_loss: RowLoss,
        cap: Cap,
        num_sums: int,
        chunk_size: int,
        grad: bool,
    ) -> Tensor:
        compute_weight_Vd = weight_Vd.to(features_Nd.dtype)
        grad_features_Nd = torch.empty_like(features_Nd) if grad and ctx.needs_input_grad[0] else None
        grad_weight_Vd = torch.zeros_like(weight_Vd) if grad and ctx.needs_input_grad[1] else None
        learns = grad_features_Nd is not None or grad_weight_Vd is not None
        sums_M = torch.zeros(num_sums, dtype=torch.float64, device=features_Nd.device)
        for start in range(0, len(features_Nd), chunk_size):
            rows = slice(start, start + chunk_size)
            raw = widened(features_Nd[rows] @ compute_weight_Vd.T).requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                part_M = row_loss(cap(raw), rows)
                loss = part_M[0]
            sums_M += part_M.detach()
            if not learns:
                continue
            grad_raw = torch.autograd.grad(loss, raw)[0].to(features_Nd.dtype)
            if grad_features_Nd is not None:
                grad_features_Nd[rows] = grad_raw @ compute_weight_Vd
            if grad_weight_Vd is not None:
                grad_weight_Vd += grad_raw.T @ features_Nd[rows]
        ctx.save_for_backward(grad_features_Nd, grad_weight_Vd)
        return sums_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * grad_M[0].to(g.dtype) for g in ctx.saved_tensors)
        return *gradients, None, None, None, None, None


def widened(raw_logits: Tensor) -> Tensor:
    """Softmax over a large vocabulary needs float32 at least."""
    return raw_logits.to(torch.promote_types(raw_logits.dtype, torch.float32))


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy with a target column a row (IGNORE: none). Sums: loss, top-1 hits, top-5 hits."""

    targets_N: Tensor
    num_sums = 3

    def __call__(self, logits_NV: Tensor, rows: slice) -> Tensor:
        targets_N = self.targets_N[rows]
        loss = cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum").double()
        return torch.stack([loss, *hits(logits_NV, targets_N)])


@dataclass(frozen=True)
class TeacherLoss:
    """KL(teacher || student), the teacher's logits too existing for a chunk only. `teacher` gives the
    log-probabilities of some rows in the student's columns. Sums: loss, top-1 and top-5 hits
    of the targets, overlap of the two distributions (what a draft drawn from the one is accepted with by the other),
    rows that count.

    `tokens_share` of cross-entropy with the target is mixed in. Rows count where they have a target.
    """

    teacher: Callable[[slice], Tensor]
    counts_N: Tensor
    targets_N: Tensor
    tokens_share: float = 0.0
    num_sums = 5

    def __call__(self, logits_NV: Tensor, rows: slice) -> Tensor:
        targets_N, counts_N = self.targets_N[rows], self.counts_N[rows].double()
        log_q_NV = logits_NV.log_softmax(-1)
        with torch.no_grad():
            log_p_NV = self.teacher(rows)
            p_NV = log_p_NV.exp()
            overlap_N = torch.minimum(p_NV, log_q_NV.exp()).sum(-1)
        loss_N = (p_NV * (log_p_NV - log_q_NV)).sum(-1)
        if self.tokens_share:
            token_N = cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="none")
            loss_N = (1 - self.tokens_share) * loss_N + self.tokens_share * token_N
        loss = (loss_N.double() * counts_N).sum()
        overlap = (overlap_N.double() * counts_N).sum()
        return torch.stack([loss, *hits(logits_NV, targets_N), overlap, counts_N.sum()])


class TeacherRows:
    """A teacher's log-probabilities by row, [N, V], or in some `columns` of its vocabulary: what it holds outside them
    counts as missed.

    Heads look ahead by different distances into the same rows. So a chunk is computed with the `reach` rows after it
    and kept until another is asked for: where one chunk holds a batch, all heads share it.
    """

    def __init__(
        self,
        hidden_Nd: Tensor,
        weight_Vd: Tensor,
        cap: Cap,
        *,
        columns: Tensor | None = None,
        temperature: float = 1.0,
        reach: int = 0,
    ) -> None:
        self._hidden_Nd, self._weight_Vd, self._cap = hidden_Nd, weight_Vd, cap
        self._columns, self._temperature, self._reach = columns, temperature, reach
        self._kept: tuple[slice, Tensor] | None = None

    def ahead(self, distance: int) -> Callable[[slice], Tensor]:
        """The rows so far behind those asked for, at most `reach`; the last row, past the end."""
        return lambda rows: self._rows(rows, distance)

    @torch.no_grad()
    def _rows(self, rows: slice, distance: int) -> Tensor:
        if self._kept is None or self._kept[0] != rows:
            self._kept = None  # before the next is made: two would be held otherwise
            self._kept = rows, self._log_probs(rows)
        count = min(rows.stop, len(self._hidden_Nd)) - rows.start
        return self._kept[1][distance : distance + count]

    def _log_probs(self, rows: slice) -> Tensor:
        """Of the rows and `reach` after them: past the end, the last row stands in."""
        last = len(self._hidden_Nd) - 1
        source_N = torch.arange(rows.start, min(rows.stop, last + 1) + self._reach, device=self._hidden_Nd.device)
        hidden_Nd = self._hidden_Nd[source_N.clamp_max(last)]
        logits_NV = self._cap(widened(hidden_Nd @ self._weight_Vd.to(hidden_Nd.dtype).T))
        log_p_NV = (logits_NV if self._temperature == 1 else logits_NV / self._temperature).log_softmax(-1)
        # a masked-out token of the teacher has a finite logarithm, so that it costs nothing: 0 times that
        return (log_p_NV if self._columns is None else log_p_NV[:, self._columns]).clamp_min_(-1e4)


@torch.no_grad()
def hits(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """How many targets are the row's best logit, and among its five best."""
    at_target_N1 = logits_NV.gather(1, targets_N.clamp_min(0)[:, None])
    better_N = (logits_NV > at_target_N1).sum(1).masked_fill(targets_N == IGNORE, logits_NV.shape[1])
    top5_limit = min(5, logits_NV.shape[1])
    return (better_N < 1).sum().double(), (better_N < top5_limit).sum().double()
