"""liger-kernel's fused linear cross-entropy, where a GPU and the package are there: the same sums as the chunked one.

It computes logits, loss and their gradient in one Triton kernel a chunk, in the logits' own type. It does not rank the
label: top-5 hits are not counted (the record shows 0 for them).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from medusa.model import Backbone
from medusa.training.batch import IGNORE
from medusa.training.loss import CrossEntropy


def choose_cross_entropy(
    name: Literal["auto", "chunked", "liger"], backbone: Backbone, device: torch.device
) -> CrossEntropy | None:
    """liger's cross-entropy for losses on `device`, or None for the project's own. ImportError where liger was asked
    for and is missing."""
    installed = find_spec("liger_kernel") is not None
    if name == "chunked" or (name == "auto" and not (installed and device.type == "cuda")):
        return None
    if not installed:
        raise ImportError("cross_entropy liger needs liger-kernel: pip install 'medusa-on-ray[fused]', or use chunked")
    return LigerCrossEntropy(backbone.config)


class LigerCrossEntropy:
    """(features, weight, targets) -> loss, top-1 hits and, not counted, 0."""

    def __init__(self, config: Any) -> None:
        scale = getattr(config, "logit_scale", None) or 1.0
        self._scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
        self._softcap = getattr(config, "final_logit_softcapping", None)

    def __call__(self, features_Nd: Tensor, weight_Vd: Tensor, targets_N: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        counted = (targets_N != IGNORE).sum()
        if len(targets_N) == 0:
            return features_Nd.sum().double() * torch.zeros(3, dtype=torch.float64, device=features_Nd.device)
        output = liger_fused_linear_cross_entropy(
            features_Nd * self._scale,
            weight_Vd.to(features_Nd.dtype),
            targets_N,
            ignore_index=IGNORE,
            reduction="sum",
            softcap=self._softcap,
            accum_dtype=torch.float32,
            return_token_accuracy=True,
        )
        top1 = (output.token_accuracy.double() * counted).round()  # a mean of hits, in float32
        return torch.stack([output.loss.double(), top1, torch.zeros_like(top1)])
