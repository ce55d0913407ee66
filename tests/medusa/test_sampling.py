"""Sampling parameters and their effect: equal to a slow reference, and to Hugging Face where the definitions agree."""

from __future__ import annotations

import math
import random

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from medusa import Engine
from medusa.checkpoint import BackboneRef, Checkpoint, CheckpointMeta
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.noise import gumbel
from medusa.sampling import SamplingBatch, SamplingParams, forbid_end, penalise
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree

VOCAB = 23
INF = float("inf")


def stack(params, seeds=None, choices=None):
    seeds = seeds or [100 + i for i in range(len(params))]
    return SamplingBatch.stack(params, seeds, choices or [0] * len(params), torch.device("cpu"))


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def slow_distribution(logits, params):
    """One row, token by token: temperature, then min-p, then top-k, then top-p over what is left."""
    if params.temperature > 0:
        logits = [logit / params.temperature for logit in logits]
    best = max(logits)
    kept = [t for t in range(len(logits)) if math.exp(logits[t] - best) >= params.min_p]
    kept = sorted(kept, key=lambda t: -logits[t])[: params.top_k or None]
    total = sum(math.exp(logits[t] - best) for t in kept)
    nucleus, mass = [], 0.0
    for t in kept:
        if nucleus and params.top_p < 1 and mass >= params.top_p:
            break
        nucleus.append(t)
        mass += math.exp(logits[t] - best) / total
    return [logits[t] if t in nucleus else -INF for t in range(len(logits))]


def random_params(rng):
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 3, 10, 100]),
        top_p=rng.choice([1.0, 0.05, 0.5, 0.9]),
        min_p=rng.choice([0.0, 0.02, 0.3, 1.0]),
    )


def test_a_batch_of_every_mixture_equals_the_slow_reference():
    rng = random.Random(0)
    params = [random_params(rng) for _ in range(200)]
    logits = random_logits(len(params), 2, VOCAB)
    drawn_from = stack(params).distribution(logits)
    for b, row_params in enumerate(params):
        for n in range(2):
            expected = slow_distribution(logits[b, n].tolist(), row_params)
            assert drawn_from[b, n].tolist() == pytest.approx(expected, abs=1e-4), row_params


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 4}, [TopKLogitsWarper(4)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.4, "top_k": 6, "top_p": 0.9},
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(6), TopPLogitsWarper(0.9)],
        ),
        ({"temperature": 0.5, "min_p": 0.05}, [TemperatureLogitsWarper(0.5), MinPLogitsWarper(0.05)]),
    ],
)
def test_distribution_equals_hugging_faces_warpers(params, warpers):
    logits = random_logits(50, VOCAB, seed=4)
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    ours = stack([SamplingParams(**params)] * 50).distribution(logits[:, None])[:, 0]
    torch.testing.assert_close(ours, expected)


def test_exactly_top_k_tokens_stay_where_logits_are_equal_the_first_ones():
    kept = stack([SamplingParams(top_k=3)]).distribution(torch.zeros(1, 1, VOCAB))
    assert (kept > -INF).flatten().nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_a_large_vocabulary_is_restricted_as_if_it_were_sorted_whole(spread, decimals):
    """Flat rows and peaked ones, with many equal logits: sorting only the best tokens must not show."""
    vocab = 1500
    cases = [(top_k, top_p) for top_k in (0, 1, 63, 64, 65, 511, 600, 5000) for top_p in (1.0, 0.999, 0.9, 0.3)]
    params = [SamplingParams(top_k=top_k, top_p=top_p) for top_k, top_p in cases]
    logits = (random_logits(len(cases), 1, vocab, seed=5) * spread).round(decimals=decimals)
    kept = (stack(params).distribution(logits) > -INF).squeeze(1)
    for b, (top_k, top_p) in enumerate(cases):
        order = sorted(range(vocab), key=lambda t: (-float(logits[b, 0, t]), t))[: top_k or vocab]
        share = logits[b, 0, order].double().softmax(-1)
        before = share.cumsum(-1) - share
        sure = [t for t, mass in zip(order, before.tolist(), strict=True) if mass < top_p - 1e-5 or top_p == 1]
        possible = [t for t, mass in zip(order, before.tolist(), strict=True) if mass < top_p + 1e-5 or top_p == 1]
        found = kept[b].nonzero().flatten().tolist()
        assert set(sure) <= set(found) <= set(possible), (top_k, top_p)
        assert set(found) == set(order[: len(found)])  # the first of equals


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    """Four equally likely tokens: two of them reach 0.5 exactly, and three are needed for a little more."""
    kept = stack([SamplingParams(top_p=0.5), SamplingParams(top_p=0.51)]).distribution(torch.zeros(2, 1, 4))
    assert (kept > -INF).sum(-1).flatten().tolist() == [2, 3]


def test_the_most_likely_token_always_stays():
    settings = [{"top_p": 1e-6}, {"top_p": 1e-60}, {"min_p": 1.0}, {"top_k": 1}]
    logits = random_logits(4, 4, VOCAB)
    kept = stack([SamplingParams(**changes) for changes in settings]).distribution(logits)
    assert torch.equal((kept > -INF).sum(-1), torch.ones(4, 4, dtype=torch.int64))
    assert torch.equal(kept.argmax(-1), logits.argmax(-1))


def test_tokens_masked_beforehand_stay_masked():
    logits = random_logits(1, 1, VOCAB)
    logits[..., 5:] = -INF
    kept = stack([SamplingParams(top_k=10, top_p=0.999, min_p=1e-9)]).distribution(logits)
    assert (kept[..., 5:] == -INF).all()
    assert (kept[..., :5] > -INF).any()


def test_greedy_rows_of_a_mixed_batch_take_the_argmax_and_the_others_draw():
    params = [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0)]
    logits = random_logits(1, 1, VOCAB).expand(2, 300, VOCAB)
    depth = torch.arange(300).expand(2, -1)
    tokens = stack(params).sample(logits, torch.tensor([5, 5]), depth)
    assert (tokens[0] == logits[0, 0].argmax()).all()
    assert len(set(tokens[1].tolist())) > 3


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-40, 1e-60])
def test_the_smallest_temperatures_draw_the_argmax(temperature):
    logits = random_logits(1, 200, VOCAB)
    tokens = stack([SamplingParams(temperature=temperature)]).sample(logits, torch.tensor([0]), torch.arange(200)[None])
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_draw_is_the_largest_of_logits_plus_noise_of_its_absolute_position():
    logits, depth = random_logits(2, 4, VOCAB), torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3]])
    params = [SamplingParams(temperature=0.8), SamplingParams(top_k=5)]
    batch = stack(params, seeds=[11, -12], choices=[0, 3])
    tokens = batch.sample(logits, torch.tensor([30, 70]), depth)
    for b, (seed, choice, position) in enumerate([(11, 0, 30), (-12, 3, 70)]):
        for n in range(4):
            noise = gumbel(torch.tensor(seed), torch.tensor(choice), torch.tensor(position + int(depth[b, n])), VOCAB)
            row = torch.tensor(slow_distribution(logits[b, n].tolist(), params[b]))
            assert tokens[b, n] == (row + noise).argmax()


def test_a_draw_depends_on_neither_batch_nor_tree():
    """The token after an equal prefix is the same whether its node is a root, deep in a tree, or beside other rows."""
    params = SamplingParams(temperature=1.0, top_p=0.95)
    logits = random_logits(1, 1, VOCAB)
    alone = stack([params], seeds=[42]).sample(logits, torch.tensor([17]), torch.zeros(1, 1, dtype=torch.int64))
    deep = stack([params], seeds=[42]).sample(logits, torch.tensor([14]), torch.full((1, 1), 3))
    others = [SamplingParams(temperature=0.0), params, SamplingParams(top_k=2)]
    batched = stack(others, seeds=[1, 42, 3]).sample(
        logits.expand(3, 2, VOCAB), torch.tensor([4, 16, 90]), torch.tensor([[0, 1]] * 3)
    )
    assert alone[0, 0] == deep[0, 0] == batched[1, 1]


def test_draws_follow_the_restricted_distribution():
    params = SamplingParams(temperature=0.9, top_k=6, top_p=0.92)
    logits = random_logits(1, 1, VOCAB, seed=8)
    law = torch.tensor(slow_distribution(logits[0, 0].tolist(), params)).softmax(-1)
    draws = 20_000
    tokens = stack([params], seeds=[3]).sample(
        logits.expand(1, draws, VOCAB), torch.tensor([0]), torch.arange(draws)[None]
    )
    counts = tokens.flatten().bincount(minlength=VOCAB).float()
    assert (counts[law == 0] == 0).all()
    expected = (law * draws)[law > 0]
    chi_square = float(((counts[law > 0] - expected) ** 2 / expected).sum())
    assert chi_square < 20.5  # at most 5 degrees of freedom, 0.1 % level


def path_tokens(tree, tokens, node):
    """The drafts on the way to a node, without the root."""
    return [tokens[i] for i in tree.ancestors[node].nonzero().flatten().tolist() if i > 0]


def plain_penalties(logits, params, prompt, output):
    """The documented formula on one row with its whole text."""
    logits = [logit + params.logit_bias.get(token, 0.0) for token, logit in enumerate(logits)]
    for token in range(len(logits)):
        count = output.count(token)
        if count or token in prompt:
            if logits[token] > 0:
                logits[token] /= params.repetition_penalty
            else:
                logits[token] *= params.repetition_penalty
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    return logits


PENALTIES = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"logit_bias": {3: 5.0, 7: -100.0}},
    {
        "repetition_penalty": 0.8,
        "presence_penalty": -0.5,
        "frequency_penalty": -0.2,
        "logit_bias": {1: 1.5, 22: -2.0},
    },
]
TREE = TokenTree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1)])


@pytest.mark.parametrize("settings", PENALTIES)
def test_each_node_is_penalised_for_the_tokens_on_its_own_path(settings):
    rng = random.Random(1)
    params = SamplingParams(**settings)
    prompt, output = [1, 2, 2, 3], [4, 5, 5, 9]
    tokens = [output[-1], *(rng.choice([2, 4, 5, 9, 11, 12]) for _ in range(TREE.num_nodes - 1))]
    logits = random_logits(TREE.num_nodes, VOCAB, seed=2)
    before = logits.clone()
    penalised = penalise(logits, params, prompt, output, torch.tensor(tokens), TREE.ancestors)
    for node in range(TREE.num_nodes):
        text = output + path_tokens(TREE, tokens, node)
        expected = plain_penalties(logits[node].tolist(), params, prompt, text)
        assert penalised[node].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(logits, before)


def test_penalties_of_the_first_token_count_the_prompt_only():
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0)
    logits, prompt = random_logits(1, VOCAB), [1, 1, 2]
    penalised = penalise(logits, params, prompt, [], torch.tensor([1]), TokenTree.root().ancestors)
    expected = plain_penalties(logits[0].tolist(), params, prompt, [])
    assert penalised[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_repetition_penalty_equals_hugging_faces():
    prompt, output = [1, 2, 3], [4, 4, 5]
    logits = random_logits(1, VOCAB)
    ours = penalise(
        logits, SamplingParams(repetition_penalty=1.2), prompt, output, torch.tensor([5]), TokenTree.root().ancestors
    )
    theirs = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([prompt + output]), logits.clone())
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stop_ids", [[], [3], [0, 5, VOCAB - 1]])
@pytest.mark.parametrize("num_tokens", [0, 2, 3, 4])
def test_an_end_is_forbidden_on_nodes_whose_draw_comes_before_min_tokens(stop_ids, num_tokens):
    """Of at least four tokens: the fourth, drawn after three others, may be the end of a reply only as its last."""
    logits_NV, depth_N = random_logits(5, VOCAB), torch.tensor([0, 1, 1, 2, 3])
    before = logits_NV.clone()
    barred = forbid_end(logits_NV, stop_ids, num_tokens, 4, depth_N)
    for node, depth in enumerate(depth_N.tolist()):
        for token in range(VOCAB):
            early = token in stop_ids and num_tokens + depth < 4
            assert float(barred[node, token]) == (-INF if early else float(logits_NV[node, token]))
    assert torch.equal(logits_NV, before)


def test_stop_tokens_are_barred_until_min_tokens_at_every_depth_of_the_tree(tiny_llama):
    """Greedy replies of a model whose stop tokens are what it likes best, by hand and by the engine."""
    backbone, tokenizer = Backbone.from_pretrained(tiny_llama, device="cpu"), ChatTokenizer.from_pretrained(tiny_llama)
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=3)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    ref = BackboneRef(name=backbone.name, weights_digest=backbone.digest)
    engine = Engine(
        backbone, tokenizer, Checkpoint(heads, CheckpointMeta(heads=config, backbone=ref)), speculation="off"
    )
    prompt = tokenizer.encode("How many foxes")
    (free,) = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
    stop_ids = set(free.token_ids[:3])
    for min_tokens in (1, 2, 5, 6, 7, 8):
        expected = greedy_with_stops(backbone, prompt, stop_ids | tokenizer.eos_token_ids, min_tokens, 20)
        params = SamplingParams(
            max_tokens=20, min_tokens=min_tokens, temperature=0.0, stop_token_ids=tuple(sorted(stop_ids))
        )
        for tree in (None, TokenTree.from_paths([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])):
            engine.set_tree(tree)
            (completion,) = engine.generate([prompt], params)
            assert completion.token_ids == expected
            assert len(expected) > min_tokens


def greedy_with_stops(backbone, prompt, stop_ids, min_tokens, max_tokens):
    output = []
    while len(output) < max_tokens and not (output and output[-1] in stop_ids):
        logits = backbone.logits(backbone.hidden_states(torch.tensor([prompt + output]))[0, -1])
        if len(output) < min_tokens:
            logits[sorted(stop_ids)] = -INF
        output.append(int(logits.argmax()))
    return output


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("max_tokens", 0, "1 to 2147483647"),
        ("max_tokens", 2**31, "1 to 2147483647"),
        ("min_tokens", -1, "0 to max_tokens"),
        ("min_tokens", 129, "0 to max_tokens"),
        ("acceptance", "typical", "'exact', or None for the engine's own"),
        ("temperature", -0.5, "0 (greedy) to 1e+06"),
        ("temperature", 1e308, "0 (greedy) to 1e+06"),
        ("temperature", INF, "0 (greedy) to 1e+06"),
        ("temperature", float("nan"), "0 (greedy) to 1e+06"),
        ("top_p", 0.0, "above 0, at most 1"),
        ("top_p", 1.01, "above 0, at most 1"),
        ("top_k", -1, "0 (all tokens) to 2147483647"),
        ("top_k", 2**31, "0 (all tokens) to 2147483647"),
        ("min_p", -0.1, "0 to 1"),
        ("min_p", 1.1, "0 to 1"),
        ("seed", 2**63, "a 64-bit integer"),
        ("seed", -(2**63) - 1, "a 64-bit integer"),
        ("stop", ("",), "several strings, none empty"),
        ("stop", "</s>", "several strings, none empty"),
        ("logit_bias", {3: float("nan")}, "finite numbers by token id"),
        ("logit_bias", {3: 1.0, 4: -INF}, "finite numbers by token id"),
        ("repetition_penalty", 0.0, "above 0"),
        ("presence_penalty", 2.1, "-2 to 2"),
        ("frequency_penalty", -2.1, "-2 to 2"),
        ("logprobs", -1, "None, 0 or more"),
        ("n", 0, "at least 1"),
    ],
)
def test_values_out_of_range_are_refused_with_what_came_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as error:
        SamplingParams(**{name: value})
    assert str(error.value) == f"{name} must be {allowed}, got {value!r}"


def test_the_ends_of_every_range_are_allowed():
    SamplingParams(max_tokens=1, min_tokens=1, temperature=0.0, top_p=1.0, top_k=0, min_p=1.0, seed=-(2**63))
    SamplingParams(min_tokens=128, seed=2**63 - 1, presence_penalty=-2, frequency_penalty=2, logprobs=0, n=1)


def test_only_real_penalties_count_as_penalties():
    assert not SamplingParams(logit_bias={1: 1.0}).has_penalties
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert SamplingParams(**{name: 0.5}).has_penalties
