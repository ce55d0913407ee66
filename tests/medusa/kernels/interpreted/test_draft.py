"""A step's flat nodes equal the plain reference's and `decoding.propose`'s, element by element."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from medusa.decoding import propose
from medusa.kernels.draft import draft, draft_reference
from medusa.kernels.state import Drafts, RowState, Trees

SHAPES = [dict(), dict(batch=2), dict(batch=33, room=64), dict(room=128, heads=4), dict(room=192, heads=5, width=2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_every_element_equals_the_reference(make_step, shape, seed):
    step = make_step(seed, **shape)
    out = step.drafts()
    draft(step.rows_B, step.count_B, step.trees, step.state, out)
    expected = draft_reference(step.rows_B, step.count_B, step.trees, step.state, step.num_flat)
    for field in fields(Drafts):
        assert torch.equal(getattr(out, field.name), getattr(expected, field.name)), field.name


def test_tokens_are_what_decoding_proposes(make_step):
    seen = 0
    for seed in range(5):
        step = make_step(seed)
        out = step.drafts()
        draft(step.rows_B, step.count_B, step.trees, step.state, out)
        for b, (row, count) in enumerate(zip(step.rows_B.tolist(), step.counts, strict=True)):
            if not step.state.live_R[row]:
                continue
            nodes = slice(int(out.start_B[b]), int(out.start_B[b]) + count)
            tree = step.batch(b)
            tokens = propose(tree, step.state.root_R[row : row + 1], step.state.guesses_RKS[row : row + 1])[0]
            assert torch.equal(out.valid_M[nodes].bool(), tree.valid_BN[0])
            assert torch.equal(out.tokens_M[nodes], torch.where(tree.valid_BN[0], tokens, 0))
            assert torch.equal(out.position_M[nodes], step.state.length_R[row] + tree.depth_BN[0])
            seen += count
    assert seen > 50


def test_only_padding_leaves_every_node_to_the_last_row():
    state = RowState.empty(4, 2, 3, 1, torch.device("cpu"))
    trees = Trees.roots(4, 64, 2, torch.device("cpu"))
    out = Drafts.empty(6, 2, torch.device("cpu"))
    rows = torch.full((2,), 3, dtype=torch.int32)
    draft(rows, torch.zeros(2, dtype=torch.int32), trees, state, out)
    assert out.row_M.tolist() == [3] * 6
    assert out.valid_M.sum() == out.position_M.sum() == out.tokens_M.sum() == 0


def test_wrong_tensors_are_named(make_step):
    step = make_step(0)
    with pytest.raises(ValueError, match=r"count_B must be a contiguous torch.int32 tensor of shape \(5\)"):
        draft(step.rows_B, step.count_B.long(), step.trees, step.state, step.drafts())
    with pytest.raises(ValueError, match="multiple of 64"):
        Trees(*(torch.zeros(2, 40, dtype=torch.int32) for _ in range(3)), torch.zeros(2, 40, 1, dtype=torch.int64))
