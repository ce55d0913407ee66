"""Which pages attention by a ring can read; its plans are in interpreted/test_attention.py."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from medusa.kernels import ring_attention as module
from medusa.kernels.ring_attention import has_ring


def pages(page_size: int = 64, head_size: int = 128, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[L, 2, P, page size, G, D], as an engine's cache."""
    return torch.zeros(1, 2, 3, page_size, 2, head_size, dtype=dtype)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(module, "has_warpgroups", lambda _: True)
    monkeypatch.setattr(module, "has_compiler", lambda: True)


def test_a_cpu_has_no_ring(monkeypatch):
    monkeypatch.setattr(module, "has_compiler", lambda: pytest.fail("no compiler is looked for where none is of use"))
    assert not has_ring(pages())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [64, 128, 192])
def test_whole_tiles_of_heads_of_128_in_16_bits_are_read(page_size, dtype, hopper):
    found = pages(page_size, dtype=dtype)
    assert has_ring(found) and has_ring(found[0])  # all layers' or one's


@pytest.mark.parametrize(
    "other",
    [
        {"head_size": 64}, {"head_size": 96}, {"head_size": 256},
        {"page_size": 16}, {"page_size": 32}, {"page_size": 96},
        {"dtype": torch.float32}, {"dtype": torch.float8_e4m3fn},
    ],
    ids=str,
)  # fmt: skip
def test_other_pages_are_not(other, hopper):
    assert not has_ring(pages(**other)) and not has_ring(pages(**other)[0])


def test_nor_are_any_without_a_compiler(hopper, monkeypatch):
    monkeypatch.setattr(module, "has_compiler", lambda: False)
    assert not has_ring(pages())
