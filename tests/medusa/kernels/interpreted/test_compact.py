"""Accepted nodes' keys and values end up next to the committed ones; nothing else moves."""

from __future__ import annotations

import random

import pytest
import torch

from medusa.kernels.compact import compact, compact_reference
from medusa.kernels.state import Emitted

CPU = torch.device("cpu")


def rising_path(rng, num, room):
    """A path of `num` nodes from the root on: rising, so path[d] >= d."""
    return [0, *sorted(rng.sample(range(1, room), num - 1))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "head_size", "page_size"), [(2, 8, 16), (3, 20, 4), (8, 128, 64)])
def test_cache_equals_the_reference(dtype, heads, head_size, page_size):
    for seed in range(4):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch, depths, num_rows, layers = 5, rng.choice([2, 5, 9]), 7, 2
        pages = 200 // page_size + 1
        tables = torch.randperm(num_rows * pages, generator=generator).view(num_rows, pages).int()
        cache = torch.randn(layers, 2, num_rows * pages, page_size, heads, head_size, generator=generator).to(dtype)
        emitted = Emitted.empty(batch, depths, CPU)
        emitted.path_BD.fill_(-1)
        rows = torch.tensor([*rng.sample(range(num_rows - 1), batch - 1), num_rows - 1], dtype=torch.int32)
        length = torch.zeros(num_rows, dtype=torch.int64)
        for b in range(batch - 1):
            num = rng.choice([1, 2, depths, depths]) if b else 0
            emitted.num_B[b] = num
            emitted.path_BD[b, :num] = torch.tensor(rising_path(rng, num, rng.choice([depths, 64])) if num else [])
            length[rows[b]] = rng.randrange(0, 130) + num
        expected = compact_reference(cache, tables, rows, emitted, length)
        compact(cache, tables, rows, emitted, length)
        assert torch.equal(cache, expected)


def test_overlapping_moves_read_before_they_write():
    """Node 2 goes to 1, node 3 to 2, node 4 to 3: each source is the next move's target."""
    cache = torch.arange(8.0).view(1, 1, 1, 8, 1, 1).repeat(1, 2, 1, 1, 1, 4).contiguous()
    emitted = Emitted.empty(1, 4, CPU)
    emitted.path_BD[0], emitted.num_B[0] = torch.tensor([0, 2, 3, 4]), 4
    row, length = torch.zeros(1, dtype=torch.int32), torch.tensor([5])
    compact(cache, torch.zeros(1, 1, dtype=torch.int32), row, emitted, length)
    assert cache[0, 1, 0, :, 0, 0].tolist() == [0, 1, 3, 4, 5, 5, 6, 7]


def test_a_strided_cache_is_refused():
    cache = torch.zeros(1, 2, 2, 4, 2, 8).transpose(3, 4)
    emitted, table = Emitted.empty(1, 2, CPU), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="contiguous"):
        compact(cache, table, torch.zeros(1, dtype=torch.int32), emitted, torch.zeros(1, dtype=torch.int64))
