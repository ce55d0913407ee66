"""Which tree each batch row holds on the device: what is uploaded, and in which order its nodes lie."""

from __future__ import annotations

import pytest
import torch

from medusa.engine.tree_rows import TreeRows
from medusa.kernels.state import Trees
from medusa.tree import TokenTree
from tests.medusa.engine.support import NUM_HEADS, TREES

CPU = torch.device("cpu")
# The order in which the trees grow; the tree's own order is by depth, then path.
GROWTH = [(), (0,), (0, 0), (1,), (0, 0, 0), (1, 0), (0, 1)]


def tables(rows=3, room=64):
    return Trees.roots(rows, room, NUM_HEADS, CPU)


def held(trees, row, count):
    """The paths that a row's first nodes stand for, read from the tables."""
    paths = [()]
    for node in range(1, count):
        paths.append((*paths[int(trees.parent_RN[row, node])], int(trees.rank_RN[row, node])))
    assert trees.depth_RN[row, :count].tolist() == [len(path) for path in paths]
    for node, path in enumerate(paths):
        words = trees.bits_RNW[row, node]
        seen = [j for j in range(count) if words[j // 64] >> (j % 64) & 1]
        assert seen == [j for j in range(count) if paths[j] == path[: len(paths[j])]]
    return paths


def test_rows_hold_their_trees_and_others_stay():
    trees = tables()
    rows = TreeRows(trees)
    assert rows.place([2, 0], [TREES[64], TREES[4]]) == [64, 4]
    assert held(trees, 2, 64) == list(TREES[64].paths)
    assert held(trees, 0, 4) == list(TREES[4].paths)
    assert trees.depth_RN[1].tolist() == tables().depth_RN[1].tolist()
    assert int(trees.depth_RN[0, 4:].min()) > NUM_HEADS


def test_a_growth_is_uploaded_once_for_all_its_beginnings():
    trees = tables()
    rows = TreeRows(trees, GROWTH)
    for count in (5, 7, 1, 3):
        assert rows.place([1], [TokenTree.from_paths(GROWTH[:count])]) == [count]
        assert held(trees, 1, count) == GROWTH[:count]
        trees.parent_RN[0].fill_(99)  # whatever lies in another row
    before = trees.parent_RN.clone()
    trees.parent_RN[1, 6] = 77
    rows.place([1], [TokenTree.from_paths(GROWTH[:6])])
    assert int(trees.parent_RN[1, 6]) == 77
    other = TokenTree.from_paths([(1,), (1, 0)])  # no beginning of the growth
    rows.place([1], [other])
    assert held(trees, 1, 3) == list(other.paths)
    rows.place([1], [TokenTree.from_paths(GROWTH)])
    assert torch.equal(trees.parent_RN[1], before[1])


def test_the_host_sees_nodes_in_the_order_of_the_device():
    rows = TreeRows(tables(), GROWTH)
    ancestors, depth = rows.arranged(TokenTree.from_paths(GROWTH[:4]))
    assert depth.tolist() == [0, 1, 2, 1]
    assert ancestors.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, False, False, True],
    ]


def test_more_nodes_than_a_row_has_room_for_are_refused():
    wide = TokenTree.from_paths([(rank,) for rank in range(64)])
    with pytest.raises(ValueError, match="65 nodes, but a row has room for 64"):
        TreeRows(tables()).place([0], [wide])
