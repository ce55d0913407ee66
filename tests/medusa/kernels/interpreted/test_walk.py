"""The walk equals decoding.match and accept, clipped as the engine clips a reply; typical acceptance its formula."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from medusa.decoding import Typical, accept, match, typical
from medusa.kernels.cut import Cuts, find_cuts
from medusa.kernels.draft import draft
from medusa.kernels.sample import reduce_samples, sample
from medusa.kernels.state import RowState
from medusa.kernels.typical import distribution, judge
from medusa.kernels.walk import walk, walk_typical

CPU = torch.device("cpu")
SHAPES = [dict(), dict(batch=2), dict(batch=17, heads=2), dict(room=128, heads=5, width=2), dict(room=192, stops=1)]


NUM_GUESSED = 9  # that no row begins with


def prepare(make_step, seed, shape, *, vocab=4):
    step = make_step(seed, vocab=vocab, **shape)
    drafts = step.drafts()
    draft(step.rows_B, step.count_B, step.trees, step.state, drafts)
    generator = torch.Generator().manual_seed(seed)
    return step, drafts, torch.randint(0, vocab, (step.num_flat,), generator=generator)


def sequences(step, drafts):
    """(b, row, its flat nodes, its tree) of the sequences of a step that have any."""
    for b, (row, count) in enumerate(zip(step.rows_B.tolist(), step.counts, strict=True)):
        if count:
            yield b, row, slice(int(drafts.start_B[b]), int(drafts.start_B[b]) + count), step.batch(b)


def clipped(state, row, emitted):
    """Tokens up to the first that ends the reply, token by token, and why it ended (as engine/sequence.py has it)."""
    kept = []
    for token in emitted:
        kept.append(token)
        num_output = int(state.num_output_R[row]) + len(kept)
        if token in state.stop_ids_RE[row].tolist() and token >= 0 and num_output >= state.min_tokens_R[row]:
            return kept, 1
        if len(kept) == state.remaining_R[row]:
            return kept, 2
    return kept, 0


def expect(step, before, out, drafts, accepted_of):
    """Checks outputs and state of every sequence; returns how many tokens were emitted."""
    emitted_in_all, touched = 0, set()
    for b, row, nodes, tree in sequences(replace(step, state=before), drafts):
        if not before.live_R[row]:
            continue
        accepted = accepted_of(row, nodes, tree)
        path = [node for node in accepted.path_BD[0].tolist() if node >= 0]
        tokens = drafts.tokens_M[nodes].tolist()
        kept, finished = clipped(before, row, [tokens[node] for node in path[1:]] + [int(accepted.bonus_B[0])])
        num, depths = len(kept), out.tokens_BD.shape[1]
        assert out.tokens_BD[b].tolist() == kept + [-1] * (depths - num)
        assert out.path_BD[b].tolist() == path[:num] + [-1] * (depths - num)
        assert (int(out.num_B[b]), int(out.finished_B[b])) == (num, finished)
        assert int(out.last_B[b]) == nodes.start + path[num - 1]
        state = step.state
        assert int(state.length_R[row]) == int(before.length_R[row]) + num
        assert int(state.num_output_R[row]) == int(before.num_output_R[row]) + num
        assert int(state.remaining_R[row]) == int(before.remaining_R[row]) - num
        assert int(state.root_R[row]) == kept[-1]
        assert int(state.live_R[row]) == (finished == 0)
        assert int(state.num_guessed_R[row]) == NUM_GUESSED
        emitted_in_all += num
        touched.add(row)
    for b, row in enumerate(step.rows_B.tolist()):
        if not before.live_R[row]:
            assert out.tokens_BD[b].eq(-1).all()
            assert out.path_BD[b].eq(-1).all()
            assert int(out.num_B[b]) == int(out.finished_B[b]) == 0
            assert 0 <= int(out.last_B[b]) < max(1, step.num_flat)
    others = [row for row in range(step.state.num_rows) if row not in touched]
    for field in fields(RowState):
        assert torch.equal(getattr(step.state, field.name)[others], getattr(before, field.name)[others]), field.name
    return emitted_in_all


@pytest.mark.parametrize("shape", SHAPES)
def test_walk_equals_accept(make_step, shape):
    emitted = 0
    for seed in range(6):
        step, drafts, samples = prepare(make_step, seed, shape)
        if not step.num_flat:
            continue
        before, out = step.copy_state(), step.emitted(shape.get("heads", 3) + 1)
        walk(step.rows_B, step.count_B, drafts, samples, step.trees, step.state, out, num_guessed=NUM_GUESSED)

        def exact(row, nodes, tree, drafts=drafts, samples=samples):
            drawn = samples[nodes][None]
            return accept(tree, match(tree, drafts.tokens_M[nodes][None], drawn), drawn)

        emitted += expect(step, before, out, drafts, exact)
    assert emitted > 2


@pytest.mark.parametrize("seed", range(2))
def test_walk_reduces_the_splits_of_the_nodes_it_visits(make_step, seed):
    step, drafts, _ = prepare(make_step, seed, dict(batch=5))
    step.state.temperature_R[::2] = 1.0
    logits = torch.randn(step.num_flat, 2100, generator=torch.Generator().manual_seed(seed))
    logits[:, :4] += 5  # mostly the drafts' own tokens
    best = torch.full((step.num_flat, 3), -1)
    sample(logits, drafts, step.state, Cuts.empty(step.num_flat, CPU), best)
    tokens = torch.full((step.num_flat,), -1)
    reduce_samples(best, tokens)
    outs, states = [], []
    before = step.copy_state()
    for samples in (best, tokens):
        step.state = RowState(**{f.name: getattr(before, f.name).clone() for f in fields(RowState)})
        outs.append(step.emitted(4))
        walk(step.rows_B, step.count_B, drafts, samples, step.trees, step.state, outs[-1])
        states.append(step.state)
    for field in fields(outs[0]):
        assert torch.equal(getattr(outs[0], field.name), getattr(outs[1], field.name))
    for field in fields(RowState):
        assert torch.equal(getattr(states[0], field.name), getattr(states[1], field.name))
    assert int(outs[0].num_B.sum()) > 1


@pytest.mark.parametrize("root", ["greedy", "sampled"])
@pytest.mark.parametrize("shape", [dict(), dict(room=128, heads=5, width=2, batch=3)])
def test_typical_walk_equals_its_formula(make_step, shape, root):
    rule = Typical(epsilon=0.2, delta=0.6, root=root)
    emitted = 0
    for seed in range(2):
        step, drafts, _ = prepare(make_step, seed, shape)
        if not step.num_flat:
            continue
        state = step.state
        state.temperature_R[::2], state.temperature_R[1::4] = 0.0, 0.7
        state.temperature_R[3::4], state.top_p_R[3::4] = 1.2, 0.9
        state.exact_R[1::4] = state.exact_R[::4] = (
            1  # rows that decode as drawn whatever the rule, greedy ones among them
        )
        logits = torch.randn(step.num_flat, 11, generator=torch.Generator().manual_seed(seed))
        logits[:, :4] += 1.5
        cuts, best = Cuts.empty(step.num_flat, CPU), torch.full((step.num_flat, 1), -1)
        find_cuts(logits, drafts, state, cuts)
        sample(logits, drafts, state, cuts, best, greedy=root == "greedy")
        samples = torch.full((step.num_flat,), -1)
        reduce_samples(best, samples)
        kept, score = judge(logits, drafts, step.trees, state, cuts, epsilon=rule.epsilon, delta=rule.delta)
        drawn_from = distribution(logits, drafts, state, cuts)
        before, out = step.copy_state(), step.emitted(shape.get("heads", 3) + 1)
        walk_typical(
            step.rows_B, step.count_B, drafts, samples, kept, score, step.trees, state, out, num_guessed=NUM_GUESSED
        )

        def formula(row, nodes, tree, before=before, drafts=drafts, samples=samples, drawn_from=drawn_from):
            tokens, drawn, logits = drafts.tokens_M[nodes][None], samples[nodes][None], drawn_from[nodes][None]
            if before.temperature_R[row] == 0 or before.exact_R[row]:
                return accept(tree, match(tree, tokens, drawn), drawn)
            logprob = logits.log_softmax(-1)[0, tree.parent_BN[0], tokens[0]]
            logprob = torch.where(tree.depth_BN[0] > 0, logprob, 0.0).nan_to_num(neginf=-1e4)
            path = (tree.ancestors_BNN[0] * logprob).sum(-1)[None]
            return accept(tree, typical(tree, tokens, logits, rule), drawn, path)

        emitted += expect(step, before, out, drafts, formula)
    assert emitted > 2


def test_a_greedy_root_leaves_exact_rows_their_draws(make_step):
    step, drafts, _ = prepare(make_step, 0, dict(batch=9))
    state, nobody = step.state, Cuts.empty(step.num_flat, CPU)
    state.temperature_R[:], state.exact_R[::2] = 1.5, 1
    logits = torch.randn(step.num_flat, 40, generator=torch.Generator().manual_seed(0))

    def sampled(greedy):
        best, tokens = torch.full((step.num_flat, 1), -1), torch.full((step.num_flat,), -1)
        sample(logits, drafts, state, nobody, best, greedy=greedy)
        reduce_samples(best, tokens)
        return tokens

    drawn, mixed = sampled(False), sampled(True)
    exact = state.exact_R[drafts.row_M.long()] != 0
    state.temperature_R.zero_()
    argmax = sampled(False)
    assert torch.equal(mixed, torch.where(exact, drawn, argmax))
    assert not torch.equal(drawn[exact], argmax[exact])
    assert not torch.equal(drawn[~exact], argmax[~exact])


def test_stop_ids_length_and_min_tokens_end_a_reply(make_step):
    """One sequence, a chain of three drafts that all match: what is emitted under each limit."""
    limits = [  # stop ids, min_tokens, num_output, remaining -> tokens, finished
        ([-1, -1], 0, 0, 9, [1, 2, 3, 4], 0),
        ([2, -1], 0, 0, 9, [1, 2], 1),
        ([3, 1], 0, 0, 9, [1], 1),
        ([2, -1], 3, 0, 9, [1, 2, 3, 4], 0),
        ([2, 3], 3, 0, 9, [1, 2, 3], 1),
        ([2, -1], 3, 1, 9, [1, 2], 1),
        ([-1, -1], 0, 0, 2, [1, 2], 2),
        ([2, -1], 0, 0, 2, [1, 2], 1),
        ([3, -1], 0, 0, 2, [1, 2], 2),
        ([4, -1], 0, 0, 4, [1, 2, 3, 4], 1),
    ]
    for stops, min_tokens, num_output, remaining, tokens, finished in limits:
        step = make_step(0, batch=2, heads=3, stops=2, width=1, vocab=7)
        state, row = step.state, int(step.rows_B[0])
        nodes = torch.arange(4, dtype=torch.int32)
        step.trees.parent_RN[row, :4], step.trees.depth_RN[row, :4], step.trees.rank_RN[row, 1:4] = nodes - 1, nodes, 0
        state.live_R[row], state.num_guessed_R[row], state.root_R[row] = 1, 3, 6
        state.guesses_RKS[row, :, 0] = torch.tensor([1, 2, 3])
        state.stop_ids_RE[row] = torch.tensor(stops)
        state.min_tokens_R[row], state.num_output_R[row], state.remaining_R[row] = min_tokens, num_output, remaining
        step.count_B[:], step.num_flat = torch.tensor([4, 0]), 4
        drafts, out = step.drafts(), step.emitted(4)
        draft(step.rows_B, step.count_B, step.trees, state, drafts)
        walk(step.rows_B, step.count_B, drafts, torch.tensor([1, 2, 3, 4]), step.trees, state, out)
        assert (out.tokens_BD[0, : out.num_B[0]].tolist(), int(out.finished_B[0])) == (tokens, finished)
        assert int(out.last_B[1]) == 3
