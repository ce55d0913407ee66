"""The cache's size: as asked, else for full rows, on a GPU within what is free; too small is refused with the sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from medusa.engine.kv_cache import PAGE_SIZE
from medusa.engine.limits import FREE_MEMORY_SHARE, MAX_NODES, Limits

PAGE_BYTES = 2 * 4 * PAGE_SIZE * 2 * 16 * 2


def limits(device="cpu", **arguments):
    backbone = SimpleNamespace(
        device=torch.device(device),
        dtype=torch.bfloat16,
        num_layers=4,
        kv_shape=(2, 16),
        max_positions=4096,
        vocab_size=100,
    )
    settings = {"max_batch_size": 2, "max_model_len": None, "max_prefill_tokens": None, "kv_cache_gb": None}
    return Limits.of(backbone, None, [], **{**settings, **arguments})


@pytest.fixture
def free_memory(monkeypatch):
    def free_memory(num_bytes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (num_bytes, 2 * num_bytes))

    return free_memory


FULL = 2 * (4096 + MAX_NODES) // PAGE_SIZE  # both rows to the end of the context, with a tree behind it


def test_on_a_cpu_every_row_can_reach_the_end():
    assert limits().num_pages == FULL
    assert limits(max_model_len=100).num_pages == 2 * 3


def test_a_gpu_gives_a_share_of_its_free_memory_and_no_more_than_twice_what_rows_fill(free_memory):
    free_memory(100 * PAGE_BYTES)
    assert limits("cuda").num_pages == int(100 * FREE_MEMORY_SHARE) - 1
    free_memory(10_000 * PAGE_BYTES)
    assert limits("cuda").num_pages == 2 * FULL


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("pages", [5, 10 * FULL])
def test_what_is_asked_for_is_taken(free_memory, device, pages):
    free_memory(0)
    assert limits(device, kv_cache_gb=(pages + 1.5) * PAGE_BYTES / 2**30).num_pages == pages


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_sums(free_memory):
    free_memory(PAGE_BYTES)
    with pytest.raises(ValueError, match="85% of the GPU's 0.00 GiB of free memory holds -1 pages.*needs 2 at least"):
        limits("cuda")
    with pytest.raises(ValueError, match=r"memory: 32768 bytes a page \(keys and values of 4 layers, 2 heads of 16"):
        limits(kv_cache_gb=2 * PAGE_BYTES / 2**30)


def test_a_prefill_budget_fits_the_device_and_may_be_given():
    assert limits().max_prefill_tokens == 256
    assert limits("cuda", kv_cache_gb=1).max_prefill_tokens == 512
    assert limits(max_prefill_tokens=1).max_prefill_tokens == 1
    with pytest.raises(ValueError, match="max_prefill_tokens must be at least 1, got 0"):
        limits(max_prefill_tokens=0)
