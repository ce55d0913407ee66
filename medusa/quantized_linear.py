"""Linear layers of quantised weights, and a decoder whose linear layers are all replaced by them.

By a module in the layer's place every way of running the model is served: transformers' own forward (the reference
runner, scores of given texts), families that are not fused, and the fused decoder, which reads the modules' bytes.
"""

from __future__ import annotations

import torch
from torch import nn

from medusa.kernels.linear import PackedLinear
from medusa.quantization import Quantization, QuantizationError, QuantizedWeight, check_device, linear, quantize


class QuantizedLinear(nn.Module):
    """A linear layer whose weight takes one byte a value; on a GPU by this project's kernels, which read those bytes,
    elsewhere by torch, which makes a float32 copy of one layer at a time."""

    values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("values", weight.values)
        self.register_buffer("scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.values, self.scale)

    @quantized.setter
    def quantized(self, weight: QuantizedWeight) -> None:
        self.values, self.scale = weight.values, weight.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cuda":
            return linear(x, self.quantized, self.bias)
        from medusa.kernels.matmul import product  # Triton is not installed everywhere

        rows = x.reshape(-1, self.in_features).contiguous()
        out = x.new_empty(len(rows), self.out_features)
        return product(rows, self.quantized, out, self.bias).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.values.dtype}, bias={self.bias is not None}"


def quantize_linears(decoder: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Replaces every linear layer below `decoder` by a QuantizedLinear on `device`, one after the other, each dropping
    the weight that it was made from. Embeddings and norms stay as they are.

    Raises QuantizationError, before anything is changed, for a device without the format, and for a model that keeps
    matrices elsewhere than in linear layers, which would stay whole without a word (experts, GPT-2).
    """
    check_device(kind, device)
    linears = [(name, module) for name, module in decoder.named_modules() if type(module) in (nn.Linear, PackedLinear)]
    _check_covered(decoder, {f"{name}.weight" for name, _ in linears})
    while linears:  # a list entry would keep the weight
        name, layer = linears.pop()
        parent, _, own_name = name.rpartition(".")
        bias = None if layer.bias is None else layer.bias.to(device)
        replacement = QuantizedLinear(quantize(layer.weight.to(device), kind), bias)
        setattr(decoder.get_submodule(parent), own_name, replacement.train(layer.training))
        del layer
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of float32 copies; the KV cache is sized from what is free


def _check_covered(decoder: nn.Module, covered: set[str]) -> None:
    embeddings = {f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, nn.Embedding)}
    others = [
        name
        for name, parameter in decoder.named_parameters()
        if parameter.dim() > 1 and name not in covered | embeddings
    ]
    if others or not covered:
        kept = f"keeps {len(others)} matrices such as {others[0]} outside" if others else "has no"
        raise QuantizationError(f"{type(decoder).__name__} {kept} linear layers to quantise; serve it without")
