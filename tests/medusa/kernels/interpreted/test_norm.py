"""Adding partial sums to the residual stream and normalising equals the plain formula."""

from __future__ import annotations

import pytest
import torch

from medusa.kernels.norm import add_norm, add_norm_reference

EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 96), (3, 33)])
@pytest.mark.parametrize("splits", [None, 1, 3, 4])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(rows, size, splits, has_bias, dtype):
    generator = torch.Generator().manual_seed(size)
    residual = torch.randn(rows, size, generator=generator).to(dtype)
    weight = torch.rand(size, generator=generator).to(dtype)
    partial = None if splits is None else torch.randn(splits, rows, size, generator=generator)
    bias = torch.randn(size, generator=generator).to(dtype) if has_bias and splits else None
    new_residual, normed = add_norm_reference(partial, residual, weight, EPS, bias)
    out = torch.full_like(residual, float("nan"))
    add_norm(partial, residual, weight, EPS, out, bias)
    precision = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.02, rtol=0.02)
    torch.testing.assert_close(residual, new_residual, **precision)
    torch.testing.assert_close(out, normed, **precision)
