"""SiLU(gate) * up equals torch's, at sizes that a block does not divide."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medusa.kernels.gate import silu_mul


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (5, 1030), (3, 100)])
def test_equals_torch(rows, size):
    both = 3 * torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size))
    out = silu_mul(both, torch.full((rows, size), float("nan")))
    torch.testing.assert_close(out, functional.silu(both[:, :size]) * both[:, size:], atol=1e-5, rtol=1e-5)
