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
from torch.nn import functional

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


def linear(x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(x @ v.T) * s + bias [..., N], in float32 and then x's dtype: the plain twin of the kernels."""
    out = functional.linear(x.float(), weight.values.float()) * weight.scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


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
