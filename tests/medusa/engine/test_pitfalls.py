"""Faults that other implementations of tree decoding have had, each named: none of them is here."""

from __future__ import annotations

import pytest
import torch

from medusa import Engine, SamplingParams, TokenTree
from medusa.engine.kv_cache import PAGE_SIZE, TRASH_PAGE
from medusa.model import Backbone
from tests.medusa.engine.support import (
    NUM_HEADS,
    TREES,
    Choosing,
    Prepared,
    build_engine,
    checkpoint_of,
    greedy,
    hugging_face,
    load,
    random_prompts,
)

TREE = TREES[32]


@pytest.fixture
def prepared(tiny_llama):
    """Ragged prompts around a page's end, their plain replies, and an oracle that is right most of the time."""
    engine = build_engine(tiny_llama, max_batch_size=4)
    return Prepared(engine, random_prompts([6, 59, 25, 13], seed=40), greedy(max_tokens=20), rate=0.85)


def committed(engine, sequence, length):
    """The keys and values of a running sequence's first positions: [layers, 2, length, heads, size]."""
    pages = engine._cache.tables[sequence.row]
    pages = pages[: (length + PAGE_SIZE - 1) // PAGE_SIZE]
    return engine._cache.data[:, :, pages].flatten(2, 3)[:, :, :length].clone()


def test_accepted_keys_and_values_are_moved_together_in_order_in_all_layers(prepared):
    """Overlapping moves, several rows, drafts deeper than one (SGLang #26866): the cache is plain decoding's."""
    caches = []
    for tree in (None, TREE):
        prepared.engine.set_tree(tree)
        for prompt in prepared.prompts:
            prepared.engine.add(prompt, greedy(max_tokens=60))
        sequences = []
        while not sequences or min(len(s.output_ids) for s in sequences) < 20:
            prepared.engine.step()
            sequences = list(prepared.engine._scheduler.running)
        caches.append([committed(prepared.engine, s, len(s.prompt_ids) + 19) for s in sequences])
        moved = max(count for s in sequences for count in s.accepted_per_step)
        for sequence in sequences:
            prepared.engine.abort(sequence.request_id)
    assert moved > 2
    for plain, tree in zip(*caches, strict=True):
        torch.testing.assert_close(tree, plain, atol=2e-5, rtol=1e-4)


def test_a_nodes_position_is_its_depth_past_the_prefix_not_its_index(prepared, monkeypatch):
    seen = []
    forward = Backbone.tree_hidden_states

    def spy(self, input_ids, position_ids, tree):
        seen.append((position_ids, tree.length_B))
        return forward(self, input_ids, position_ids, tree)

    monkeypatch.setattr(Backbone, "tree_hidden_states", spy)
    prepared.decode(TREE)
    decodes = [(positions, lengths) for positions, lengths in seen if positions.shape[1] == TREE.num_nodes]
    assert len(decodes) > 3
    for positions, lengths in decodes:
        assert torch.equal(positions - lengths[:, None], torch.tensor(TREE.depth).expand_as(positions))


def test_the_next_guesses_are_made_on_the_last_accepted_node(prepared):
    """Not on the tree's last node (vLLM #17956): on the hidden state that plain decoding has at that position."""
    given = []

    def guess(hidden_Bd, *arguments):
        given.append(hidden_Bd)
        return prepared.oracle.guess(hidden_Bd, *arguments)

    prepared.engine.checkpoint.heads.guess = guess
    prepared.prompts, replies = prepared.prompts[1:2], []
    (completion,) = prepared.decode(TREE)
    text = [*completion.prompt_token_ids, *completion.token_ids]
    hidden_Td = prepared.engine.backbone.hidden_states(torch.tensor([text]))[0]
    position = len(completion.prompt_token_ids) - 1
    for hidden_Bd, kept in zip(given, [*completion.accepted_per_step, None], strict=True):
        replies.append(hidden_Bd[0])
        torch.testing.assert_close(hidden_Bd[0], hidden_Td[position], atol=1e-4, rtol=1e-4)
        if kept is None or position + kept >= len(text) - 1:
            break
        position += kept
    assert len(replies) > 3 and max(completion.accepted_per_step) > 2


def test_a_stop_inside_an_accepted_run_trims_tokens_text_logprobs_usage_acceptance_and_cache(prepared):
    """SGLang #23802, #33758; vLLM #47616, #56101."""
    engine = prepared.engine
    for position in range(2, 14):
        token = prepared.plain[1].token_ids[position]
        position = prepared.plain[1].token_ids.index(token)
        before = engine.stats().decode_tokens
        prompts = prepared.prompts[1:2]
        engine.set_tree(TREE)
        (completion,) = engine.generate(prompts, greedy(max_tokens=20, stop_token_ids=(token,), logprobs=0))
        assert completion.token_ids == prepared.plain[1].token_ids[: position + 1]
        assert completion.text == engine.tokenizer.decode(completion.token_ids[:-1])
        assert len(completion.logprobs) == position + 1
        assert sum(completion.accepted_per_step) == position == engine.stats().decode_tokens - before
        assert engine.stats().pages_used == 0


def test_a_stop_string_that_spans_steps_is_found(chat8m):
    """SGLang #33758, koboldcpp #1276: every cut of the text into steps, with drafts accepted on both sides."""
    engine = build_engine(chat8m, max_model_len=256)
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "Tell me about the sea."}])
    prepared = Prepared(engine, [prompt], greedy(max_tokens=30))
    text = prepared.plain[0].text
    for start in range(0, 60, 7):
        stop = text[start : start + 12]  # several tokens long
        (completion,) = prepared.decode(TREE, greedy(max_tokens=30, stop=(stop,)))
        assert completion.text == text[: text.index(stop)]


def test_max_tokens_is_not_overshot_by_an_accepted_run(prepared):
    """EAGLE's reference goes past it."""
    for max_tokens in range(1, 8):
        for completion, plain in zip(prepared.decode(TREE, greedy(max_tokens=max_tokens)), prepared.plain, strict=True):
            assert completion.token_ids == plain.token_ids[:max_tokens]


def test_min_tokens_forbids_the_end_at_each_depth_without_being_off_by_one(prepared, tiny_llama):
    """vLLM #41493; Hugging Face is the reference."""
    ends = [plain.token_ids[3] for plain in prepared.plain]
    for min_tokens in range(1, 9):
        expected = hugging_face(tiny_llama, prepared.prompts, 20, eos_token_id=ends, min_new_tokens=min_tokens)
        params = greedy(stop_token_ids=tuple(ends), min_tokens=min_tokens, max_tokens=20)
        assert [c.token_ids for c in prepared.decode(TREE, params)] == expected


def test_penalties_count_the_tokens_on_each_nodes_own_path(tiny_llama):
    """Not those of its siblings, and not only those before the tree (SGLang calls its own relaxed)."""
    params = greedy(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5, max_tokens=24)
    penalised = Prepared(build_engine(tiny_llama), random_prompts([6, 25], seed=41), params, rate=0.9)
    completions = penalised.decode(TREE)
    assert [c.token_ids for c in completions] == [c.token_ids for c in penalised.plain]
    assert max(count for c in completions for count in c.accepted_per_step) > 2


def test_a_tree_that_reaches_past_the_context_harms_no_other_sequence(prepared, tiny_llama):
    """The reference has no check: its last steps write tree_size slots past the end."""
    engine = build_engine(tiny_llama, max_batch_size=4, max_model_len=64)
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREES[64])
    completions = engine.generate(prepared.prompts, greedy(max_tokens=20))
    for completion, plain in zip(completions, prepared.plain, strict=True):
        assert completion.token_ids == plain.token_ids[: 64 - len(completion.prompt_token_ids)]
    assert len(completions[1].token_ids) == 5  # it was cut by the context


def test_padding_is_never_accepted_as_token_0(tiny_llama):
    """Where every true token is 0 and no guess is, nothing but the model's own token may come out of a step."""
    engine = build_engine(tiny_llama)
    prompts = random_prompts([6, 25, 9], seed=42)
    params = greedy(max_tokens=8, logit_bias={0: 1000.0})

    def guess(hidden_Bd, weight, width, cap, num_heads=None):
        return torch.arange(6, 6 + width).expand(len(hidden_Bd), num_heads or NUM_HEADS, width), torch.zeros(())

    engine.checkpoint.heads.guess = guess
    for prompt in prompts:
        engine.add(prompt, params)
    engine._loop.speculation = Choosing(lambda sequences: [TREES[1], TREES[64], TREES[4]])
    engine.step()
    for _ in range(5):  # ragged trees: the smaller ones are padded with token 0's id
        assert [output.token_ids for output in engine.step()] == [[0], [0], [0]]
    for sequence in list(engine._scheduler.running):
        engine.abort(sequence.request_id)
    engine.set_tree(TREES[1])  # and no guesses yet, so their rows hold zeros
    engine.add(prompts[0], params)
    engine.step()
    engine.set_tree(TREES[64])
    (output,) = engine.step()
    assert output.token_ids == [0]


def test_a_true_token_0_is_accepted_like_any_other(tiny_llama):
    engine = build_engine(tiny_llama)
    engine.checkpoint.heads.guess = lambda hidden, weight, width, cap, num_heads: (
        torch.arange(width).expand(len(hidden), num_heads, width),
        torch.zeros(()),
    )
    engine.set_tree(TREES[8])
    (completion,) = engine.generate(random_prompts([6]), greedy(max_tokens=13, logit_bias={0: 1000.0}))
    assert completion.token_ids == [0] * 13
    assert completion.accepted_per_step == [TREES[8].max_depth + 1] * (12 // (TREES[8].max_depth + 1))


def test_above_temperature_0_the_root_is_drawn_too(prepared):
    """The reference's default takes the root's argmax: the same text every time."""
    prepared.engine.set_tree(TREE)
    params = SamplingParams(max_tokens=3, temperature=1.0, n=16, seed=0, ignore_eos=True)
    completions = prepared.engine.generate(prepared.prompts[:1], params)
    for position in range(3):
        assert len({c.token_ids[position] for c in completions}) > 8


def test_a_request_does_not_depend_on_the_batch_beside_it(prepared):
    for tree in (TREES[1], TREE):
        prepared.engine.set_tree(tree)
        for prompt, plain in zip(prepared.prompts, prepared.plain, strict=True):
            crowd = random_prompts([40, 3, 11], seed=len(prompt))
            alone = prepared.engine.generate([prompt], greedy(max_tokens=20))[0]
            crowded = prepared.engine.generate([*crowd, prompt], greedy(max_tokens=20))[3]
            assert alone.token_ids == crowded.token_ids == plain.token_ids


def test_in_bfloat16_a_divergence_from_plain_decoding_is_a_near_tie(make_backbone_dir):
    """A step of several rows rounds otherwise than a step of one; in float32 the tokens are equal (test_exactness)."""
    path = make_backbone_dir("llama")
    backbone = Backbone.from_pretrained(path, dtype=torch.bfloat16, device="cpu")
    engine = Engine(backbone, load(path)[1], checkpoint_of(backbone), speculation="off")
    prepared = Prepared(engine, random_prompts([6, 19, 40, 11], seed=43), greedy(max_tokens=40, logprobs=2))
    completions = prepared.decode(TREE)
    assert max(count for c in completions for count in c.accepted_per_step) > 1
    for completion, plain in zip(completions, prepared.plain, strict=True):
        pairs = list(zip(completion.token_ids, plain.token_ids, strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if first is not None:
            (_, best), (_, second) = plain.logprobs[first].top
            assert best - second < 0.1


def test_changing_tree_sizes_with_the_load_changes_no_token(tiny_llama):
    """A policy that switches at every change of the batch (vLLM #49548)."""
    engine = build_engine(tiny_llama)
    prompts = random_prompts([6, 19, 40, 11, 3, 28], seed=44)
    params = [greedy(max_tokens=n) for n in (5, 40, 12, 26, 9, 18)]
    prepared = Prepared(engine, prompts, params)
    sizes = {1: TREES[64], 2: TREES[1], 3: TREES[8], 4: TREES[2]}
    engine._loop.speculation = Choosing(lambda sequences: [sizes[len(sequences)]] * len(sequences))
    completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in prepared.plain]
    assert max(count for c in completions for count in c.accepted_per_step) > 1


def test_nothing_leaks_over_many_requests(prepared):
    """Rows and pages come back however replies end (SGLang #26972), and the trash page belongs to nobody."""
    engine = prepared.engine
    engine.set_tree(TREE)
    for round_ in range(12):
        names = [
            engine.add(prompt, greedy(max_tokens=1 + (3 * i + round_) % 7))
            for i, prompt in enumerate(prepared.prompts * 2)
        ]
        for _ in range(2):
            engine.step()
        engine.abort(names[round_ % 8])
        while engine.has_unfinished():
            engine.step()
            owned = [page for pages in engine._cache._owned for page in pages]
            assert TRASH_PAGE not in owned and len(owned) == len(set(owned)) == engine.stats().pages_used
        assert engine.stats().pages_used == 0
    assert sorted(engine._scheduler._rows) == [0, 1, 2, 3]
    assert [c.token_ids for c in prepared.decode(TREE)] == [c.token_ids for c in prepared.plain]


def test_a_node_that_no_head_guessed_for_is_no_node(tiny_llama):
    """A tree of one level more than the heads that ran: its last level takes no part."""
    engine = build_engine(tiny_llama)
    prepared = Prepared(engine, random_prompts([6], seed=45), greedy(max_tokens=12), rate=1.0)
    shallow, deep = TokenTree.from_paths([(0,), (1,), (2,)]), TREES[64]
    engine.add(prepared.prompts[0], prepared.params)
    engine.set_tree(shallow)
    engine.step()
    engine.set_tree(deep)
    counts = [engine.step()[0].num_draft_accepted for _ in range(2)]
    assert counts[0] <= 1 < deep.max_depth
    engine.abort("request-1")
