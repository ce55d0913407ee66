"""Token trees: the paths' checks, the derived arrays against brute force, and growth against enumeration."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from medusa.tree import TokenTree, expected_tokens, grow, ladder

# The first nodes of the reference's mc_sim_7b_63, in its own order.
MEDUSA_CHOICES = [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 3], [4], [0, 4], [2, 0], [0, 0, 1]]


def random_tree(rng, num_nodes, heads=4, width=4):
    paths = [()]
    while len(paths) < num_nodes:
        child = (*rng.choice([path for path in paths if len(path) < heads]), rng.randrange(width))
        if child not in paths:
            paths.append(child)
    rng.shuffle(paths)
    return TokenTree.from_paths(paths)


def random_accuracy(rng, heads=3, width=3):
    return [[rng.random() for _ in range(width)] for _ in range(heads)]


def all_trees(heads, width, num_nodes):
    """Every prefix-closed set of `num_nodes` nodes, the root included."""
    paths = [path for depth in range(1, heads + 1) for path in itertools.product(range(width), repeat=depth)]
    for chosen in itertools.combinations(paths, num_nodes - 1):
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen):
            yield TokenTree.from_paths(chosen)


def test_paths_are_put_in_topological_order_with_the_root_first():
    tree = TokenTree.from_paths([(1,), (0, 1), (0,), (0, 0, 2), (0, 0)])
    assert tree.paths == ((), (0,), (1,), (0, 0), (0, 1), (0, 0, 2))
    assert tree.depth == (0, 1, 1, 2, 2, 3)
    assert tree.rank == (-1, 0, 1, 0, 1, 2)
    assert tree.parent == (-1, 0, 0, 1, 1, 3)
    assert (tree.num_nodes, tree.max_depth, tree.max_rank) == (6, 3, 2)


def test_medusa_choices_are_read_and_written_back():
    tree = TokenTree.from_paths(MEDUSA_CHOICES)
    assert tree.num_nodes == len(MEDUSA_CHOICES) + 1
    assert sorted(tree.to_list()) == sorted(MEDUSA_CHOICES)
    assert TokenTree.from_paths(tree.to_list()) == tree


def test_order_of_the_paths_and_a_named_root_make_no_difference():
    one = TokenTree.from_paths(MEDUSA_CHOICES)
    other = TokenTree.from_paths([(), *reversed(MEDUSA_CHOICES)])
    assert one == other
    assert len({one, other}) == 1


def test_the_root_alone_is_plain_decoding():
    root = TokenTree.root()
    assert root == TokenTree.from_paths([]) == TokenTree.from_paths([()])
    assert (root.num_nodes, root.max_depth, root.max_rank) == (1, 0, -1)
    assert root.to_list() == []
    assert root.ancestors.tolist() == [[True]]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (1,), (0,)], r"\[\(0,\)\] more than once"),
        ([(0, 1)], r"\(0, 1\) lacks its parent \(0,\)"),
        ([(0,), (0, 1, 0)], r"\(0, 1, 0\) lacks its parent \(0, 1\)"),
        ([(0,), (-1,)], r"\(-1,\) has a negative rank"),
    ],
)
def test_paths_that_are_no_tree_are_refused_by_name(paths, message):
    with pytest.raises(ValueError, match=message):
        TokenTree.from_paths(paths)


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 30, 64])
def test_derived_arrays_equal_brute_force(num_nodes):
    tree = random_tree(random.Random(num_nodes), num_nodes)
    for node, path in enumerate(tree.paths):
        assert tree.depth[node] == len(path)
        assert tree.parent[node] == (tree.paths.index(path[:-1]) if path else -1)
        assert tree.parent[node] < node
        seen = [other for other, above in enumerate(tree.paths) if path[: len(above)] == above]
        assert tree.ancestors[node].nonzero().flatten().tolist() == seen
    assert tree.ancestors.dtype == torch.bool
    assert tree.max_depth == max(len(path) for path in tree.paths)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_nodes", [2, 4, 5])
def test_grow_is_the_best_connected_tree_by_enumeration(seed, num_nodes):
    heads, width = 2, 3
    accuracy = random_accuracy(random.Random(seed), heads, width)
    best = max(expected_tokens(tree, accuracy) for tree in all_trees(heads, width, num_nodes))
    grown = grow(accuracy, num_nodes)
    assert grown.num_nodes == num_nodes
    assert expected_tokens(grown, accuracy) == pytest.approx(best, abs=1e-12)


def test_grow_takes_a_better_sibling_of_lower_rank_first():
    tree = grow([[0.1, 0.6], [0.5, 0.2]], 3)
    assert tree.paths == ((), (1,), (1, 0))


def test_grow_leaves_out_guesses_that_never_hit():
    tree = grow([[0.5, 0.0], [0.0, 0.0]], 64)
    assert tree.paths == ((), (0,))
    assert grow([[0.0]], 64) == TokenTree.root()
    assert grow([], 64) == TokenTree.root()


def test_grow_of_one_node_is_the_root_and_none_is_refused():
    assert grow([[0.5]], 1) == TokenTree.root()
    with pytest.raises(ValueError, match="at least 1 node, got 0"):
        grow([[0.5]], 0)


def test_grow_takes_no_more_heads_or_ranks_than_there_are():
    tree = grow([[0.9, 0.8], [0.7]], 100)
    assert set(tree.paths) == {(), (0,), (1,), (0, 0), (1, 0)}


@pytest.mark.parametrize("seed", range(5))
def test_ladder_is_nested_ascending_and_prefix_closed(seed):
    accuracy = random_accuracy(random.Random(seed), heads=4, width=5)
    trees = ladder(accuracy, [64, 1, 2, 4, 8, 16, 32])
    assert [tree.num_nodes for tree in trees] == [1, 2, 4, 8, 16, 32, 64]
    for smaller, larger in itertools.pairwise(trees):
        assert set(smaller.paths) < set(larger.paths)
    for tree in trees:
        assert all(path[:-1] in tree.paths for path in tree.paths if path)


def test_ladder_is_nested_where_guesses_are_equally_good():
    trees = ladder([[0.5] * 4] * 3, range(1, 30))
    for smaller, larger in itertools.pairwise(trees):
        assert set(smaller.paths) < set(larger.paths)


def test_ladder_names_a_tree_once_when_growth_ran_out():
    assert [tree.num_nodes for tree in ladder([[0.5, 0.2]], [1, 2, 4, 8])] == [1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_expected_tokens_equals_the_enumeration_of_independent_hits(seed):
    """Each head's true token is at rank r with probability accuracy[head][r], or at none; heads are independent."""
    rng = random.Random(seed)
    accuracy = [[share * rng.random() for share in (0.5, 0.3, 0.2)] for _ in range(3)]
    tree = random_tree(rng, 12, heads=3, width=3)
    expected = 0.0
    for outcome in itertools.product([0, 1, 2, None], repeat=3):
        probability = 1.0
        for head, rank in enumerate(outcome):
            probability *= 1 - sum(accuracy[head]) if rank is None else accuracy[head][rank]
        accepted = max(len(path) for path in tree.paths if path == outcome[: len(path)])
        expected += probability * (accepted + 1)
    assert expected_tokens(tree, accuracy) == pytest.approx(expected, abs=1e-12)


def test_expected_tokens_counts_one_for_the_root_and_nothing_for_unknown_guesses():
    assert expected_tokens(TokenTree.root(), []) == 1.0
    assert expected_tokens(TokenTree.from_paths([(0,), (7,), (0, 0)]), [[0.5]]) == 1.5
