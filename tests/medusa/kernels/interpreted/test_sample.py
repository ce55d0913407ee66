"""Sampling equals SamplingBatch's, its noise medusa.noise's word for word, its cuts a full sort's."""

from __future__ import annotations

import os
import random

import pytest
import torch
import triton
import triton.language as tl

from medusa.kernels.cut import Cuts, find_cuts
from medusa.kernels.draft import draft
from medusa.kernels.sample import gumbel_words, num_splits, reduce_samples, sample
from medusa.kernels.state import Drafts, RowState
from medusa.kernels.typical import distribution
from medusa.noise import philox
from medusa.sampling import SamplingBatch, SamplingParams

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def _words(OUT, seed, choice, position, first, BLOCK: tl.constexpr):
    words = gumbel_words(tl.load(seed), tl.load(choice), tl.load(position), first, BLOCK)
    tl.store(OUT + tl.arange(0, BLOCK), words.to(tl.int64))


@pytest.mark.skipif("MEDUSA_KERNEL_DEVICE" in os.environ, reason="launches a kernel of its own on CPU tensors")
@pytest.mark.parametrize("seed", [0, -1, 7 + 2**32, -(2**63), 2**63 - 1])
def test_noise_words_are_bit_equal(seed):
    rng = random.Random(seed)
    for _ in range(5):
        choice, position, first = rng.randrange(2**31), rng.randrange(2**33), 4 * rng.randrange(2**20)
        words = torch.full((64,), -1)
        args = [torch.tensor([value]) for value in (seed, choice, position)]
        _words[(1,)](words, *args, first, BLOCK=64)
        token = torch.arange(first, first + 64)
        wide = [(value & 0xFFFFFFFF).expand(64) for value in args[:0:-1]]
        position_64, choice_64 = wide[0], wide[1]
        all_words = torch.stack(philox((token // 4, position_64, choice_64, token * 0), args[0].expand(64)))
        assert torch.equal(words, all_words[token % 4, torch.arange(64)])


def prepare(make_step, seed, vocab, dtype, params):
    """A random step whose rows have `params` in turn, its drafts, and logits with a stride and some equal values."""
    step = make_step(seed, vocab=vocab, batch=4)
    state, generator = step.state, torch.Generator().manual_seed(seed)
    for row in range(state.num_rows):
        p = params[row % len(params)]
        state.temperature_R[row], state.top_p_R[row] = p.temperature, p.top_p
        state.top_k_R[row], state.min_p_R[row] = p.top_k, p.min_p
    drafts = step.drafts()
    draft(step.rows_B, step.count_B, step.trees, state, drafts)
    logits = torch.randn(step.num_flat, vocab + 24, generator=generator) * 3
    logits[::3] = logits[::3].mul(2).round().div(2)  # ties, and zeros of both signs
    return step, drafts, logits.to(dtype)[:, 8 : 8 + vocab]


def sampled(logits, drafts, state, splits, greedy=False):
    cuts = Cuts.empty(drafts.num_nodes, CPU)
    cuts.value_M.fill_(float("nan"))
    find_cuts(logits, drafts, state, cuts)
    best = torch.full((drafts.num_nodes, splits), -1)
    sample(logits, drafts, state, cuts, best, greedy=greedy)
    tokens = torch.full((drafts.num_nodes,), -1)
    reduce_samples(best, tokens)
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < logits.shape[1]
    return tokens, cuts


def masked(logits, drafts, state):
    """Stop ids at -inf where the token drawn may not end the reply, node by node."""
    logits = logits.float().clone()
    for m, row in enumerate(drafts.row_M.tolist()):
        depth = int(drafts.position_M[m] - state.length_R[row])
        if state.num_output_R[row] + depth < state.min_tokens_R[row]:
            stops = [token for token in state.stop_ids_RE[row].tolist() if 0 <= token < logits.shape[1]]
            logits[m, stops] = float("-inf")
    return logits


def batch_of(state, rows):
    return SamplingBatch(
        temperature=state.temperature_R[rows],
        top_p=state.top_p_R[rows],
        top_k=state.top_k_R[rows].long(),
        min_p=state.min_p_R[rows],
        seed=state.seed_R[rows],
        choice=state.choice_R[rows],
        exact=state.exact_R[rows] != 0,
        all_exact=False,
        all_greedy=False,
        any_restricted=True,
    )


def expected_tokens(logits, drafts, state):
    """SamplingBatch's tokens, every node a sequence of its own."""
    batch = batch_of(state, drafts.row_M.long())
    depth = torch.zeros(drafts.num_nodes, 1, dtype=torch.int64)
    return batch.sample(masked(logits, drafts, state)[:, None], drafts.position_M + 1, depth)[:, 0]


MIXTURES = {
    "greedy": [SamplingParams(temperature=0)],
    "drawn": [SamplingParams(temperature=t) for t in (1.0, 0.7, 1e-9, 3.0)],
    "mixed": [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=2),
        SamplingParams(temperature=0.8),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(temperature=0.9, top_p=0.8),
        SamplingParams(temperature=1.0, min_p=0.1),
        SamplingParams(temperature=1.5, top_k=17, top_p=0.6, min_p=0.02),
    ],
}


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize(
    ("seed", "vocab", "splits", "dtype"),
    [
        (0, 37, 1, torch.float32),
        (1, 1500, 2, torch.float16),
        (2, 4099, 3, torch.float32),
        (3, 4099, 5, torch.bfloat16),
    ],
)
def test_tokens_are_those_of_the_reference(make_step, mixture, seed, vocab, splits, dtype):
    step, drafts, logits = prepare(make_step, seed, vocab, dtype, MIXTURES[mixture])
    state = step.state
    tokens, _ = sampled(logits, drafts, state, splits)
    valid = drafts.valid_M.bool()
    assert int(valid.sum()) > 0
    assert torch.equal(tokens[valid], expected_tokens(logits, drafts, state)[valid])


def test_greedy_takes_the_argmax_of_drawn_rows_too(make_step):
    step, drafts, logits = prepare(make_step, 3, 200, torch.bfloat16, MIXTURES["drawn"])
    tokens, _ = sampled(logits, drafts, step.state, 1, greedy=True)
    valid = drafts.valid_M.bool()
    assert torch.equal(tokens[valid], masked(logits, drafts, step.state).argmax(-1)[valid])


def one_node_each(logits, params):
    """A step of single nodes, one a line of logits, with the lines' own parameters."""
    num = len(logits)
    state = RowState.empty(num + 1, 1, 1, 1, CPU)
    for row, p in enumerate(params):
        state.temperature_R[row], state.top_p_R[row] = p.temperature, p.top_p
        state.top_k_R[row], state.min_p_R[row], state.live_R[row] = p.top_k, p.min_p, 1
    drafts = Drafts.empty(num, num, CPU)
    drafts.row_M.copy_(torch.arange(num))
    drafts.valid_M.fill_(1)
    return drafts, state


def kept_tokens(logits, params):
    drafts, state = one_node_each(logits, params)
    cuts = Cuts.empty(len(logits), CPU)
    find_cuts(logits, drafts, state, cuts)
    return [line.nonzero().flatten().tolist() for line in distribution(logits, drafts, state, cuts).isfinite()]


@pytest.mark.parametrize("dtype", TYPES)
def test_kept_tokens_equal_a_sort(dtype):
    rng, generator = random.Random(5), torch.Generator().manual_seed(5)
    params = [
        SamplingParams(
            temperature=rng.choice([0.3, 1.0, 1.7]),
            top_k=rng.choice([0, 1, 3, 50, 1000]),
            top_p=rng.choice([1.0, 0.05, 0.5, 0.9, 0.999]),
            min_p=rng.choice([0.0, 0.02, 0.3, 1.0]),
        )
        for _ in range(16)
    ]
    logits = (torch.randn(16, 300, generator=generator) * 3).to(dtype)
    _, state = one_node_each(logits, params)
    expected = batch_of(state, torch.arange(16)).distribution(logits[:, None])[:, 0].isfinite()
    assert kept_tokens(logits, params) == [line.nonzero().flatten().tolist() for line in expected]


@pytest.mark.parametrize("dtype", TYPES)
def test_of_equal_logits_the_first_stay(dtype):
    def kept(values, **limits):
        return kept_tokens(torch.tensor([values], dtype=dtype), [SamplingParams(temperature=1.0, **limits)])[0]

    assert kept([1.0] * 8, top_k=3) == [0, 1, 2]
    assert kept([1.0] * 8, top_p=0.5) == [0, 1, 2, 3]
    assert kept([0.0, 2, 1, 1, 1, 2], top_k=4) == [1, 2, 3, 5]
    assert kept([0.0, -0.0, -1, 0.0, -0.0], top_k=2) == [0, 1]
    assert kept([0.0, -0.0, -1, 0.0, -0.0], top_k=3) == [0, 1, 3]
    assert kept([0.0, 5, 5, 5], top_k=3, top_p=0.4) == [1, 2]
    assert kept([0.0, 5, 5, 5], top_k=2, top_p=0.9) == [1, 2]
    assert kept([0.0, 5, 5, 5], min_p=1.0) == [1, 2, 3]
    assert kept([float("-inf"), 0.0, float("-inf")], top_k=2) == [1]
    assert kept([3.0], top_p=0.1) == [0]


def test_a_cut_of_a_large_vocabulary_crosses_blocks(make_step):
    logits = torch.zeros(2, 5000)
    logits[0, 4500], logits[1, 10] = 1.0, 1.0
    params = [SamplingParams(temperature=1.0, top_k=4200), SamplingParams(temperature=2.0, top_p=0.9)]
    kept = kept_tokens(logits, params)
    assert kept[0] == [*range(4199), 4500]
    _, state = one_node_each(logits, params)
    expected = batch_of(state, torch.arange(2)).distribution(logits[:, None])[:, 0].isfinite()
    assert abs(len(kept[1]) - int(expected[1].sum())) <= 1  # the sum of 5,000 shares rounds differently in a cumsum


def test_lines_without_any_allowed_token_still_give_one():
    logits = torch.full((3, 9), float("-inf"))
    logits[1] = float("nan")
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, top_p=0.5), SamplingParams()]
    drafts, state = one_node_each(logits, params)
    sampled(logits, drafts, state, 2)


@pytest.mark.parametrize("num_nodes", [1, 4, 64, 512])
@pytest.mark.parametrize("vocab_size", [37, 8192, 32_000, 151_936])
def test_no_split_is_empty(num_nodes, vocab_size):
    splits = num_splits(num_nodes, vocab_size)
    blocks = triton.cdiv(vocab_size, 1024)
    assert 1 <= splits <= blocks
    assert (splits - 1) * triton.cdiv(blocks, splits) < blocks
