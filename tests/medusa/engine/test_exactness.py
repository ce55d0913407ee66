"""Lossless: greedy replies are Hugging Face `generate`'s, seeded ones plain decoding's, whatever the tree and batch."""

from __future__ import annotations

import random

import pytest
import torch

from medusa import SamplingParams, TokenTree
from medusa.decoding import accept
from medusa.engine.runner import Runner
from medusa.noise import gumbel
from tests.medusa.engine.support import (
    SIZES,
    TREES,
    Choosing,
    Prepared,
    build_engine,
    greedy,
    hugging_face,
    install_oracle,
    load_reference,
    random_prompts,
)

WINDOW = 8  # shorter than the longer prompts and every reply
UNTIED = {"tie_word_embeddings": False}  # a tied random model often repeats its last token for ever
FAMILIES = {
    "llama": ("llama", {}),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma-multi-query": ("gemma", {"num_key_value_heads": 1} | UNTIED),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 1} | UNTIED,
    ),
    "gemma3-hybrid": (
        "gemma3_text",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]} | UNTIED,
    ),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "cohere": ("cohere", {}),
    "mixtral": ("mixtral", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", UNTIED),
}
CHAT_PROMPTS = [
    "What is the capital of France?",
    "Write a short poem about the sea and the moon.",
    "Explain in two sentences why the sky is blue.",
    "Give me three tips for learning a new language.",
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, make_backbone_dir):
    """A family's folder, ragged prompts, and what Hugging Face makes of them."""
    name, config = FAMILIES[request.param]
    path = make_backbone_dir(name, **config)
    prompts = random_prompts([5, 29, 13])
    replies = hugging_face(path, prompts, 24, eos_token_id=None)
    assert max(len(set(reply)) for reply in replies) >= 8  # not the same few tokens over and over
    return path, prompts, replies


def test_greedy_tokens_equal_hugging_faces_with_every_tree_size(family):
    path, prompts, expected = family
    engine = build_engine(path, max_batch_size=3, max_model_len=128)
    install_oracle(engine, [[*prompt, *reply] for prompt, reply in zip(prompts, expected, strict=True)])
    for size in SIZES:
        engine.set_tree(TREES[size])
        completions = engine.generate(prompts, greedy())
        assert [c.token_ids for c in completions] == expected, f"{size} nodes"
        counts = [count for c in completions for count in c.accepted_per_step]
        assert sum(counts) == 3 * 23  # the first token of a reply is the prefill's
        if size > 1:  # drafts were kept and refused, so the equality says something
            assert max(counts) > 1 and min(counts) == 1
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("size", [1, 16])
def test_a_request_joining_or_leaving_changes_no_other(tiny_llama, size):
    prompts = random_prompts([3, 17, 9, 40, 5, 26], seed=1)
    lengths = [30, 6, 18, 11, 25, 14]
    expected = [hugging_face(tiny_llama, [p], n, eos_token_id=None)[0] for p, n in zip(prompts, lengths, strict=True)]
    engine = build_engine(tiny_llama, max_batch_size=3)
    install_oracle(engine, [[*prompt, *reply] for prompt, reply in zip(prompts, expected, strict=True)])
    engine.set_tree(TREES[size])
    batches, replies = set(), {}
    pending = list(range(6))
    while pending or engine.has_unfinished():
        if pending and (engine.stats().steps % 3 == 0):  # one more every third step; the batch holds three
            i = pending.pop(0)
            engine.add(prompts[i], greedy(max_tokens=lengths[i]), request_id=str(i))
        outputs = engine.step()
        batches.add(engine.stats().running)
        for output in outputs:
            replies.setdefault(int(output.request_id), []).extend(output.token_ids)
    assert replies == dict(enumerate(expected))
    assert {1, 2, 3} <= batches


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_and_batches_stay_exact(tiny_llama, seed):
    """Trees that no growth would give: gaps in ranks, lone deep branches."""
    rng = random.Random(seed)
    prompts = random_prompts([rng.randrange(1, 70) for _ in range(5)], seed=seed)
    plain = Prepared(build_engine(tiny_llama, max_batch_size=4), prompts, greedy(max_tokens=20), seed=seed)
    assert [c.token_ids for c in plain.plain] == hugging_face(tiny_llama, prompts, 20, eos_token_id=None)
    paths = [()]
    while len(paths) < rng.randrange(5, 40):
        child = (*rng.choice([path for path in paths if len(path) < 4]), rng.randrange(4))
        paths += [child] * (child not in paths)
    completions = plain.decode(TokenTree.from_paths(paths))
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain.plain]
    assert max(count for c in completions for count in c.accepted_per_step) > 1


def test_rows_of_one_batch_may_carry_different_trees(tiny_llama):
    """Every sequence of a step has a tree of its own; the padding of the smaller ones takes no part."""
    prompts = random_prompts([4, 21, 11, 33], seed=2)
    plain = Prepared(build_engine(tiny_llama), prompts, greedy())
    trees = [TREES[1], TREES[8], TREES[64], TREES[2]]
    by_prompt = {tuple(prompt): tree for prompt, tree in zip(prompts, trees, strict=True)}
    choose = Choosing(lambda sequences: [by_prompt[tuple(s.prompt_ids)] for s in sequences])
    plain.engine._loop.speculation = choose
    completions = plain.engine.generate(prompts, greedy())
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain.plain]
    assert max(completions[2].accepted_per_step) > 2
    assert set(completions[0].accepted_per_step) == {1}


@pytest.mark.parametrize("size", SIZES)
def test_a_perfect_oracle_is_accepted_to_the_end_of_its_path(tiny_llama, size):
    """Every step keeps the deepest path: wrong hidden states, positions or cache rows would lose some of it."""
    prompts = random_prompts([7, 30], seed=3)
    plain = Prepared(build_engine(tiny_llama), prompts, greedy(max_tokens=41))
    width = 10
    truth = {}
    for completion in plain.plain:
        text = [*completion.prompt_token_ids, *completion.token_ids]
        truth |= {tuple(text[: i + 1]): text[i + 2 : i + 6] for i in range(len(text) - 5)}
    texts = list(truth)
    hidden = torch.stack([plain.engine.backbone.hidden_states(torch.tensor([t]))[0, -1] for t in texts])

    def guess(hidden_Bd, weight, asked, cap, num_heads=None):
        rows = [truth[texts[i]] for i in torch.cdist(hidden_Bd, hidden).argmin(-1).tolist()]
        ids = [[[token, *(t for t in range(6, 6 + width) if t != token)][:asked] for token in row] for row in rows]
        return torch.tensor(ids)[:, :num_heads], torch.zeros(())

    plain.engine.checkpoint.heads.guess = guess
    depth = max(len(path) for path in TREES[size].paths if not any(path))  # of the path of best guesses
    for completion, expected in zip(plain.decode(TREES[size]), plain.plain, strict=True):
        assert completion.token_ids == expected.token_ids
        whole = [count for count in completion.accepted_per_step if count == depth + 1]
        assert len(whole) >= (40 - 5) // (depth + 1)


@pytest.mark.parametrize("vocabulary", ["own", "shared", "truncated"])
def test_real_heads_of_every_vocabulary_stay_exact(tiny_llama, vocabulary):
    """Random heads, not an oracle: the engine's own use of `MedusaHeads.guess`."""
    prompts = random_prompts([5, 29], seed=4)
    engine = build_engine(tiny_llama, vocabulary=vocabulary)
    with torch.no_grad():
        for parameter in engine.checkpoint.heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    expected = hugging_face(tiny_llama, prompts, 24, eos_token_id=None)
    for size in (4, 32):
        engine.set_tree(TREES[size])
        assert [c.token_ids for c in engine.generate(prompts, greedy())] == expected


def test_chat_8m_answers_real_prompts_as_hugging_face_does(chat8m):
    engine = build_engine(chat8m, max_model_len=512)
    prompts = [engine.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in CHAT_PROMPTS]
    expected = hugging_face(chat8m, prompts, 40)
    install_oracle(engine, [[*prompt, *reply] for prompt, reply in zip(prompts, expected, strict=True)])
    for size in (1, 2, 8, 64):
        engine.set_tree(TREES[size])
        completions = engine.generate(prompts, SamplingParams(max_tokens=40, temperature=0.0))
        assert [c.token_ids for c in completions] == expected, f"{size} nodes"
        for completion in completions:
            ended = completion.token_ids[-1] in engine.tokenizer.eos_token_ids
            assert completion.finish_reason == ("stop" if ended else "length")
        assert size == 1 or max(count for c in completions for count in c.accepted_per_step) > 1


SAMPLED = {
    "hot": {"temperature": 1.0},
    "cool": {"temperature": 0.6},
    "top-p": {"temperature": 0.9, "top_p": 0.8},
    "top-k": {"temperature": 1.2, "top_k": 8},
    "min-p": {"temperature": 1.0, "min_p": 0.05},
    "all": {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", SAMPLED)
def test_seeded_tokens_are_the_same_with_and_without_speculation(tiny_llama, name):
    prompts = random_prompts([4, 30, 12], seed=5)
    params = [
        SamplingParams(max_tokens=20, ignore_eos=True, seed=seed, n=2, **SAMPLED[name]) for seed in (11, -5, 2**62)
    ]
    plain = Prepared(build_engine(tiny_llama, max_batch_size=6), prompts, params)
    for size in (2, 8, 64):
        completions = plain.decode(TREES[size])
        assert [c.token_ids for c in completions] == [c.token_ids for c in plain.plain]
        assert [c.seed for c in completions] == [11, 11, -5, -5, 2**62, 2**62]
    assert max(count for c in completions for count in c.accepted_per_step) > 1
    assert len({tuple(c.token_ids) for c in completions}) == 6  # the n of a prompt differ


@pytest.mark.parametrize("size", [1, 8])
def test_seeded_tokens_are_the_same_alone_and_in_a_batch(tiny_llama, size):
    prompts = random_prompts([4, 30, 12, 22], seed=6)
    params = [SamplingParams(max_tokens=16, ignore_eos=True, seed=i, temperature=0.5 + i / 4) for i in range(4)]
    plain = Prepared(build_engine(tiny_llama), prompts, params)
    together = plain.decode(TREES[size])
    alone = [plain.engine.generate([prompt], p)[0] for prompt, p in zip(prompts, params, strict=True)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone] == [c.token_ids for c in plain.plain]
    mixed = [*params[:3], greedy(max_tokens=16)]  # a greedy row beside sampled ones
    assert [c.token_ids for c in plain.decode(TREES[size], mixed)][:3] == [c.token_ids for c in alone][:3]


@pytest.mark.parametrize("size", [1, 16])
def test_each_token_is_drawn_with_the_noise_of_its_absolute_position(tiny_llama, size):
    """From Hugging Face's logits: seed, choice and position alone decide, the prefill's token included."""
    prompts = random_prompts([4, 30], seed=8)
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=77, temperature=0.8, n=2)
    drawn = Prepared(build_engine(tiny_llama), prompts, params)
    for completion in drawn.decode(TREES[size]):
        text, start = [*completion.prompt_token_ids, *completion.token_ids], len(completion.prompt_token_ids)
        logits_TV = load_reference(tiny_llama)(torch.tensor([text])).logits[0, start - 1 : -1].detach()
        position_T = torch.arange(start, len(text))
        seed_T, choice_T = torch.full_like(position_T, 77), torch.full_like(position_T, completion.index)
        noise_TV = gumbel(seed_T, choice_T, position_T, logits_TV.shape[-1])
        assert completion.token_ids == (logits_TV / 0.8 + noise_TV).argmax(-1).tolist()


def test_another_seed_gives_another_reply_and_an_unseeded_one_can_be_repeated(tiny_llama):
    engine = build_engine(tiny_llama)
    prompt = random_prompts([6])
    first, second = (engine.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True))[0] for _ in range(2))
    assert first.token_ids != second.token_ids
    again = engine.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=first.seed))[0]
    assert again.token_ids == first.token_ids


DRAWS, TEMPERATURE = 3000, 0.25
WIDE = TokenTree.from_paths([(a,) for a in range(8)] + [(a, b) for a in range(8) for b in range(3)])


@pytest.fixture(scope="module")
def law(make_backbone_dir):
    """Text so far -> the model's probabilities of the next token [V], for likely texts of up to two tokens."""
    model, prompt = load_reference(make_backbone_dir("llama", seed=3)), random_prompts([9], seed=7)[0]
    probabilities, texts = {}, [()]
    for _ in range(3):
        logits = torch.cat([model(torch.tensor([[*prompt, *text]])).logits[:, -1].detach() for text in texts])
        rows = (logits / TEMPERATURE).softmax(-1)
        probabilities |= dict(zip(texts, rows, strict=True))
        texts = [
            (*text, token) for text, row in zip(texts, rows, strict=True) for token in row.topk(8).indices.tolist()
        ]
    return probabilities


@pytest.fixture
def drafting_engine(make_backbone_dir, law):
    """The engine, and its prompt's oracle of likely tokens: wide trees of them are often accepted."""
    engine = build_engine(make_backbone_dir("llama", seed=3), max_batch_size=250, max_model_len=64)
    second = sum(law[()][token] * law[token,] for (token, *rest) in law_texts(law, 1))
    third = sum(law[()][a] * law[a,][b] * law[a, b] for a, b in law_texts(law, 2))
    guesses_KS = torch.stack([second.topk(10).indices, third.topk(10).indices])

    def guess(hidden_Bd, weight, width, cap, num_heads=None):
        return guesses_KS[:num_heads, :width].expand(len(hidden_Bd), -1, -1), torch.zeros(())

    engine.checkpoint.heads.guess = guess
    engine.set_tree(WIDE)
    return engine


def law_texts(law, length):
    return [text for text in law if len(text) == length]


def drawn_triples(engine):
    """The first three tokens of many seeds' replies: the prefill's and those of one or two decode steps."""
    prompt = random_prompts([9], seed=7)[0]
    params = [
        SamplingParams(max_tokens=3, ignore_eos=True, seed=seed, temperature=TEMPERATURE) for seed in range(DRAWS)
    ]
    completions = engine.generate([prompt] * DRAWS, params)
    depths = [c.accepted_per_step[0] for c in completions]
    assert depths.count(2) > DRAWS / 5  # the first draft was kept often enough to show a fault
    return [tuple(c.token_ids) for c in completions]


def fits(triples, law):
    """Pearson's chi-square of the second and third token, given the first, at the 0.1 % level (Wilson and Hilferty)."""
    means = {}
    for first in {triple[0] for triple in triples} & {text[0] for text in law_texts(law, 1)}:
        count = sum(triple[0] == first for triple in triples)
        for a, second in law_texts(law, 2):
            if a == first:
                likely = law[a, second].topk(8)
                for third, p in zip(likely.indices.tolist(), likely.values.tolist(), strict=True):
                    means[first, second, third] = count * float(law[first,][second]) * p
    means = {cell: mean for cell, mean in means.items() if mean >= 5}
    seen = {cell: triples.count(cell) for cell in means}
    rest = len(triples) - sum(means.values())
    statistic = sum((seen[cell] - mean) ** 2 / mean for cell, mean in means.items())
    statistic += (len(triples) - sum(seen.values()) - rest) ** 2 / rest
    degrees = len(means)
    spread = 2 / (9 * degrees)
    return statistic < degrees * (1 - spread + 3.09 * spread**0.5) ** 3


def test_draws_of_a_tree_follow_the_models_own_distribution(drafting_engine, law):
    assert fits(drawn_triples(drafting_engine), law)


def test_the_same_test_fails_an_engine_that_draws_once_a_path(drafting_engine, law, monkeypatch):
    """The fault of drawing anew for every path and keeping the longest match, put into this engine."""
    generator = torch.Generator().manual_seed(0)

    def accept_per_path(self, batch, tree, tokens_BN, logits_BNV, position_B):
        samples_BN = batch.sampling.sample(logits_BNV, position_B, tree.depth_BN)
        law_BNV = batch.sampling.distribution(logits_BNV).softmax(-1)
        at_parent_BNV = law_BNV.gather(1, tree.parent_BN[..., None].expand_as(law_BNV))
        own_draws = torch.multinomial(at_parent_BNV.flatten(0, 1), 1, generator=generator).view_as(tokens_BN)
        kept_BN = (own_draws == tokens_BN) | (tree.depth_BN == 0)
        return accept(tree, kept_BN, samples_BN, torch.zeros(kept_BN.shape))

    monkeypatch.setattr(Runner, "_accept", accept_per_path)
    assert not fits(drawn_triples(drafting_engine), law)
