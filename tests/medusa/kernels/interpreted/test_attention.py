"""Attention over pages equals the plain tree attention, or a softmax written out; free pages hold NaN."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from medusa.kernels.attention import attend
from medusa.kernels.attention_plan import AttentionPlan, Scratch, Visible
from medusa.kernels.tree_attention import PagedTree

CPU = torch.device("cpu")
PAGE_SIZE, WIDTH = 32, 8
NAN = float("nan")


class Batch:
    """Random rows of a cache, trees (or chains) behind them, and queries, keys and values of the nodes."""

    def __init__(self, seed, counts, *, heads, groups, size, room=64, chain=False):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.counts, self.chain, self.heads, self.size = counts, chain, heads, size
        num_rows, total = len(counts) + 2, sum(counts) + 3
        self.rows = rng.sample(range(num_rows - 1), len(counts))
        self.length = torch.tensor([rng.choice([0, 1, 5, 17, 33, 70]) for _ in range(num_rows - 1)] + [0])
        pages = 1 + torch.randperm(num_rows * WIDTH, generator=generator)
        self.tables = pages.view(num_rows, WIDTH).int()
        self.depth = torch.zeros(num_rows, room, dtype=torch.int32)
        self.ancestors = torch.eye(room, dtype=torch.bool).repeat(num_rows, 1, 1)
        for row in range(num_rows):
            for node in range(1, room):
                parent = node - 1 if chain else rng.randrange(node)
                self.depth[row, node] = self.depth[row, parent] + 1
                self.ancestors[row, node] |= self.ancestors[row, parent]
        bit = torch.ones(64, dtype=torch.int64) << torch.arange(64)
        self.bits = (self.ancestors.view(num_rows, room, room // 64, 64).long() * bit).sum(-1)
        self.query = torch.randn(total, heads, size, generator=generator)
        self.cache = torch.full((2, num_rows * WIDTH + 1, PAGE_SIZE, groups, size), NAN)
        for row, count in zip(self.rows, counts, strict=True):
            for position in range(int(self.length[row]) + count):
                page = self.tables[row, position // PAGE_SIZE]
                new = torch.randn(2, groups, size, generator=generator)
                self.cache[:, page, position % PAGE_SIZE] = new

    @property
    def starts(self):
        return [sum(self.counts[:b]) for b in range(len(self.counts))]

    def run(self, splits, *, rows=16, columns=32, warps=2, merged_in_place=2, **options):
        """The kernel's result; rows of no sequence must have been left alone."""
        plan = AttentionPlan(
            splits,
            rows,
            columns,
            max(self.counts),
            warps=warps,
            teams=warps if rows < 64 else 1,
            merged_in_place=merged_in_place,
        )
        visible = Visible(
            *(torch.tensor(values, dtype=torch.int32) for values in (self.rows, self.starts, self.counts)),
            self.length, self.tables, *((None, None) if self.chain else (self.bits, self.depth)),
        )  # fmt: skip
        room = splits * len(self.query)
        scratch = Scratch(
            torch.full((room, self.heads, self.size), NAN), torch.full((room, self.heads), NAN),
            torch.zeros(4096, dtype=torch.int32),
        )  # fmt: skip
        out = torch.full_like(self.query, NAN)
        attend(self.query, self.cache, visible, plan, out, scratch, 0.3, **options)
        assert scratch.arrived.eq(0).all()
        assert out[sum(self.counts) :].isnan().all()
        return out

    def expected(self, window=None, softcap=None):
        """The plain twin's, one sequence at a time: it writes the same keys and values where they are already."""
        out = torch.full_like(self.query, NAN)
        for row, count, start in zip(self.rows, self.counts, self.starts, strict=True):
            if count:
                out[start : start + count] = self._one(row, slice(start, start + count), window, softcap)
        return out

    def _one(self, row, nodes, window, softcap):
        count, length = nodes.stop - nodes.start, int(self.length[row])
        step = PagedTree(
            self.cache[None].clone(), self.tables[None, row].long(), self.length[None, row],
            self.depth[None, row, :count].long(), torch.ones(1, count, dtype=torch.bool),
            self.ancestors[None, row, :count, :count],
        )  # fmt: skip
        position = torch.arange(length, length + count)
        new = self.cache[:, self.tables[row, position // PAGE_SIZE].long(), position % PAGE_SIZE].transpose(1, 2)
        query = self.query[None, nodes].transpose(1, 2)
        return step.attend(0, query, new[None, 0], new[None, 1], 0.3, window, softcap)[0]


@pytest.mark.parametrize(("splits", "merged_in_place"), [(1, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        ([24, 0, 7, 1], dict(heads=4, groups=2, size=16)),
        ([1, 1, 1], dict(heads=6, groups=1, size=16)),
        ([70, 3], dict(heads=2, groups=2, size=16, room=128)),
        ([9, 20], dict(heads=4, groups=2, size=24)),
        ([40, 0, 5], dict(heads=4, groups=1, size=16, chain=True)),
    ],
)
def test_equals_plain_tree_attention(counts, shape, splits, merged_in_place):
    batch = Batch(len(counts), counts, **shape)
    found = batch.run(splits, merged_in_place=merged_in_place)
    torch.testing.assert_close(found, batch.expected(), atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("window", [1, 9])
def test_windows_count_depth_not_slots(window, chain):
    batch = Batch(5, [24, 3], heads=4, groups=2, size=16, chain=chain)
    expected = batch.expected(window)
    for splits in (1, 2):
        torch.testing.assert_close(batch.run(splits, window=window), expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    assert not torch.allclose(expected[:27], batch.expected()[:27], atol=1e-2)


def test_scores_are_capped():
    batch = Batch(6, [12, 20], heads=4, groups=2, size=16)
    out = batch.run(2, softcap=1.5, window=30)
    torch.testing.assert_close(out, batch.expected(30, 1.5), atol=1e-5, rtol=1e-5, equal_nan=True)
    assert not torch.allclose(out[:32], batch.expected(30)[:32], atol=1e-2)


def test_tiles_of_any_size_and_strided_queries():
    batch = Batch(7, [30, 2, 11], heads=4, groups=2, size=16)
    expected = batch.expected()
    wide = torch.full((len(batch.query), 9, 16), NAN)
    wide[:, :4] = batch.query
    batch.query = wide[:, :4]
    for rows, columns, warps in [(32, 16, 1), (64, 32, 4), (16, 32, 2), (32, 32, 2)]:
        found = batch.run(2, rows=rows, columns=columns, warps=warps)
        torch.testing.assert_close(found[:43], expected[:43], atol=1e-5, rtol=1e-5)


def test_plans_stay_within_their_scratch():
    """For all sizes of steps that an engine has: 7B to 70B models, GPUs of 84 to 148 processors."""
    for heads, groups in [(32, 32), (32, 8), (52, 52), (64, 8), (28, 4), (8, 1), (4, 2)]:
        for processors in (4, 84, 108, 132, 148):
            scratch = Scratch.of(heads=heads, size=1, processors=processors, device=torch.device("meta"))
            for batch in (1, 2, 3, 7, 12, 64, 256):
                for max_nodes in (1, 4, 16, 64, 128, 512, 1024):
                    sizes = {batch, 2 * batch, batch * max_nodes, 2 * batch * max_nodes - 1}
                    for num_nodes, chain, warpgroups, size in itertools.product(sizes, *3 * [(False, True)]):
                        size = 256 if size else 128
                        plan = AttentionPlan.of(
                            batch_size=batch, num_nodes=num_nodes, max_nodes=max_nodes, chain=chain,
                            group=heads // groups, num_kv_heads=groups, head_size=size, processors=processors,
                            warpgroups=warpgroups,
                        )  # fmt: skip
                        tiles = -(-max_nodes * heads // groups // plan.rows)
                        if plan.splits > 1 and num_nodes < 2 * batch * max_nodes:
                            assert plan.splits * num_nodes <= len(scratch.part)
                            assert not plan.merges or batch * tiles * groups <= len(scratch.arrived)


def plan_of(heads, groups, batch, nodes, *, head_size=128, processors=132, warpgroups=True):
    return AttentionPlan.of(
        batch_size=batch, num_nodes=batch * nodes, max_nodes=64 if nodes > 16 else nodes, chain=False,
        group=heads // groups, num_kv_heads=groups, head_size=head_size, processors=processors,
        warpgroups=warpgroups,
    )  # fmt: skip


def test_tiles_and_splits_follow_the_room_on_the_gpu():
    """By heads, key-value heads, sequences and nodes, on 132 processors: rows a tile, warps, splits, tiles under way,
    merged in place. A tree may have as many nodes as an engine's: 64 where there are more than 16 a sequence."""
    expected = {
        (32, 32, 1, 1): (16, 4, 4, 4, True),
        (32, 32, 1, 16): (16, 4, 4, 4, True),
        (32, 32, 2, 16): (16, 4, 4, 3, True),
        (32, 32, 4, 1): (16, 4, 1, 4, False),
        (32, 32, 8, 8): (16, 4, 1, 2, False),
        (32, 32, 16, 8): (16, 2, 1, 2, False),
        (32, 32, 1, 32): (64, 4, 4, 3, False),
        (32, 32, 1, 64): (64, 4, 4, 3, False),
        (32, 32, 2, 64): (64, 4, 3, 2, False),
        (32, 32, 4, 32): (64, 4, 1, 2, False),
        (32, 8, 1, 1): (16, 4, 8, 4, False),
        (32, 8, 16, 4): (16, 4, 1, 4, False),
        (32, 8, 1, 16): (64, 4, 8, 3, False),
        (32, 8, 1, 64): (64, 4, 4, 3, False),
        (32, 8, 16, 8): (64, 4, 1, 2, False),
    }
    for sizes, cut in expected.items():
        plan = plan_of(*sizes)
        assert (plan.rows, plan.warps, plan.splits, plan.ahead, plan.merges) == cut, sizes


def test_gpus_without_products_of_warpgroups_have_small_tiles():
    for sizes in [(32, 32, 1, 64), (32, 32, 4, 32), (32, 8, 1, 16)]:
        assert plan_of(*sizes, processors=108, warpgroups=False).rows == 16


def test_large_heads_have_no_teams():
    for nodes, warpgroups in itertools.product((1, 64), (False, True)):
        assert plan_of(16, 8, 1, nodes, head_size=256, warpgroups=warpgroups).teams == 1
    assert plan_of(16, 8, 1, 1).teams == 4


def test_fewer_tiles_are_under_way_where_keys_are_large():
    plan = plan_of(32, 32, 1, 16)
    assert plan.ahead == 4
    assert [plan.stages_of(*sizes) for sizes in ((128, 2), (128, 4), (256, 2), (160, 4), (256, 4))] == [9, 5, 5, 3, 3]


@pytest.mark.parametrize(("teams", "warps", "columns"), [(8, 8, 128), (4, 4, 32), (2, 2, 16), (2, 4, 64)])
def test_teams_too_small_for_a_product_are_refused(teams, warps, columns):
    with pytest.raises(ValueError, match="16 tokens each"):
        AttentionPlan(splits=1, rows=16, columns=columns, max_nodes=1, warps=warps, teams=teams)


def test_too_little_scratch_is_refused():
    batch = Batch(8, [3], heads=2, groups=2, size=16)
    scratch = Scratch(torch.empty(4, 2, 16), torch.empty(4, 2), torch.zeros(64, dtype=torch.int32))
    row = torch.zeros(1, dtype=torch.int32)
    visible = Visible(row, row, row + 3, batch.length, batch.tables, batch.bits, batch.depth)
    plan = AttentionPlan(splits=2, rows=16, columns=16, max_nodes=3, warps=1)
    with pytest.raises(ValueError, match="needs more scratch"):
        attend(batch.query, batch.cache, visible, plan, torch.empty_like(batch.query), scratch, 0.3)
