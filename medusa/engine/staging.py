"""Values on their way from the host to the device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch


def staged(values: Items[int] | Items[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values on the device, by way of pinned memory: a copy from pageable memory would wait for all launches ahead.
    The copy is ordered before whatever is launched next."""
    return uploaded(torch.tensor(values, dtype=dtype), device)


def uploaded(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same for a tensor of the host."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
