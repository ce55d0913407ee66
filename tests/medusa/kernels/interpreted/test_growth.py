"""Trees grown on the device are `medusa.tree.grow`'s of every size, in growth order, with the ancestors' bits."""

from __future__ import annotations

import pytest
import torch

from medusa.kernels.growth import grow_trees
from medusa.kernels.state import Trees
from medusa.tree import TokenTree, grow

CPU = torch.device("cpu")


def grown(logprob, rows, num_guessed, room):
    num_rows, heads, _ = logprob.shape
    trees = Trees.roots(num_rows, room, heads, CPU)
    for each in (trees.parent_RN, trees.depth_RN, trees.rank_RN, trees.bits_RNW):
        each.fill_(-7777)
    grow_trees(rows, logprob, num_guessed, trees)
    return trees


def paths_of(trees, row, unused_depth):
    """The row's paths in node order, checking that parents come first."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, trees.parent_RN.shape[1]):
        parent, depth, rank = (int(each[row, node]) for each in (trees.parent_RN, trees.depth_RN, trees.rank_RN))
        if depth == unused_depth:
            assert (parent, rank) == (-1, -1)
            continue
        assert len(paths) == node
        paths.append((*paths[parent], rank))
        assert depth == len(paths[-1])
    return paths


def seen_nodes(trees, row, node):
    return [j for j in range(trees.parent_RN.shape[1]) if int(trees.bits_RNW[row, node, j // 64]) >> (j % 64) & 1]


@pytest.mark.parametrize(("heads", "width", "room"), [(4, 10, 64), (3, 4, 128), (5, 8, 192), (2, 3, 64), (1, 10, 64)])
def test_every_first_nodes_are_the_best_tree_of_that_size(heads, width, room):
    generator = torch.Generator().manual_seed(room + heads)
    logprob = (torch.randn(4, heads, 60, generator=generator) * 2).log_softmax(-1)
    logprob = logprob.sort(-1, descending=True).values[..., :width].contiguous()
    rows = torch.tensor([2, 0], dtype=torch.int32)
    num_guessed = torch.tensor([heads, 0, max(1, heads - 1), 0], dtype=torch.int32)
    trees = grown(logprob, rows, num_guessed, room)
    for row in rows.tolist():
        accuracy = logprob[row, : num_guessed[row]].exp().tolist()
        paths = paths_of(trees, row, heads + 1)
        assert len(paths) == grow(accuracy, room).num_nodes
        for size in {1, 2, 3, 5, 8, 16, 32, 63, room, len(paths)}:
            assert TokenTree.from_paths(paths[:size]) == grow(accuracy, size)
        for node in range(room):
            index = {path: place for place, path in enumerate(paths)}
            path = paths[node] if node < len(paths) else None
            expected = [node] if path is None else sorted(index[path[:depth]] for depth in range(len(path) + 1))
            assert seen_nodes(trees, row, node) == expected
    assert trees.parent_RN[[1, 3]].eq(-7777).all()


def test_without_guesses_the_tree_is_its_root():
    trees = grown(torch.zeros(2, 3, 4), torch.tensor([1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 64)
    expected = Trees.roots(2, 64, 3, CPU)
    for name in ("parent_RN", "depth_RN", "rank_RN", "bits_RNW"):
        assert torch.equal(getattr(trees, name)[1], getattr(expected, name)[1])


def test_impossible_guesses_are_left_out():
    logprob = torch.full((1, 2, 3), float("-inf"))
    logprob[0, :, 0] = -0.5
    trees = grown(logprob, torch.zeros(1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32), 64)
    assert paths_of(trees, 0, 3) == [(), (0,), (0, 0)]


def test_of_equal_values_the_earlier_nodes_child_comes_first():
    trees = grown(torch.zeros(1, 2, 3), torch.zeros(1, dtype=torch.int32), torch.tensor([2], dtype=torch.int32), 64)
    assert paths_of(trees, 0, 3)[:7] == [(), (0,), (1,), (2,), (0, 0), (0, 1), (0, 2)]
