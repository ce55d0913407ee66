"""Products with frozen weights on a CPU: the weight laid out once for oneDNN's kernels, besides torch's own copy.

torch multiplies in float32 by MKL, which reads the weight once for one row but takes two to four times as long for a
few rows. oneDNN takes about as long for 8 rows as for one, so a tree's nodes cost little more than plain decoding's
single row; and its rows do not depend on how many others there are, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

MIN_WORK = 300_000  # multiply-adds from which the product repays oneDNN's longer way to the kernel (about 10 us)
MAX_BYTES = 4 * 2**30  # weights of a module beyond which no second copy of them is made
_ROWS = 16  # what the layout is chosen for; it serves any number of rows


@dataclass(frozen=True)
class PackedWeight:
    """A weight in oneDNN's layout, and the version of the weight that it was made from."""

    layout: torch.Tensor
    version: int

    @classmethod
    def of(cls, weight: torch.Tensor) -> PackedWeight:
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS), weight._version)


class PackedLinear(nn.Linear):
    """What `pack` makes of a linear layer, in place: same parameters, same state dict."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """torch's `functional.linear`, by the packed weight where `pack` made one and no gradient is asked for."""
    packed: PackedWeight | None = getattr(weight, "packed", None)
    if packed is None or torch.is_grad_enabled() or x.numel() * weight.shape[0] < MIN_WORK:
        return functional.linear(x, weight, bias)
    if packed.version != weight._version:  # new weights were copied in
        packed = weight.packed = PackedWeight.of(weight)  # type: ignore[attr-defined]
    return torch.ops.mkldnn._linear_pointwise(x, packed.layout, bias, "none", [], "")


def pack(module: nn.Module) -> None:
    """Packs the linear layers of a frozen module; does nothing where oneDNN, float32 or the CPU are missing."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and _can_pack(layer)]
    if sum(layer.weight.nbytes for layer in layers) > MAX_BYTES:
        return
    for layer in layers:
        layer.__class__ = PackedLinear
        if not hasattr(layer.weight, "packed"):
            layer.weight.packed = PackedWeight.of(layer.weight)  # type: ignore[attr-defined]


def _can_pack(layer: nn.Linear) -> bool:
    weight = layer.weight
    return (
        type(layer) in (nn.Linear, PackedLinear)  # another subclass may compute otherwise
        and "forward" not in layer.__dict__  # a share of tensor parallelism, which computes by its plan
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not weight.is_inference()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
