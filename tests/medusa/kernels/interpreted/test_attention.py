"""Attention over pages equals the plain tree attention, however it is cut; see attention_batch.py."""

from __future__ import annotations

import itertools

import pytest
import torch

from medusa.kernels import attention as module
from medusa.kernels.attention import attend
from medusa.kernels.attention_plan import AttentionPlan, Scratch, Visible
from tests.medusa.kernels.interpreted.attention_batch import Batch

NAN = float("nan")


def assert_found(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, equal_nan=True)


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
    assert_found(batch.run(splits, merged_in_place=merged_in_place), batch.expected())


TEAMS_OF_4 = dict(rows=16, columns=64, warps=4)
LARGE_TILES = dict(rows=64, columns=64, warps=8)
GROUPS_OF_7 = dict(heads=14, groups=2, page_size=64)


@pytest.mark.parametrize(
    ("cut", "shape"),
    [
        (dict(splits=1, **TEAMS_OF_4), dict(size=24, **GROUPS_OF_7)),
        (dict(splits=3, merged_in_place=3, **TEAMS_OF_4), dict(size=16, **GROUPS_OF_7)),
        (dict(splits=1, **TEAMS_OF_4), dict(size=80, chain=True, **GROUPS_OF_7)),
        (dict(splits=3, **LARGE_TILES), dict(size=40, room=128, **GROUPS_OF_7)),
        (dict(splits=11, rows=64, columns=16, warps=4), dict(size=24, chain=True, **GROUPS_OF_7)),
    ],
)
@pytest.mark.parametrize("options", [{}, dict(window=37, softcap=1.5)])
def test_tiles_of_either_kind_whatever_they_hold(cut, shape, options):
    """Heads that are no power of two, seven to a key-value head, so that tiles share nodes; of up to 200 tokens, which
    are pages enough for all teams and splits; keys and values that the launch writes itself, but for chains."""
    counts = [0, 70, 3] if "room" in shape else [11, 0, 3]
    batch = Batch(9, counts, lengths=(200, 170, 131), **shape)
    found = batch.run(**cut, fresh=not batch.chain, **options)
    assert_found(found, batch.expected(**options))


def test_each_tile_and_key_value_head_counts_its_splits_apart():
    """In turn, as an interpreter runs programs, they could share one counter."""
    batch = Batch(4, [2, 20], heads=4, groups=2, size=16)  # three tiles of eight nodes each
    expected = batch.expected()
    expected[2 + 8 : 2 + 16, 2:] = NAN
    assert_found(batch.run(3, merged_in_place=3, stuck=(1 * 3 + 1) * 2 + 1), expected)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("window", [1, 9])
def test_windows_count_depth_not_slots(window, chain):
    batch = Batch(5, [24, 3], heads=4, groups=2, size=16, chain=chain)
    expected = batch.expected(window)
    for splits in (1, 2):
        assert_found(batch.run(splits, window=window, fresh=not chain), expected)
    assert not torch.allclose(expected[:27], batch.expected()[:27], atol=1e-2)


@pytest.mark.parametrize("warps", [1, 2])
def test_tokens_ahead_of_all_windows_are_not_read(warps):
    batch = Batch(5, [5, 1], heads=4, groups=2, size=16, lengths=(70, 170))
    expected = batch.expected(9)
    for row, _ in batch.sequences():
        batch.cache[batch.places(row, 0, (int(batch.length[row]) - 8) // 32 * 32)] = NAN
    for splits in (1, 3):
        assert_found(batch.run(splits, warps=warps, window=9), expected)


def test_scores_are_capped():
    batch = Batch(6, [12, 20], heads=4, groups=2, size=16)
    out = batch.run(2, softcap=1.5, window=30)
    assert_found(out, batch.expected(30, 1.5))
    assert not torch.allclose(out[:32], batch.expected(30)[:32], atol=1e-2)


def test_tiles_of_any_size_and_strided_queries():
    batch = Batch(7, [30, 2, 11], heads=4, groups=2, size=16)
    expected = batch.expected()
    wide = torch.full((len(batch.query), 9, 16), NAN)
    wide[:, :4] = batch.query
    batch.query = wide[:, :4]
    for rows, columns, warps in [(32, 16, 1), (64, 32, 4), (16, 32, 2), (32, 32, 2)]:
        found = batch.run(2, rows=rows, columns=columns, warps=warps)
        assert_found(found, expected)


# Of plans: for chains, on a GPU with products of warpgroups, by a ring.
KINDS = [(False, False, False), (False, True, False), (False, True, True), (True, False, False), (True, True, False)]


def test_plans_stay_within_their_scratch():
    """For all sizes of steps that an engine has: 7B to 70B models, GPUs of 84 to 148 processors."""
    for heads, groups in [(32, 32), (32, 8), (52, 52), (64, 8), (28, 4), (8, 1), (4, 2)]:
        for processors in (4, 84, 108, 132, 148):
            scratch = Scratch.of(heads=heads, size=1, processors=processors, device=torch.device("meta"))
            for batch in (1, 2, 3, 7, 12, 64, 256):
                for max_nodes in (1, 4, 16, 64, 128, 512, 1024):
                    sizes = {batch, 2 * batch, batch * max_nodes, 2 * batch * max_nodes - 1}
                    for num_nodes, (chain, warpgroups, ring), size in itertools.product(sizes, KINDS, (128, 256)):
                        plan = AttentionPlan.of(
                            batch_size=batch, num_nodes=num_nodes, max_nodes=max_nodes, chain=chain,
                            group=heads // groups, num_kv_heads=groups, head_size=size, processors=processors,
                            warpgroups=warpgroups, ring=ring,
                        )  # fmt: skip
                        tiles = -(-max_nodes * heads // groups // plan.rows)
                        if plan.splits > 1 and num_nodes < 2 * batch * max_nodes:
                            assert plan.splits * num_nodes <= len(scratch.part)
                            assert not plan.merges or batch * tiles * groups <= len(scratch.arrived)


def plan_of(
    heads, groups, batch, nodes, *,
    max_nodes=None, chain=False, head_size=128, processors=132, warpgroups=True, ring=False,
):  # fmt: skip
    return AttentionPlan.of(
        batch_size=batch, num_nodes=batch * nodes, max_nodes=max_nodes or (64 if nodes > 16 else nodes), chain=chain,
        group=heads // groups, num_kv_heads=groups, head_size=head_size, processors=processors,
        warpgroups=warpgroups, ring=ring,
    )  # fmt: skip


def test_clusters_of_a_ring_run_at_once():
    """By sequences: on 132 multiprocessors, 6 parts of 18 and 2 of 12, clusters of 8, 4, 3 and 2 fit 14, 30, 44 and 66
    times."""
    fit = {8: 14, 4: 30, 3: 44, 2: 66, 1: 132}
    for heads, batch, splits in [
        (8, 1, 8), (28, 1, 4), (32, 1, 3), (40, 1, 2), (32, 2, 2), (32, 3, 1), (32, 4, 1)
    ]:  # fmt: skip
        plan = plan_of(heads, heads, batch, 64, ring=True)
        assert (plan.ring, plan.splits) == (True, splits), (heads, batch)
        assert heads * batch <= fit[splits]
    assert not plan_of(32, 32, 5, 64, ring=True).ring


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
        (32, 32, 4, 32): (64, 4, 1, 3, False),
        (32, 8, 1, 1): (16, 4, 8, 4, False),
        (32, 8, 16, 4): (16, 4, 1, 4, False),
        (32, 8, 1, 16): (64, 4, 8, 3, False),
        (32, 8, 1, 64): (64, 4, 4, 3, False),
        (32, 8, 16, 8): (64, 4, 1, 3, False),
    }
    for sizes, cut in expected.items():
        plan = plan_of(*sizes)
        assert (plan.rows, plan.warps, plan.splits, plan.ahead, plan.merges) == cut, sizes


def test_gpus_without_products_of_warpgroups_have_small_tiles():
    for sizes in [(32, 32, 1, 64), (32, 32, 4, 32), (32, 8, 1, 16)]:
        assert plan_of(*sizes, processors=108, warpgroups=False).rows == 16


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ((32, 32, 1, 32), {}),
        ((32, 32, 1, 64), {}),
        ((32, 8, 1, 16), {}),
        ((32, 8, 16, 16), {}),  # 128 programs
        ((32, 8, 1, 17), {"max_nodes": 64}),  # two tiles a key-value head
        ((32, 32, 4, 32), {}),
        ((33, 33, 4, 32), {}),  # a program for every processor
        ((28, 4, 1, 9), {}),
        ((32, 32, 1, 1), {}),  # few rows of a tile
        ((32, 32, 4, 16), {}),
        ((32, 8, 16, 1), {}),
    ],
)
def test_trees_of_few_sequences_go_by_a_ring_where_there_is_one(sizes, how):
    plan = plan_of(*sizes, **how, ring=True)
    assert (plan.ring, plan.rows) == (True, 64)
    assert plan.max_nodes == plan_of(*sizes, **how).max_nodes
    assert not plan_of(*sizes, **how).ring


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ((32, 32, 5, 1), {}),  # 160 programs
        ((32, 8, 17, 4), {}),
        ((32, 32, 1, 64), {"chain": True}),
        ((32, 32, 1, 64), {"max_nodes": 65}),
        ((32, 32, 1, 64), {"head_size": 256}),
        ((34, 34, 4, 32), {}),  # 136 programs
        ((32, 32, 4, 32), {"processors": 114}),
        ((32, 32, 2, 64), {"processors": 63}),
    ],
)
def test_other_attention_is_cut_as_without_a_ring(sizes, how):
    plan = plan_of(*sizes, **how, ring=True)
    assert not plan.ring and plan == plan_of(*sizes, **how)


class TakenByTheRing(Exception):
    pass


def taken(*_, **__):
    raise TakenByTheRing


RING = dict(splits=2, rows=64, merged_in_place=1, ring=True)


@pytest.mark.parametrize(
    ("fresh", "options"),
    [(True, dict(window=9)), (True, dict(softcap=1.5)), (True, dict(window=9, softcap=1.5)), (False, {})],
)
def test_what_a_ring_does_not_know_is_tritons_whatever_the_plan(fresh, options, monkeypatch):
    """Windows, caps, and keys that are written already."""
    monkeypatch.setattr(module, "ring_attention", taken)
    batch = Batch(5, [24, 3], heads=4, groups=2, size=16)
    expected = batch.expected(**options)
    assert_found(batch.run(**RING, fresh=fresh, **options), expected)
    assert not options or not torch.allclose(expected[:27], batch.expected()[:27], atol=1e-2)


def test_a_plan_for_a_ring_is_launched_as_one(monkeypatch):
    monkeypatch.setattr(module, "ring_attention", taken)
    batch = Batch(5, [24, 3], heads=4, groups=2, size=16)
    with pytest.raises(TakenByTheRing):
        batch.run(**RING, fresh=True)
    assert_found(batch.run(**RING | {"ring": False}, fresh=True), batch.expected())


def test_large_heads_have_no_teams():
    for nodes, warpgroups in itertools.product((1, 64), (False, True)):
        assert plan_of(16, 8, 1, nodes, head_size=256, warpgroups=warpgroups).teams == 1
    assert plan_of(16, 8, 1, 1).teams == 4


def test_fewer_tiles_are_under_way_where_keys_are_large():
    plan = plan_of(32, 32, 1, 16)
    assert plan.ahead == 4
    assert [plan.stages_of(*sizes) for sizes in ((128, 2), (128, 4), (256, 2), (160, 4), (256, 4))] == [9, 5, 5, 3, 3]


@pytest.mark.parametrize(("teams", "warps", "columns"), [(8, 8, 128), (4, 4, 32), (2, 2, 16), (2, 4, 64), (3, 3, 64)])
def test_teams_too_small_for_a_product_are_refused(teams, warps, columns):
    with pytest.raises(ValueError, match="16 tokens each"):
        AttentionPlan(splits=1, rows=16, columns=columns, max_nodes=1, warps=warps, teams=teams)


@pytest.mark.parametrize(("room", "counters"), [(11, 64), (12, 1)])
def test_too_little_scratch_is_refused(room, counters):
    batch = Batch(8, [3], heads=2, groups=2, size=16)
    scratch = Scratch(torch.empty(room, 2, 16), torch.empty(room, 2), torch.zeros(counters, dtype=torch.int32))
    row = torch.zeros(1, dtype=torch.int32)
    visible = Visible(row, row, row + 3, batch.length, batch.tables, batch.bits, batch.depth)
    plan = AttentionPlan(splits=2, rows=16, columns=16, max_nodes=3, warps=1)
    with pytest.raises(ValueError, match="needs more scratch"):
        attend(batch.query, batch.cache, visible, plan, torch.empty_like(batch.query), scratch, 0.3)


def test_pages_smaller_than_a_tile_are_refused():
    with pytest.raises(ValueError, match="pages of 32 tokens do not hold whole tiles of 64"):
        Batch(8, [3], heads=2, groups=2, size=16).run(1, columns=64)


@pytest.mark.parametrize(
    ("chain", "fresh", "projected"), [(True, True, True), (False, True, False), (False, False, True)]
)
def test_rotation_goes_with_trees_and_whole_projections(chain, fresh, projected):
    batch = Batch(8, [3], heads=2, groups=2, size=16, chain=chain)
    batch.query = batch.projected = batch.projected if projected else batch.query
    with pytest.raises(ValueError, match="rotation goes with trees"):
        batch.run(1, fresh=fresh)
