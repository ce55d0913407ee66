"""Which nodes are asked, what leads to them, and what every node takes, against the plain drafter's own plan."""

from __future__ import annotations

import pytest
import torch

from medusa.drafter import plan_depths
from medusa.kernels import path
from medusa.kernels.draft import draft_reference
from medusa.kernels.path import Paths, most_asked

POISON = -7777
SHAPES = [dict(), dict(batch=2), dict(batch=9, heads=4), dict(room=128, heads=4, width=2), dict(room=192, heads=2)]


def drafted(step):
    return draft_reference(step.rows_B, step.count_B, step.trees, step.state, step.num_flat)


def paths_of(step, seed=0):
    _, heads, width = step.state.guesses_RKS.shape
    paths = Paths.empty(step.num_flat, heads, width, torch.device("cpu"))
    paths.asked_KA.fill_(POISON)
    paths.slot_M.fill_(POISON)
    paths.guesses_KAS.random_(0, 1000, generator=torch.Generator().manual_seed(seed))
    return paths


def asked_in(step, drafts, head):
    """Flat nodes that the plain drafter would ask, of live rows whose heads guessed so deep."""
    found = []
    for b, row in enumerate(step.rows_B.tolist()):
        if not step.counts[b] or not step.state.live_R[row] or head >= int(step.state.num_guessed_R[row]):
            continue
        plans = plan_depths(step.batch(b))
        if head < len(plans):
            found += [int(drafts.start_B[b]) + node for node in plans[head].asked_node_M.tolist()]
    return found


def tokens_by_hand(step, drafts, paths):
    """The flat nodes' tokens, parents before children."""
    tokens_M = drafts.tokens_M.clone()
    for m in range(step.num_flat):
        row, node = int(drafts.row_M[m]), int(drafts.node_M[m])
        depth = int(step.trees.depth_RN[row, node])
        if drafts.valid_M[m] and depth:
            parent = m - node + int(step.trees.parent_RN[row, node])
            slot = paths.asked_KA[depth - 1].tolist().index(parent)
            tokens_M[m] = paths.guesses_KAS[depth - 1, slot, int(step.trees.rank_RN[row, node])]
    return tokens_M


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_nodes_with_children_are_asked_once_and_all_take_their_guesses(make_step, shape, seed):
    step = make_step(seed, **shape)
    drafts, paths = drafted(step), paths_of(step, seed)
    heads, _, width = paths.guesses_KAS.shape
    path.plan_paths(drafts, step.trees, paths)
    for head in range(heads):
        expected = asked_in(step, drafts, head)
        asked = paths.asked_KA[head].tolist()
        assert sorted(asked[: len(expected)]) == sorted(expected)
        assert asked[len(expected) :] == [-1] * (len(asked) - len(expected))
        assert len(expected) <= most_asked(head, len(step.rows_B), step.num_flat, width)
        assert paths.slot_M[expected].tolist() == [asked.index(m) for m in expected]
    tokens_M = tokens_by_hand(step, drafts, paths)
    for head in range(heads):
        slots = most_asked(head, len(step.rows_B), step.num_flat, width)
        ahead_CJ = torch.full((max(slots, 1), head + 1), POISON)
        path.read_paths(head, drafts, step.trees, step.state, paths, ahead_CJ)
        for m, ahead in zip(paths.asked_KA[head].tolist(), ahead_CJ.tolist(), strict=False):
            assert ahead == (leading_to(step, drafts, tokens_M, m) if m >= 0 else [0] * (head + 1))
    path.take_guesses(drafts, step.trees, paths)
    assert torch.equal(drafts.tokens_M, tokens_M)


def leading_to(step, drafts, tokens_M, m):
    """The tokens from the root to a flat node."""
    row, node, tokens = int(drafts.row_M[m]), int(drafts.node_M[m]), []
    start = m - node
    while node >= 0:
        tokens.insert(0, int(tokens_M[start + node]))
        node = int(step.trees.parent_RN[row, node])
    return tokens


def test_most_asked_is_reached_and_never_passed():
    """A path of `head` nodes, then pairs of a parent and its child; and one more node gives room for no more."""
    for head in range(1, 5):
        for pairs in range(1, 4):
            nodes = head + 2 * pairs
            assert most_asked(head, 1, nodes, 10) == pairs == most_asked(head, 1, nodes + 1, 10)
    assert most_asked(0, 8, 16, 10) == 8  # each root has a child
    assert most_asked(0, 8, 9, 10) == 4
    assert most_asked(1, 2, 64, 3) == 6  # three guesses for each of two roots
    assert most_asked(4, 1, 5, 10) == 0


def test_wrong_buffers_are_named(make_step):
    step = make_step(0)
    drafts, paths = drafted(step), paths_of(step)
    with pytest.raises(ValueError, match="slot_M must be a contiguous torch.int32 tensor"):
        path.plan_paths(drafts, step.trees, paths_of(make_step(1)))
    with pytest.raises(ValueError, match="head 1 sees 2 tokens at up to"):
        path.read_paths(1, drafts, step.trees, step.state, paths, torch.zeros(len(paths.asked_KA[0]) + 1, 2).long())
