"""The paged cache: pages are counted, and accepted nodes move next to the committed ones whatever overlaps."""

from __future__ import annotations

import random

import pytest
import torch

from medusa.engine.kv_cache import PAGE_SIZE, TRASH_PAGE, KVCache, pages_for


def new_cache(num_pages=12, max_batch_size=4, max_pages=5):
    return KVCache(
        num_layers=2,
        kv_shape=(2, 3),
        num_pages=num_pages,
        max_batch_size=max_batch_size,
        max_pages=max_pages,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def pages_of(cache, row):
    return [page for page in cache.tables[row].tolist() if page != TRASH_PAGE]


def read(cache, row, positions):
    """[layers, 2, positions, H, D] of a row, one position at a time."""
    slots = [(int(cache.tables[row, p // PAGE_SIZE]), p % PAGE_SIZE) for p in positions]
    return torch.stack([cache.data[:, :, page, offset] for page, offset in slots], 2)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2), (5 * PAGE_SIZE, 5)])
def test_pages_for_rounds_up(tokens, pages):
    assert pages_for(tokens) == pages


def test_rows_own_pages_of_their_own_and_never_the_trash_page():
    cache = new_cache()
    assert cache.grow(0, 3 * PAGE_SIZE)
    assert cache.grow(2, 2 * PAGE_SIZE + 1)
    owned = pages_of(cache, 0) + pages_of(cache, 2)
    assert len(owned) == len(set(owned)) == cache.pool.num_used == 6
    assert set(owned) <= set(range(1, cache.pool.num_pages + 1))
    assert pages_of(cache, 1) == []


def test_growth_that_does_not_fit_changes_nothing():
    cache = new_cache(num_pages=4)
    assert cache.grow(0, 3 * PAGE_SIZE)
    before = cache.tables.clone()
    assert not cache.grow(1, 2 * PAGE_SIZE)
    assert cache.pool.num_used == 3
    assert torch.equal(cache.tables, before)
    assert cache.grow(1, PAGE_SIZE)
    assert cache.pool.num_used == 4


def test_freed_pages_are_given_out_again_and_their_row_points_to_the_trash():
    cache = new_cache(num_pages=4)
    assert cache.grow(0, 4 * PAGE_SIZE)
    cache.free(0)
    assert cache.pool.num_used == 0
    assert (cache.tables == TRASH_PAGE).all()
    assert cache.grow(3, 4 * PAGE_SIZE)
    assert sorted(pages_of(cache, 3)) == [1, 2, 3, 4]


def test_a_row_grows_behind_what_it_has():
    cache = new_cache()
    for tokens, pages in [(1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2), (5, 2), (4 * PAGE_SIZE, 4)]:
        before = pages_of(cache, 1)
        assert cache.grow(1, tokens)
        assert pages_of(cache, 1)[: len(before)] == before
        assert cache.num_owned(1) == len(pages_of(cache, 1)) == cache.pool.num_used == pages


def test_a_long_life_of_growth_neither_leaks_nor_shares_pages():
    cache, rng, held = new_cache(num_pages=10), random.Random(0), {}
    for _ in range(500):
        row = rng.randrange(4)
        if row in held:
            cache.free(row)
            del held[row]
        else:
            pages = rng.randrange(1, 6)
            fits = pages <= 10 - sum(held.values())
            assert cache.grow(row, pages * PAGE_SIZE - rng.randrange(PAGE_SIZE)) == fits
            held |= {row: pages} if fits else {}
        owned = [page for row in held for page in pages_of(cache, row)]
        assert len(owned) == len(set(owned)) == cache.pool.num_used == sum(held.values())
        assert {row: len(pages_of(cache, row)) for row in held} == held


def random_path(rng, max_depth):
    """Accepted nodes as a step gives them: ascending indices from the root's 0 on, then -1."""
    depth = rng.randrange(max_depth + 1)
    nodes = sorted(rng.sample(range(1, 64), depth))
    return [0, *nodes] + [-1] * (max_depth - depth)


@pytest.mark.parametrize("seed", range(100))
def test_compaction_equals_copying_out_first(seed):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = new_cache(num_pages=20)
    rows = rng.sample(range(4), rng.randrange(1, 4))
    lengths = {row: rng.randrange(1, 4 * PAGE_SIZE) for row in range(4)}
    for row in rng.sample(range(4), 4):
        assert cache.grow(row, lengths[row] + 64)
    cache.data.normal_(generator=generator)
    paths = [random_path(rng, max_depth=5) for _ in rows]
    expected = cache.data.clone()
    for row, path in zip(rows, paths, strict=True):
        accepted = [node for node in path if node >= 0]
        moved = read(cache, row, [lengths[row] + node for node in accepted])
        for depth in range(len(accepted)):
            position = lengths[row] + depth
            expected[:, :, cache.tables[row, position // PAGE_SIZE], position % PAGE_SIZE] = moved[:, :, depth]
    cache.compact(torch.tensor(rows), torch.tensor([lengths[row] for row in rows]), torch.tensor(paths))
    assert torch.equal(cache.data[:, :, 1:], expected[:, :, 1:])


def test_compaction_of_a_chain_that_slides_over_itself():
    """Every target but the first is also a source."""
    cache = new_cache()
    assert cache.grow(0, 2 * PAGE_SIZE)
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    length = PAGE_SIZE - 3  # across the border of two pages
    wanted = read(cache, 0, [length + node for node in (0, 2, 3, 4, 5, 6)])
    cache.compact(torch.tensor([0]), torch.tensor([length]), torch.tensor([[0, 2, 3, 4, 5, 6]]))
    assert torch.equal(read(cache, 0, range(length, length + 6)), wanted)


def test_compaction_where_nothing_moves_leaves_every_page_alone():
    cache = new_cache()
    assert cache.grow(0, PAGE_SIZE)
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    before = cache.data[:, :, 1:].clone()
    cache.compact(torch.tensor([0, 0]), torch.tensor([5, 5]), torch.tensor([[0, 1, 2], [0, -1, -1]]))
    assert torch.equal(cache.data[:, :, 1:], before)


def test_compaction_never_brings_in_the_trash_page():
    cache = new_cache()
    for row in (0, 1):
        assert cache.grow(row, 2 * PAGE_SIZE)
    cache.data.normal_(generator=torch.Generator().manual_seed(0))
    cache.data[:, :, TRASH_PAGE] = float("nan")
    paths = torch.tensor([[0, 3, 9, -1], [0, -1, -1, -1]])
    cache.compact(torch.tensor([0, 1]), torch.tensor([10, 2 * PAGE_SIZE - 1]), paths)
    assert torch.isfinite(cache.data[:, :, 1:]).all()
