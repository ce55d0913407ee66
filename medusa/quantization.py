"""Weights of one byte: a decoder's linear layers rounded once, in place, their products still in the model's own dtype.

A row w of a weight (one output channel) becomes v, of one byte a value, and a float32 scale s; w is then about s * v:

    int8   s = max|w| / 127, v = w / s rounded to the nearest integer, ties to even  error <= s / 2
    fp8    s = max|w| / 448, v = w / s rounded to the nearest e4m3, ties to even     error <= max(|w| / 16, s / 1024)

both symmetric: zero stays zero. s is at least the smallest normal float32, which is what a row of zeros gets. All is
computed in float32; that adds a few units in its last place to the bounds. A product is (x @ v.T) * s, summed in
float32 and rounded once, to x's dtype. Only the weights are quantised: nothing is assumed of what the layers see.

Shapes: M rows of X, N output channels, K the reduced axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from medusa.kernels.linear import PackedLinear

Quantization = Literal["int8", "fp8"]
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
DTYPES: dict[Quantization, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FP8_CAPABILITY = (8, 9)  # Ada and Hopper convert e4m3 in hardware; an A100 (8.0) cannot


class QuantizationError(ValueError):
    """The model or the device does not take this quantisation; the message says what does."""


@dataclass(frozen=True)
class QuantizedWeight:
    """`values` [N, K] of one byte each, `scale` [N] in float32."""

    values: torch.Tensor
    scale: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    @classmethod
    def joined(cls, parts: list[QuantizedWeight]) -> QuantizedWeight:
        """The parts' output channels below each other."""
        dtype = parts[0].values.dtype
        rows = torch.cat([part.values.view(torch.int8) for part in parts])  # not every device joins float8
        return cls(rows.view(dtype), torch.cat([part.scale for part in parts]))


def quantize(weight: torch.Tensor, kind: Quantization) -> QuantizedWeight:
    """The weight [N, K] in `kind`, as the module's docstring says. Raises QuantizationError for NaN or infinity."""
    dtype = DTYPES[kind]
    whole = weight.detach().float()
    most = whole.abs().amax(1)
    if not torch.isfinite(most).all():
        raise QuantizationError(f"a weight {tuple(weight.shape)} holds NaN or infinite values, which have no scale")
    scale = (most / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = whole / scale[:, None]
    return QuantizedWeight((scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale)


def dequantize(weight: QuantizedWeight) -> torch.Tensor:
    """s * v in float32, [N, K]."""
    return weight.values.float() * weight.scale[:, None]


def error_bound(weight: torch.Tensor, kind: Quantization) -> torch.Tensor:
    """The most by which each value of `weight` can change, [N, K]; the error of float32 itself included."""
    whole = weight.detach().float().abs()
    scale = (whole.amax(1, keepdim=True) / LARGEST[DTYPES[kind]]).clamp_min(torch.finfo(torch.float32).tiny)
    half_step = scale / 2 if kind == "int8" else torch.maximum(whole / 16, scale / 1024)
    return half_step + 4 * torch.finfo(torch.float32).eps * whole


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


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(x @ v.T) * s + bias [..., N], in float32 and then x's dtype: the plain twin of the kernels."""
    out = functional.linear(x.float(), weight.values.float()) * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


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


def check_device(kind: Quantization, device: torch.device) -> None:
    """Raises QuantizationError for an unknown kind, or one that the device cannot compute with."""
    if kind not in get_args(Quantization):
        raise QuantizationError(f"quantization is one of {list(get_args(Quantization))} or none, got {kind!r}")
    if kind == "fp8" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8_CAPABILITY:
            raise QuantizationError(
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, and fp8 "
                f"(e4m3) needs {FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]} or later; use int8, which takes as many bytes"
            )


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
