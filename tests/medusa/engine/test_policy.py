"""The policy against brute force, and the properties it promises on any profile."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from medusa import StepTimes, TokenTree
from medusa.engine.acceptance import MAX_FACTOR, MIN_FACTOR, Acceptance
from medusa.engine.policy import Policy, best_tree
from medusa.engine.shapes import Buckets
from medusa.engine.speculation import Adaptive, Always
from medusa.growth import GrownTree
from medusa.sampling import SamplingParams
from medusa.tree import grow_in_order
from tests.medusa.engine.support import TREES

ACCURACY = [[0.45 / (k + 1) ** 0.5 * 0.5**rank for rank in range(6)] for k in range(4)]
GROWTH = grow_in_order([6] * 4, lambda path: ACCURACY[len(path) - 1][path[-1]], 64)
GROWN = GrownTree(tuple(path for path, _ in GROWTH), tuple(value for _, value in GROWTH))
NODES = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def small_tree(size: int) -> GrownTree:
    return GrownTree(GROWN.paths[: size - 1], GROWN.gains[: size - 1])


def gpu_profile(fixed=4e-3, sequence=1e-4, heads=2e-4, free=128, node=2e-5, nodes=NODES, batches=BATCHES) -> StepTimes:
    """A step reads the weights whatever it does; each sequence brings its cache; nodes cost beyond `free` of them."""
    times = {}
    for batch in batches:
        for total in (batch, *(n for n in nodes if n > batch)):
            drafts = heads if total > batch else 0.0
            times[batch, total, 1024] = fixed + sequence * batch + drafts + node * max(0, total - free)
    return StepTimes(times)


def random_profile(rng: random.Random, nodes=NODES, batches=BATCHES) -> StepTimes:
    """Any at all: noise on a random slope."""
    slope, heads = rng.uniform(0, 5e-4), rng.uniform(0, 5e-3)
    times = {}
    for batch in batches:
        for total in (batch, *(n for n in nodes if n > batch)):
            cost = 4e-3 + slope * total + (heads if total > batch else 0)
            times[batch, total, 512] = cost * rng.uniform(0.7, 1.3)
    return StepTimes(times)


def fresh(times: StepTimes, **arguments) -> Policy:
    return Policy(arguments.pop("grown", GROWN), times, Buckets(NODES, BATCHES), **arguments)


def random_factors(rng: random.Random, batch: int) -> list[float]:
    return [rng.uniform(MIN_FACTOR, 2.0) for _ in range(batch)]


def brute_force(grown: GrownTree, times: StepTimes, buckets: Buckets, factors: list[float]) -> float:
    """The best tokens a second over every way to give each sequence a prefix of the growth order."""
    batch, bucket = len(factors), buckets.batch(len(factors))
    best = batch / times.at(bucket, bucket, 1024)
    for nodes in itertools.product(range(1, grown.max_nodes + 1), repeat=batch):
        rows = [total for total in buckets.nodes if total > bucket and total >= sum(nodes)]
        if sum(nodes) > batch and rows:
            tokens = batch + sum(
                min(factor * gain, 1.0)
                for factor, n in zip(factors, nodes, strict=True)
                for gain in grown.gains[: n - 1]
            )
            best = max(best, tokens / times.at(bucket, rows[0], 1024))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_no_way_to_spend_the_nodes_is_better(seed: int) -> None:
    rng = random.Random(seed)
    grown, batch = small_tree(rng.randrange(2, 7)), rng.randrange(1, 5)
    buckets = Buckets((2, 3, 5, 6, 9, 12, 16, 24), (1, 2, 4))
    times = random_profile(rng, buckets.nodes, buckets.batches)
    factors = random_factors(rng, batch)
    choice = Policy(grown, times, buckets).choose(factors, 1024)
    assert choice.tokens / choice.seconds == pytest.approx(brute_force(grown, times, buckets, factors))


@pytest.mark.parametrize("seed", range(30))
def test_a_choice_is_what_it_says_and_never_slower_than_plain_by_its_own_model(seed: int) -> None:
    """Over a run of steps, hysteresis included."""
    rng = random.Random(100 + seed)
    times, batch = random_profile(rng), rng.choice([1, 3, 8, 20, 64])
    policy = fresh(times)
    for _ in range(40):
        batch = min(max(1, batch + rng.randrange(-2, 3)), 128)
        factors = random_factors(rng, batch)
        choice = policy.choose(factors, rng.choice([100, 1000, 5000]))
        bucket = min(b for b in BATCHES if b >= batch)
        assert choice.batch == bucket and len(choice.nodes) == batch
        assert sum(choice.nodes) <= choice.total and 1 <= min(choice.nodes) <= max(choice.nodes) <= 64
        tokens = batch + sum(
            min(factor * gain, 1.0)
            for factor, n in zip(factors, choice.nodes, strict=True)
            for gain in GROWN.gains[: n - 1]
        )
        assert choice.tokens == pytest.approx(tokens)
        assert choice.seconds == times.at(bucket, choice.total, 512)
        assert choice.tokens / choice.seconds >= batch / times.at(bucket, bucket, 512) - 1e-9
        assert choice.speculates == (choice.total > bucket)


@pytest.mark.parametrize("seed", range(10))
def test_the_spent_nodes_are_the_most_valuable_and_form_trees(seed: int) -> None:
    rng = random.Random(seed)
    factors = random_factors(rng, rng.randrange(2, 20))
    choice = fresh(gpu_profile()).choose(factors, 1024)
    assert choice.speculates
    values = [[min(f * gain, 1.0) for gain in GROWN.gains] for f in factors]
    spent = [v for row, n in zip(values, choice.nodes, strict=True) for v in row[: n - 1]]
    unspent = [v for row, n in zip(values, choice.nodes, strict=True) for v in row[n - 1 :]]
    assert min(spent) >= max(unspent, default=0)
    for nodes in choice.nodes:
        tree = GROWN.tree(nodes)
        assert tree.num_nodes == nodes  # TokenTree refuses what is not prefix-closed


@pytest.mark.parametrize("free", [32, 64, 128, 256])
@pytest.mark.parametrize("node", [5e-6, 2e-5, 1e-4])
def test_the_more_sequences_run_the_fewer_nodes_each_gets(free: int, node: float) -> None:
    shares = []
    for batch in BATCHES:
        choice = fresh(gpu_profile(free=free, node=node)).choose([1.0] * batch, 1024)
        shares.append(sum(choice.nodes) / batch)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 8 and shares[-1] < 8


def test_sequences_that_accept_more_get_more() -> None:
    choice = fresh(gpu_profile()).choose([0.3, 1.0, 2.5, 1.0], 1024)
    low, middle, high, same = choice.nodes
    assert low < middle < high and abs(middle - same) <= 1


def test_nodes_that_cost_nothing_are_all_taken_and_dear_ones_none() -> None:
    assert fresh(gpu_profile(heads=0, free=10**6)).choose([1.0] * 4, 1024).nodes == (64,) * 4
    assert fresh(gpu_profile(heads=1.0)).choose([1.0] * 4, 1024).nodes == (1,) * 4


def test_longer_contexts_have_times_of_their_own() -> None:
    """Drafts that are free at 128 tokens, and make a step ten times as long at 4,096, where they are not taken."""
    free = {(1, total, 128): 4e-3 for total in (1, 2, 64)}
    times = StepTimes(free | {(1, 1, 4096): 4e-3, (1, 2, 4096): 40e-3, (1, 64, 4096): 40e-3})
    assert fresh(times).choose([1.0], 128).nodes[0] > 8
    assert fresh(times).choose([1.0], 4096).nodes == (1,)
    short, long = Running(), Running()
    long.num_tokens = 4096
    assert Adaptive(fresh(times)).trees_of([short])[0].num_nodes > 8
    assert Adaptive(fresh(times)).trees_of([long])[0].num_nodes == 1


def test_nodes_of_no_worth_are_not_taken() -> None:
    grown = GrownTree(GROWN.paths[:6], (0.5, 0.3, 0.0, 0.0, 0.0, 0.0))
    assert fresh(gpu_profile(), grown=grown).choose([1.0, 1.0], 1024).nodes == (3, 3)
    nothing = GrownTree(GROWN.paths[:2], (0.0, 0.0))
    choice = fresh(gpu_profile(heads=-1e-3), grown=nothing).choose([1.0], 1024)
    assert choice.nodes == (1,)


@pytest.mark.parametrize("uniform", [False, True])
def test_equal_calls_give_equal_choices(uniform: bool) -> None:
    buckets = Buckets((2, 4, 8, 16), ()) if uniform else Buckets(NODES, BATCHES)
    policies = [Policy(GROWN, gpu_profile(), buckets, uniform=uniform) for _ in range(2)]
    runs = []
    for policy in policies:
        rng = random.Random(5)
        runs.append([policy.choose(random_factors(rng, rng.randrange(1, 65)), 700) for _ in range(30)])
    assert runs[0] == runs[1]
    tied = policies[0].choose([1.0] * 7, 700).nodes
    assert list(tied) == sorted(tied, reverse=True)  # ties go to the first


# Uniform trees


def uniform_policy(seconds, tokens=(1.0, 1.8, 2.4), **arguments) -> Policy:
    first, second = (tokens[1] - 1) / 3, (tokens[2] - tokens[1]) / 12
    grown = GrownTree(GROWN.paths[:15], (first,) * 3 + (min(second, first),) * 12)
    times = StepTimes.of_uniform_trees(seconds)
    return Policy(grown, times, Buckets((1, 4, 16)), uniform=True, **arguments)


def test_one_tree_for_all_has_the_most_expected_tokens_a_second() -> None:
    """0.25, 0.30 and 0.24 tokens a second alone; at eight 1.0, 0.8 and 0.6."""
    seconds = {(1, 1): 4.0, (1, 4): 6.0, (1, 16): 10.0, (8, 1): 8.0, (8, 4): 18.0, (8, 16): 32.0}
    alone = uniform_policy(seconds).choose([1.0], 100)
    assert (alone.nodes, alone.total, alone.seconds) == ((4,), 4, 6.0)
    assert alone.tokens == pytest.approx(1.8)
    assert uniform_policy(seconds).choose([1.0] * 8, 100).nodes == (1,) * 8
    eager = uniform_policy(seconds).choose([1.0, 2.5, 0.5], 100)
    assert len(set(eager.nodes)) == 1


def test_the_largest_tree_where_nodes_cost_nothing_and_plain_where_nothing_is_gained() -> None:
    assert uniform_policy({(1, 1): 4.0, (1, 16): 4.0}).choose([1.0], 1).nodes == (16,)
    assert uniform_policy({(1, 1): 1.0, (1, 4): 1.9, (1, 16): 2.5}).choose([1.0], 1).nodes == (1,)
    flat = {(1, 1): 1.0, (1, 4): 1.0, (1, 16): 1.0}
    assert uniform_policy(flat, tokens=(1.0, 1.0, 1.0)).choose([1.0], 1).nodes == (1,)


@pytest.mark.parametrize("seed", range(8))
def test_uniform_choices_match_trying_every_size(seed: int) -> None:
    rng = random.Random(seed)
    times = random_profile(rng, nodes=tuple(range(2, 513)), batches=(1, 2, 4, 8))
    sizes, factors = (2, 4, 8, 16), random_factors(rng, rng.choice([1, 2, 4, 8]))
    choice = Policy(GROWN, times, Buckets(sizes), uniform=True).choose(factors, 512)
    batch = len(factors)
    speeds = {1: batch / times.at(batch, batch, 512)}
    for size in sizes:
        worth = sum(min(f * gain, 1.0) for f in factors for gain in GROWN.gains[: size - 1])
        speeds[size] = (batch + worth) / times.at(batch, batch * size, 512)
    assert choice.nodes == (max(speeds, key=speeds.get),) * batch


# Hysteresis


def drifting(policy: Policy, factors: list[float]) -> list[int]:
    return [policy.choose([factor], 1).nodes[0] for factor in factors]


def test_a_small_gain_changes_the_budget_only_when_it_lasts() -> None:
    seconds = {(1, 1): 4.0, (1, 4): 6.0, (1, 16): 8.0}  # 4 and 16 nodes are equal at factor 1
    policy = uniform_policy(seconds, patience=5)
    start = drifting(policy, [1.0])[0]
    assert start in (4, 16)
    towards = 1.02 if start == 4 else 0.98
    assert drifting(policy, [towards, 1.0] * 10) == [start] * 20  # never lasts
    other = {4: 16, 16: 4}[start]
    assert drifting(policy, [towards] * 6) == [start] * 4 + [other] * 2


def test_a_large_gain_changes_the_budget_at_once() -> None:
    seconds = {(1, 1): 4.0, (1, 4): 6.0, (1, 16): 8.0}
    policy = uniform_policy(seconds, tokens=(1.0, 1.8, 2.3))
    assert drifting(policy, [1.0, 3.0, 1.0]) == [4, 16, 4]


def test_a_budget_slower_than_plain_is_given_up_at_once() -> None:
    seconds = {(1, 1): 4.0, (1, 4): 6.0, (1, 16): 16.0}
    policy = uniform_policy(seconds, margin=0.5, patience=1000)
    assert drifting(policy, [1.0, 0.9, 0.6, 0.7]) == [4, 4, 1, 1]


# What a request accepts


def accept(rng: random.Random, gains: tuple[float, ...], rate: float) -> int:
    """Drafts accepted of a chain whose nodes are reached with probability `rate` times their gains."""
    draw = rng.random()
    return sum(draw < rate * gain for gain in gains)


@pytest.mark.parametrize("rate", [0.3, 0.6, 1.0, 1.5])
def test_the_moving_average_finds_a_shifted_acceptance(rate: float) -> None:
    rng = random.Random(3)
    gains = (0.5, 0.3, 0.2, 0.1)
    acceptance, factors = Acceptance(), []
    for _ in range(3000):
        acceptance.observe(sum(gains), accept(rng, gains, rate))
        factors.append(acceptance.factor)
    assert np.mean(factors[200:]) == pytest.approx(rate, rel=0.1)
    assert np.std(factors[200:]) < 0.3


def test_the_factor_follows_a_change_within_a_hundred_steps() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.observe(1.0, 1.5)
    assert acceptance.factor == pytest.approx(1.5, rel=0.05)
    for _ in range(100):
        acceptance.observe(1.0, 0.5)
    assert acceptance.factor == pytest.approx(0.5, rel=0.15)


def test_the_factor_stays_in_its_range_starts_at_one_and_fades_back() -> None:
    acceptance = Acceptance()
    assert acceptance.factor == 1.0
    acceptance.observe(0.5, 0.0)
    assert 0.6 < acceptance.factor < 1.0  # one step says little
    for _ in range(500):
        acceptance.observe(1.0, 0.0)
    assert acceptance.factor == MIN_FACTOR
    for _ in range(2000):
        acceptance.rest()
    assert acceptance.factor == pytest.approx(1.0, abs=0.05)
    for _ in range(500):
        acceptance.observe(0.1, 4.0)
    assert acceptance.factor == MAX_FACTOR


def test_drafts_right_after_a_plain_step_have_no_guesses_and_do_not_count() -> None:
    acceptance = Acceptance()
    acceptance.rest()
    acceptance.observe(2.0, 0.0)
    assert acceptance.factor == 1.0
    acceptance.observe(2.0, 0.0)
    assert acceptance.factor < 1.0


class Running:
    """What the policy sees of a sequence."""

    def __init__(self, temperature: float = 0.0) -> None:
        self.num_tokens = 40
        self.params = SamplingParams(temperature=temperature)
        self.acceptance = Acceptance()


def test_requests_are_learnt_one_by_one_and_share_the_budget_accordingly() -> None:
    adaptive = Adaptive(fresh(gpu_profile(free=32, node=1e-4)))
    good, bad = sequences = [Running(), Running()]
    before = adaptive.trees_of(sequences)
    assert abs(before[0].num_nodes - before[1].num_nodes) <= 1
    for _ in range(60):
        for sequence, tree in zip(sequences, adaptive.trees_of(sequences), strict=True):
            adaptive.learn(sequence, tree, 4 if sequence is good else 1)
    after = adaptive.trees_of(sequences)
    assert good.acceptance.factor > 1.5 and bad.acceptance.factor < 0.5
    assert after[0].num_nodes > 2 * after[1].num_nodes
    assert adaptive.choice.nodes == tuple(tree.num_nodes for tree in after)


def test_new_requests_begin_where_others_of_their_temperature_are() -> None:
    adaptive = Adaptive(fresh(gpu_profile(free=32, node=1e-4)))
    for _ in range(40):
        cold, _ = sequences = [Running(0.0), Running(1.0)]
        for _ in range(20):
            for sequence, tree in zip(sequences, adaptive.trees_of(sequences), strict=True):
                adaptive.learn(sequence, tree, 4 if sequence is cold else 1)
    new_cold, new_hot, other = newcomers = [Running(0.0), Running(1.0), Running(0.5)]
    adaptive.trees_of(newcomers)
    assert new_cold.acceptance.factor > 1.2 > 1.0 > 0.8 > new_hot.acceptance.factor
    assert other.acceptance.factor == 1.0  # nothing is known of its temperature


def test_all_requests_that_accept_nothing_end_up_plain_and_are_tried_again() -> None:
    adaptive = Adaptive(fresh(gpu_profile(heads=1e-3)))
    sequence, sizes = Running(), []
    for _ in range(2000):
        (tree,) = adaptive.trees_of([sequence])
        sizes.append(tree.num_nodes)
        adaptive.learn(sequence, tree, 1)
    plain = sizes.count(1) / len(sizes)
    assert sizes[0] > 1 and 0.7 < plain < 1, plain
    assert any(size > 1 for size in sizes[500:])


def test_a_fixed_tree_learns_nothing() -> None:
    sequence = Running()
    fixed = Always(TREES[4])
    assert fixed.trees_of([sequence] * 3) == [TREES[4]] * 3
    fixed.learn(sequence, TREES[4], 4)
    assert sequence.acceptance.factor == 1.0
    assert Adaptive(fresh(gpu_profile())).trees_of([]) == []


def test_the_best_tree_at_a_load_is_the_smaller_of_equals() -> None:
    root, trees = TokenTree.root(), [TokenTree.root(), TREES[4], TREES[16]]
    times = StepTimes.of_uniform_trees({(1, 1): 1.0, (1, 4): 2.0, (1, 16): 2.0, (8, 1): 1.0, (8, 16): 64.0})
    assert best_tree(trees, [1.0, 2.0, 2.4], times, 1) == TREES[16]
    assert best_tree(trees, [1.0, 2.0, 2.0], times, 1) == root
    assert best_tree(trees, [1.0, 2.0, 2.4], times, 8) == root


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        fresh(gpu_profile()).choose([], 100)
    with pytest.raises(ValueError, match="129 sequences do not fit the largest batch bucket, 128"):
        fresh(gpu_profile()).choose([1.0] * 129, 100)
    for nodes in ((4, 2), (2, 2), (0, 1)):
        with pytest.raises(ValueError, match="ascending and each once"):
            Buckets(nodes)
