"""Values on their way from the host to the device, without waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch


def staged(values: Items[int] | Items[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The values on the device, by way of pinned memory: a copy from pageable memory would wait for all launches ahead.
    The copy is ordered before whatever is launched next."""
    host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
