"""The heads' loss: weighted cross-entropy of each head with its own shifted label (paper, section 2.2.1).

Logits are the large thing: K heads of [N, V]. They exist for one head and one chunk of rows at a time, in which
loss, hits and gradients are all taken, so that nothing of size V outlives its chunk. `heads_loss_eager` is the same
in plain torch, kept as the oracle.

Axes: N positions that carry a label, K heads, d hidden size, V the vocabulary of a head, M measures (HeadTotals).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from medusa.heads import MedusaHeads
from medusa.training.batch import IGNORE

Cap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HeadTotals:
    """Sums over labels, each [K]: add them over micro-batches and workers, divide at the end.

    `labels` counts all labels, `covered` those inside the head's vocabulary. Loss is summed over covered labels;
    hits are out of all labels, so that a label outside a truncated vocabulary is a miss.
    """

    values_MK: Tensor

    @classmethod
    def stack(cls, loss_K: Tensor, covered_K: Tensor, labels_K: Tensor, top1_K: Tensor, top5_K: Tensor) -> HeadTotals:
        return cls(torch.stack([t.double() for t in (loss_K, covered_K, labels_K, top1_K, top5_K)]))

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


def head_weights(num_heads: int, decay: float) -> list[float]:
    """Head k (0-based) weighs decay ** (k + 1)."""
    return [decay ** (k + 1) for k in range(num_heads)]


def head_targets(heads: MedusaHeads, labels_NK: Tensor) -> Tensor:
    """Labels as columns of the heads' logits; IGNORE where there is no label or none inside the vocabulary."""
    if heads.config.vocabulary != "truncated":
        return labels_NK
    column_V = torch.full((heads.config.vocab_size,), IGNORE, device=labels_NK.device)
    column_V[heads.token_map] = torch.arange(len(heads.token_map), device=labels_NK.device)
    return column_V[labels_NK.clamp_min(0)].masked_fill(labels_NK == IGNORE, IGNORE)


def count_covered(heads: MedusaHeads, labels_NK: Tensor) -> Tensor:
    """Labels that each head can be right about, [K]: the normaliser, known before any forward."""
    return (head_targets(heads, labels_NK) != IGNORE).sum(0)


def heads_loss(
    heads: MedusaHeads,
    hidden_Nd: Tensor,
    labels_NK: Tensor,
    lm_head_weight: Tensor,
    cap: Cap,
    *,
    chunk_size: int = 1024,
) -> HeadTotals:
    """Loss sums (with gradient) and hits of every head, in chunks of `chunk_size` rows. `cap` is Backbone.cap."""
    targets_NK = head_targets(heads, labels_NK)
    per_head = (
        _ChunkedCrossEntropy.apply(
            heads.features(k, hidden_Nd),
            heads.vocabulary_weight(k, lm_head_weight),
            targets_NK[:, k],
            cap,
            chunk_size,
            torch.is_grad_enabled(),
        )
        for k in range(heads.config.num_heads)
    )
    return _totals(per_head, targets_NK, labels_NK)


def heads_loss_eager(
    heads: MedusaHeads, hidden_Nd: Tensor, labels_NK: Tensor, lm_head_weight: Tensor, cap: Cap
) -> HeadTotals:
    """The plain twin of `heads_loss`: all logits at once."""
    targets_NK = head_targets(heads, labels_NK)
    raw_logits = heads.logits(hidden_Nd, lm_head_weight)
    per_head = (_loss_and_hits(cap(_widened(raw)), targets_NK[:, k]) for k, raw in enumerate(raw_logits))
    return _totals(per_head, targets_NK, labels_NK)


class HeadsLoss(nn.Module):
    """`heads_loss` as a module over the heads' parameters, so that DistributedDataParallel can wrap it.

    The frozen LM head is no parameter of it. Forward gives `HeadTotals.values_MK`.
    """

    def __init__(self, heads: MedusaHeads, lm_head_weight: Tensor, cap: Cap, chunk_size: int) -> None:
        super().__init__()
        self.heads = heads
        self._frozen = (lm_head_weight.detach(), cap)  # a tuple hides the tensor from nn.Module
        self._chunk_size = chunk_size

    def forward(self, hidden_Nd: Tensor, labels_NK: Tensor) -> Tensor:
        lm_head_weight, cap = self._frozen
        return heads_loss(self.heads, hidden_Nd, labels_NK, lm_head_weight, cap, chunk_size=self._chunk_size).values_MK


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(features [N, d], weight [V, d], targets [N]) -> summed cross-entropy, top-1 hits, top-5 hits.

    Gradients are taken in the forward, chunk by chunk, while the logits exist: no second matrix product in the
    backward, at the price of holding one gradient of each input until then.
    """

    @staticmethod
    def forward(
        ctx: Any, features_Nd: Tensor, weight_Vd: Tensor, targets_N: Tensor, cap: Cap, chunk_size: int, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute_weight_Vd = weight_Vd.to(features_Nd.dtype)
        grad_features_Nd = torch.empty_like(features_Nd) if grad and ctx.needs_input_grad[0] else None
        grad_weight_Vd = torch.zeros_like(weight_Vd) if grad and ctx.needs_input_grad[1] else None
        sums = [torch.zeros((), dtype=torch.float64, device=features_Nd.device) for _ in range(3)]
        for start in range(0, len(features_Nd), chunk_size):
            rows = slice(start, start + chunk_size)
            raw = _widened(features_Nd[rows] @ compute_weight_Vd.T).requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                loss_and_hits = _loss_and_hits(cap(raw), targets_N[rows])
            sums = [total + part.detach() for total, part in zip(sums, loss_and_hits, strict=True)]
            if not grad:
                continue
            grad_raw = torch.autograd.grad(loss_and_hits[0], raw)[0].to(features_Nd.dtype)
            if grad_features_Nd is not None:
                grad_features_Nd[rows] = grad_raw @ compute_weight_Vd
            if grad_weight_Vd is not None:
                grad_weight_Vd += grad_raw.T @ features_Nd[rows]
        ctx.save_for_backward(grad_features_Nd, grad_weight_Vd)
        ctx.mark_non_differentiable(*sums[1:])
        return sums[0], sums[1], sums[2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors)
        return *gradients, None, None, None, None


def _widened(raw_logits: Tensor) -> Tensor:
    """Softmax over a large vocabulary needs float32 at least."""
    return raw_logits.to(torch.promote_types(raw_logits.dtype, torch.float32))


def _loss_and_hits(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum").double()
    with torch.no_grad():
        at_target_N1 = logits_NV.gather(1, targets_N.clamp_min(0)[:, None])
        better_N = (logits_NV > at_target_N1).sum(1).masked_fill(targets_N == IGNORE, logits_NV.shape[1])
        top5_limit = min(5, logits_NV.shape[1])
        return loss, (better_N < 1).sum().double(), (better_N < top5_limit).sum().double()


def _totals(per_head: Iterable[tuple[Tensor, Tensor, Tensor]], targets_NK: Tensor, labels_NK: Tensor) -> HeadTotals:
    loss, top1, top5 = zip(*per_head, strict=True)
    covered_K, labels_K = ((ids != IGNORE).sum(0) for ids in (targets_NK, labels_NK))
    return HeadTotals.stack(torch.stack(loss), covered_K, labels_K, torch.stack(top1), torch.stack(top5))
