"""Queries and keys are rotated (and normalised) as transformers does it, keys and values written where they belong."""

from __future__ import annotations

import pytest
import torch

from medusa.kernels.rope import rope_write

PAGE_SIZE, NAN = 4, float("nan")


def rotated(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * torch.cat([cos, cos], -1)[:, None] + turned * torch.cat([sin, sin], -1)[:, None]


def normalised(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 16), (9, 3, 24), (1, 1, 8)])
def test_rotates_normalises_and_writes(heads, groups, size, rotates, norms):
    generator = torch.Generator().manual_seed(size)
    qkv = torch.randn(6, heads + 2 * groups, size, generator=generator)
    before, cache = qkv.clone(), torch.full((2, 9, PAGE_SIZE, groups, size), NAN)
    tables = torch.tensor([[3, 1, 8], [0, 0, 0], [2, 7, 5]], dtype=torch.int32)
    length, position = torch.tensor([2, 0, 7]), torch.tensor([2, 3, 3, 7, 8, 0])
    row = torch.tensor([0, 0, 0, 2, 2, 1], dtype=torch.int32)
    node = torch.tensor([0, 1, 2, 0, 1, 0], dtype=torch.int32)
    angle = torch.arange(20)[:, None] / 100 ** torch.linspace(0, 1, size // 2)
    weights = torch.rand(2, size, generator=generator) + 0.5
    eps = 1e-6
    rope_write(
        qkv, cache, tables, length, row, node,
        *((position, angle.cos(), angle.sin()) if rotates else (None, None, None)),
        (weights[0], weights[1], eps) if norms else None,
    )  # fmt: skip
    query, key, value = before.split([heads, groups, groups], 1)
    if norms:
        query, key = normalised(query, weights[0], eps), normalised(key, weights[1], eps)
    if rotates:
        cos, sin = angle.cos()[position], angle.sin()[position]
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
    torch.testing.assert_close(qkv[:, :heads], query, atol=1e-5, rtol=1e-5)
    written = torch.zeros(9, PAGE_SIZE, dtype=torch.bool)
    for m in range(6):
        slot = int(length[row[m]] + node[m])
        page, offset = int(tables[row[m], slot // PAGE_SIZE]), slot % PAGE_SIZE
        torch.testing.assert_close(cache[0, page, offset], key[m], atol=1e-5, rtol=1e-5)
        assert torch.equal(cache[1, page, offset], value[m])
        written[page, offset] = True
    assert cache[:, ~written].isnan().all()
