"""Checks of the tensors that kernels are launched on: an error by name instead of a wild read on the GPU."""

from __future__ import annotations

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check(name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Raises ValueError unless `tensor` is contiguous, of `dtype` and `shape` (None: any size)."""
    fits = len(shape) == tensor.ndim and all(want in (None, got) for want, got in zip(shape, tensor.shape, strict=True))
    if tensor.dtype != dtype or not fits or not tensor.is_contiguous():
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        kind = "contiguous" if tensor.is_contiguous() else "strided"
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape ({wanted}), "
            f"got a {kind} {tensor.dtype} one of shape {tuple(tensor.shape)}"
        )


def check_logits(name: str, logits: torch.Tensor, dims: int) -> None:
    """Raises ValueError unless `logits` are floats of `dims` axes whose last is contiguous."""
    if logits.dtype not in FLOATS or logits.ndim != dims or logits.stride(-1) != 1:
        raise ValueError(
            f"{name} must be bfloat16, float16 or float32 with {dims} axes, the last contiguous, got {logits.dtype} "
            f"of shape {tuple(logits.shape)}, strides {logits.stride()}"
        )
