"""The shapes of steps: what the start measures is all that the policy's steps need."""

from __future__ import annotations

import random

import pytest

from medusa.engine.policy import Policy
from medusa.engine.profile import spread_evenly
from medusa.engine.shapes import BATCHES, Buckets, StepShapes
from tests.medusa.engine.test_policy import GROWN, gpu_profile, random_factors, random_profile


def measured_at_the_start(shapes: StepShapes, buckets: Buckets):
    """As `Profiler.measure_buckets` steps them."""
    for batch in buckets.batches:
        most = batch * GROWN.max_nodes
        for total in {batch, *(min(total, most) for total in buckets.nodes if total > batch)}:
            counts = [tree.num_nodes for tree in spread_evenly(GROWN, batch, total)]
            yield shapes.of(counts, max(counts) > 1)


@pytest.mark.parametrize("max_batch_size", [1, 5, 12, 64, 128])
def test_every_step_that_the_policy_chooses_was_measured_at_the_start(max_batch_size):
    """Also when some of its sequences end meanwhile and take no part."""
    shapes = StepShapes(max_batch_size, GROWN.max_nodes)
    measured = set(measured_at_the_start(shapes, shapes.buckets))
    rng = random.Random(max_batch_size)
    chosen = set()
    for _ in range(300):
        batch = rng.randint(1, max_batch_size)
        # Requests of which few accept much want the most unequal trees.
        factors = [factor * rng.choice([0.1, 1.0, 3.0]) for factor in random_factors(rng, batch)]
        times = random_profile(rng, shapes.buckets.nodes, shapes.buckets.batches)
        nodes = Policy(GROWN, times, shapes.buckets).choose(factors, 1000).nodes
        for left in (nodes, *(rng.sample(nodes, rng.randint(1, batch)) for _ in range(5))):
            shape = shapes.of(left, max(left) > 1)
            chosen.add(shape)
            assert sum(left) <= shape.nodes
            assert len(left) <= shape.batch
            assert max(left) <= shape.max_nodes
    assert chosen <= measured
    assert len(chosen) > 4


def test_a_tree_is_no_larger_than_its_steps_shape_allows():
    buckets = StepShapes(64, GROWN.max_nodes).buckets
    largest = set()
    for batch in (2, 7, 32):
        choice = Policy(GROWN, gpu_profile(heads=0.0), buckets).choose([3.0, *[0.05] * (batch - 1)], 1000)
        most = buckets.largest_tree(choice.batch, choice.total)
        assert most is None or max(choice.nodes) <= most
        largest.add(max(choice.nodes))
        assert choice.tokens == pytest.approx(batch + sum_of_values(choice.nodes, [3.0, *[0.05] * (batch - 1)]))
    assert 16 in largest


def sum_of_values(nodes, factors):
    return sum(min(f * gain, 1.0) for n, f in zip(nodes, factors, strict=True) for gain in GROWN.gains[: n - 1])


@pytest.mark.parametrize("max_batch_size", [1, 3, 100, 300])
def test_any_batch_of_any_trees_has_a_shape_that_holds_it(max_batch_size):
    shapes = StepShapes(max_batch_size, 130)
    rng = random.Random(0)
    for _ in range(500):
        counts = [rng.randint(1, 130) for _ in range(rng.randint(1, max_batch_size))]
        shape = shapes.of(counts, True)
        assert len(counts) <= shape.batch <= max_batch_size
        assert shape.batch in BATCHES or shape.batch == max_batch_size
        assert sum(counts) <= shape.nodes
        assert max(counts) <= shape.max_nodes <= 192


@pytest.mark.parametrize("name", ["nodes", "batches", "trees"])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 1), (0, 1)])
def test_sizes_that_are_no_ladder_are_refused(name, sizes):
    with pytest.raises(ValueError, match=f"{name}="):
        Buckets(**{"nodes": (1, 2), name: sizes})
