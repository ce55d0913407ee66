"""What a step minimises, as modules over everything that learns: DistributedDataParallel or FSDP can wrap them.

`HeadsObjective` is Medusa-1 (the backbone frozen, its hidden states given), `JointObjective` Medusa-2. Both take a
batch and give sums, which the trainer divides by global counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from medusa.heads import DraftHeads
from medusa.hydra import embed_path
from medusa.model import Backbone
from medusa.training.adaptation import Adaptation
from medusa.training.batch import Batch
from medusa.training.hidden import ComputedHidden
from medusa.training.loss import LM_SUMS, CrossEntropy, Teacher, heads_loss, lm_loss
from medusa.training.schedule import TrainerConfig


class Sums(NamedTuple):
    """HeadTotals.values_MK, and LM_SUMS of the language model's term (zeros where there is none)."""

    heads_MK: Tensor
    lm_L: Tensor


class HeadsObjective(nn.Module):
    """The heads' loss on hidden states that carry no gradient. The frozen backbone is no part of the module."""

    def __init__(
        self,
        backbone: Backbone,
        heads: DraftHeads,
        config: TrainerConfig,
        cross_entropy: CrossEntropy | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self._frozen = (backbone,)  # a tuple hides the model from nn.Module
        self._config = config
        self._cross_entropy = cross_entropy
        self._compute = ComputedHidden(backbone)

    def forward(self, batch: Batch, heads_only: bool = True) -> Sums:
        (backbone,) = self._frozen
        weight_Vd = backbone.lm_head_weight.detach()
        hidden_Nd = compute_type(backbone, batch.hidden_Nd if batch.hidden_Nd is not None else self._compute(batch))
        sums_MK = _heads_sums(self.heads, backbone, batch, hidden_Nd, weight_Vd, self._config, self._cross_entropy)
        return Sums(sums_MK, sums_MK.new_zeros(len(LM_SUMS)))


class JointObjective(nn.Module):
    """The language model's term and the heads' on one forward, whose hidden states carry both gradients.

    With `heads_only` (the first of two stages) the backbone is the base and carries none.
    """

    def __init__(
        self,
        adaptation: Adaptation,
        heads: DraftHeads,
        config: TrainerConfig,
        cross_entropy: CrossEntropy | None = None,
    ) -> None:
        super().__init__()
        if config.joint is None:
            raise ValueError("a joint objective needs a joint configuration")
        self.heads = heads
        self.model = adaptation.backbone.model
        self.base = adaptation.base  # sharded with the student, where that is
        self._adaptation = adaptation
        self._config = config
        self._distils = config.joint.lm_loss == "distill"
        self._cross_entropy = cross_entropy

    def forward(self, batch: Batch, heads_only: bool = False) -> Sums:
        backbone = self._adaptation.backbone
        base = self._adaptation.teacher(batch) if heads_only or self._distils else None
        hidden_Nd, weight_Vd = base if heads_only and base is not None else self._adaptation.student(batch)
        hidden_Nd = compute_type(backbone, hidden_Nd)
        sums_MK = _heads_sums(self.heads, backbone, batch, hidden_Nd, weight_Vd, self._config, self._cross_entropy)
        if heads_only:
            return Sums(sums_MK, sums_MK.new_zeros(len(LM_SUMS)))
        teacher = Teacher(compute_type(backbone, base[0]), base[1], backbone.cap) if base is not None else None
        lm_L = lm_loss(
            hidden_Nd,
            batch.next_N,
            weight_Vd,
            backbone.cap,
            teacher,
            cross_entropy=self._cross_entropy,
            chunk_size=self._config.chunk_size,
        )
        return Sums(sums_MK, lm_L)


def compute_type(backbone: Backbone, hidden_Nd: Tensor) -> Tensor:
    """Half-precision models are trained in bfloat16 under autocast."""
    half = torch.is_autocast_enabled(hidden_Nd.device.type) or backbone.dtype.itemsize == 2
    return hidden_Nd.to(torch.bfloat16) if half else hidden_Nd


def _heads_sums(
    heads: DraftHeads,
    backbone: Backbone,
    batch: Batch,
    hidden_Nd: Tensor,
    weight_Vd: Tensor,
    config: TrainerConfig,
    cross_entropy: CrossEntropy | None,
) -> Tensor:
    soft = config.heads_loss.kind != "tokens"
    return heads_loss(
        heads,
        hidden_Nd,
        batch.labels_NK,
        weight_Vd,
        backbone.cap,
        ahead_NKd=embed_path(backbone.embed, batch.ahead_NK) if heads.sees_path else None,
        teacher=Teacher(hidden_Nd.detach(), weight_Vd.detach(), backbone.cap) if soft else None,
        config=config.heads_loss,
        cross_entropy=cross_entropy,
        chunk_size=config.chunk_size,
    ).values_MK
