"""The engine's contract beside exact tokens: how replies end, stream, wait and are refused, with and without a tree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from medusa import Engine, SamplingParams, TokenTree, Typical
from medusa.checkpoint import CheckpointMismatchError, save_checkpoint
from tests.medusa.engine.support import (
    TREES,
    Prepared,
    build_engine,
    checkpoint_of,
    gigabytes,
    greedy,
    hugging_face,
    load,
    load_reference,
    random_prompts,
)

LENGTH = 24
TREE = TREES[16]


@pytest.fixture(scope="module")
def prepared(tiny_llama):
    """Three ragged prompts, their plain greedy replies of 24 tokens, and an oracle that knows them."""
    engine = build_engine(tiny_llama, max_batch_size=4)
    return Prepared(engine, random_prompts([6, 25, 13], seed=20), greedy(max_tokens=LENGTH, logprobs=2), rate=0.8)


@pytest.fixture
def engine(prepared):
    prepared.engine.set_tree(TREE)
    yield prepared.engine
    assert not prepared.engine.has_unfinished()
    assert prepared.engine.stats().pages_used == 0


def assert_same(completions, plain):
    """Equal replies, and counts that add up, whatever the trees were."""
    for completion, expected in zip(completions, plain, strict=True):
        assert completion.token_ids == expected.token_ids
        assert (completion.text, completion.finish_reason) == (expected.text, expected.finish_reason)
        assert sum(completion.accepted_per_step) == len(completion.token_ids) - 1
        assert min(completion.accepted_per_step, default=1) >= 1
        if expected.logprobs is not None:
            assert [l.token_id for l in completion.logprobs] == completion.token_ids
            for got, wanted in zip(completion.logprobs, expected.logprobs, strict=True):
                assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert [token for token, _ in got.top] == [token for token, _ in wanted.top]


def both(prepared, params):
    """The replies of the same request plainly and with the tree; asserts that the two are the same."""
    plain = prepared.decode(TokenTree.root(), params)
    completions = prepared.decode(TREE, params)
    assert_same(completions, plain)
    return completions


# How replies end


@pytest.mark.parametrize("position", range(1, 12))
def test_a_stop_token_inside_an_accepted_run_ends_the_reply_there(prepared, engine, position):
    token = prepared.plain[0].token_ids[position]
    completions = both(prepared, greedy(max_tokens=LENGTH, stop_token_ids=(token,), logprobs=1))
    for completion, plain in zip(completions, prepared.plain, strict=True):
        ended = plain.token_ids.index(token) + 1 if token in plain.token_ids else LENGTH
        assert completion.token_ids == plain.token_ids[:ended]
    assert completions[0].finish_reason == "stop"


def test_an_eos_inside_an_accepted_run_ends_the_reply_as_hugging_faces_does(prepared, engine, tiny_llama):
    ends = [plain.token_ids[9] for plain in prepared.plain]
    expected = hugging_face(tiny_llama, prepared.prompts, LENGTH, eos_token_id=ends)
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, stop_token_ids=tuple(ends), ignore_eos=True)
    assert [c.token_ids for c in both(prepared, params)] == expected
    own_eos, engine.tokenizer.eos_token_ids = engine.tokenizer.eos_token_ids, frozenset(ends)
    try:
        params = SamplingParams(max_tokens=LENGTH, temperature=0.0)
        assert [c.token_ids for c in both(prepared, params)] == expected
        ignoring = greedy(max_tokens=LENGTH)
        assert [c.token_ids for c in both(prepared, ignoring)] == [c.token_ids for c in prepared.plain]
    finally:
        engine.tokenizer.eos_token_ids = own_eos


@pytest.fixture(scope="module")
def chatting(chat8m):
    """chat-8m, which writes English, and an oracle of its reply."""
    engine = build_engine(chat8m, max_model_len=256)
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "Tell me about the sea."}])
    return Prepared(engine, [prompt], greedy(max_tokens=40), rate=0.9)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("start", [3, 30, 61, 90])
def test_a_stop_string_ends_text_and_tokens_alike(chatting, start, include):
    text = chatting.plain[0].text
    stop = text[start : start + 7]  # begins and ends anywhere in a token
    params = greedy(max_tokens=40, stop=("never", stop), include_stop_str_in_output=include, logprobs=0)
    completion = both(chatting, params)[0]
    cut = text.index(stop)
    assert completion.text == text[: cut + len(stop) if include else cut]
    assert completion.finish_reason == "stop"
    decode = chatting.engine.tokenizer.decode
    assert stop in decode(completion.token_ids) and stop not in decode(completion.token_ids[:-1])
    assert max(completion.accepted_per_step) > 1


@pytest.mark.parametrize("max_tokens", range(1, 10))
def test_max_tokens_is_never_overshot(prepared, engine, max_tokens):
    for completion in both(prepared, greedy(max_tokens=max_tokens)):
        assert len(completion.token_ids) == max_tokens
        assert completion.finish_reason == "length"


def test_a_stop_on_the_last_token_allowed_is_a_stop_and_one_after_it_is_none(prepared, engine):
    reply = prepared.plain[0].token_ids
    position = next(i for i in range(3, LENGTH) if reply.index(reply[i]) == i)
    for max_tokens, reason in [(position + 1, "stop"), (position, "length")]:
        params = greedy(max_tokens=max_tokens, stop_token_ids=(reply[position],))
        assert both(prepared, params)[0].finish_reason == reason


@pytest.mark.parametrize("min_tokens", range(12))
def test_min_tokens_forbids_an_end_at_each_depth_as_hugging_face_does(prepared, engine, tiny_llama, min_tokens):
    token = prepared.plain[2].token_ids[4]
    expected = hugging_face(
        tiny_llama, prepared.prompts, LENGTH, eos_token_id=[token], min_new_tokens=min_tokens or None
    )
    params = greedy(max_tokens=LENGTH, stop_token_ids=(token,), min_tokens=min_tokens)
    completions = both(prepared, params)
    assert [c.token_ids for c in completions] == expected
    assert all(token not in c.token_ids[:min_tokens] for c in completions)


@pytest.mark.parametrize("room", [1, 2, 5, 9])
def test_a_reply_may_fill_the_context_to_the_last_position(prepared, tiny_llama, room):
    """A step's tree then writes past the context, into pages kept for it, and harms nobody."""
    longest = len(prepared.prompts[1])
    engine = build_engine(tiny_llama, max_batch_size=3, max_model_len=longest + room)
    engine.checkpoint.heads.guess = prepared.oracle.guess
    for size in (1, 64):
        engine.set_tree(TREES[size])
        completions = engine.generate(prepared.prompts, greedy(max_tokens=500))
        for completion, prompt in zip(completions, prepared.prompts, strict=True):
            assert len(prompt) + len(completion.token_ids) == engine.max_model_len
            assert completion.finish_reason == "length"
        expected = [
            hugging_face(tiny_llama, [c.prompt_token_ids], len(c.token_ids), eos_token_id=None)[0] for c in completions
        ]
        assert [c.token_ids for c in completions] == expected


# Streaming, several replies, aborting


@pytest.mark.parametrize("stop", [(), ("e",), ("th", "he q", "zzz")])
def test_streamed_pieces_add_up_to_the_completion(prepared, engine, stop):
    params = SamplingParams(max_tokens=LENGTH, temperature=1.5, seed=4, stop=stop, logprobs=1, n=3)
    for prompt in prepared.prompts:
        engine.add(prompt, params)
    pieces, completions = {}, {}
    while engine.has_unfinished():
        for output in engine.step():
            key = (output.request_id, output.index)
            assert key not in completions  # nothing comes after the end
            pieces.setdefault(key, []).append(output)
            if output.finished:
                completions[key] = output.finished
    assert len(completions) == 9
    for key, completion in completions.items():
        assert "".join(output.text for output in pieces[key]) == completion.text
        assert [t for output in pieces[key] for t in output.token_ids] == completion.token_ids
        assert [l for output in pieces[key] for l in output.logprobs] == completion.logprobs
        drafts = sum(output.num_draft_accepted for output in pieces[key])
        assert drafts == sum(completion.accepted_per_step) - completion.num_steps


def test_n_replies_come_in_order_side_by_side_with_their_seed(prepared, engine):
    params = [SamplingParams(max_tokens=4 + i, seed=100 + i, n=n, ignore_eos=True) for i, n in enumerate([3, 1, 2])]
    order = []
    completions = engine.generate(prepared.prompts, params, on_finish=lambda i, c: order.append((i, c.index)))
    assert [(len(c.prompt_token_ids), c.index, c.seed) for c in completions] == [
        (6, 0, 100), (6, 1, 100), (6, 2, 100), (25, 0, 101), (13, 0, 102), (13, 1, 102),
    ]  # fmt: skip
    assert sorted(order) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]
    assert completions[0].token_ids != completions[1].token_ids
    alone = engine.generate(prepared.prompts[:1], SamplingParams(max_tokens=4, seed=100, ignore_eos=True))
    assert alone[0].token_ids == completions[0].token_ids  # the first choice is the one of n=1


def test_an_unseeded_request_draws_one_seed_for_its_replies(prepared, engine):
    completions = engine.generate(prepared.prompts, SamplingParams(max_tokens=2, n=2))
    seeds = [c.seed for c in completions]
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_aborting_a_running_and_a_waiting_request_frees_them_and_harms_no_other(prepared, engine):
    names = [engine.add(prepared.prompts[i % 3], prepared.params, request_id=f"r{i}") for i in range(6)]
    outputs = [output for _ in range(2) for output in engine.step()]
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (4, 2)
    given = [token for output in outputs if output.request_id == "r1" for token in output.token_ids]
    (aborted,) = engine.abort("r1")
    assert aborted.finished.finish_reason == "abort" and aborted.finished.token_ids == given
    (waiting,) = engine.abort("r5")
    assert waiting.finished.token_ids == [] and waiting.finished.text == ""
    assert engine.stats().running == 3 and engine.stats().pages_used < stats.pages_used
    assert engine.abort("r1") == [] and engine.abort("never added") == []
    completions = {}
    while engine.has_unfinished():
        completions |= {o.request_id: o.finished for o in engine.step() if o.finished}
    assert sorted(completions) == [name for name in names if name not in ("r1", "r5")]
    assert_same([completions["r0"], completions["r4"], completions["r2"]], prepared.plain)


def test_aborting_takes_all_n_replies_of_a_request(prepared, engine):
    engine.add(prepared.prompts[0], SamplingParams(max_tokens=9, n=6, seed=1), request_id="six")
    engine.step()
    assert sorted(output.index for output in engine.abort("six")) == list(range(6))
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)


# What sampling parameters do to tokens, on every path of a tree


def test_logprobs_are_the_models_own(prepared, engine, tiny_llama):
    model = load_reference(tiny_llama)
    params = greedy(max_tokens=LENGTH, logprobs=3, temperature=2.0, seed=5, logit_bias={11: 3.0}, top_k=50)
    for completion in both(prepared, params):  # temperature, bias and top-k leave them alone
        text = [*completion.prompt_token_ids, *completion.token_ids]
        logprobs = (
            model(torch.tensor([text])).logits[0].detach().log_softmax(-1)[len(completion.prompt_token_ids) - 1 :]
        )
        for row, got, token in zip(logprobs, completion.logprobs, completion.token_ids, strict=False):
            assert got.token_id == token
            assert got.logprob == pytest.approx(float(row[token]), abs=1e-4)
            best = row.topk(3)
            assert [t for t, _ in got.top] == best.indices.tolist()
            assert [p for _, p in got.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_0_gives_the_tokens_own_and_none_gives_nothing(prepared, engine):
    chosen = engine.generate(prepared.prompts[:1], greedy(max_tokens=5, logprobs=0))[0]
    assert len(chosen.logprobs) == 5 and all(l.top == [] for l in chosen.logprobs)
    assert engine.generate(prepared.prompts[:1], greedy(max_tokens=5))[0].logprobs is None


@pytest.mark.parametrize("penalty", [0.8, 1.3, 2.0])
def test_repetition_penalty_equals_hugging_faces(tiny_llama, penalty):
    prompts = random_prompts([6, 25], seed=21)
    expected = hugging_face(tiny_llama, prompts, LENGTH, eos_token_id=None, repetition_penalty=penalty)
    engine = build_engine(tiny_llama)
    penalised = Prepared(engine, prompts, greedy(repetition_penalty=penalty))
    assert [c.token_ids for c in both(penalised, penalised.params)] == expected
    assert max(count for c in penalised.decode(TREE) for count in c.accepted_per_step) > 1


def test_frequency_and_presence_penalties_and_bias_equal_a_slow_loop(tiny_llama):
    prompts = random_prompts([6, 25], seed=22)
    params = greedy(frequency_penalty=0.7, presence_penalty=-0.4, logit_bias={40: 1.5, 41: -100.0})
    penalised = Prepared(build_engine(tiny_llama), prompts, params)
    model = load_reference(tiny_llama)
    for prompt, completion in zip(prompts, both(penalised, params), strict=True):
        reply = []
        for _ in range(LENGTH):
            logits = model(torch.tensor([prompt + reply])).logits[0, -1].detach().clone()
            logits[40] += 1.5
            logits[41] -= 100.0
            for token in set(reply):
                logits[token] -= 0.7 * reply.count(token) - 0.4
            reply.append(int(logits.argmax()))
        assert completion.token_ids == reply
    assert max(count for c in penalised.decode(TREE) for count in c.accepted_per_step) > 1


def test_every_sampling_parameter_at_once_equals_plain_decoding(tiny_llama):
    prompts = random_prompts([6, 25, 13], seed=23)
    params = [
        SamplingParams(
            max_tokens=LENGTH,
            min_tokens=10,
            temperature=0.9,
            top_p=0.9,
            top_k=30,
            min_p=0.01,
            seed=seed,
            stop=("th", "e q"),
            stop_token_ids=(40, 41, 300),
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=0.2,
            logit_bias={300: 2.0},
            logprobs=2,
            n=2,
        )
        for seed in (1, 2, 3)
    ]
    sampled = Prepared(build_engine(tiny_llama), prompts, params)
    assert_same(sampled.decode(TREE), sampled.plain)


# Memory and waiting


def test_requests_wait_for_pages_and_none_is_lost(prepared, tiny_llama):
    """A cache of four pages for requests that need two to join and one at first: three at once, and no more."""
    engine = build_engine(tiny_llama, max_batch_size=4, kv_cache_gb=gigabytes(tiny_llama, 4))
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREE)
    assert engine.stats().pages_total == 4
    names = {engine.add(prepared.prompts[i % 3], greedy(max_tokens=LENGTH)): i % 3 for i in range(9)}
    most, completions = 0, {}
    while engine.has_unfinished():
        completions |= {o.request_id: o.finished for o in engine.step() if o.finished}
        most = max(most, engine.stats().running)
        assert engine.stats().pages_used <= 4
    assert most == 3 and engine.stats().pages_used == 0
    assert list(completions) and set(completions) == set(names)
    for name, completion in completions.items():
        assert completion.token_ids == prepared.plain[names[name]].token_ids


def test_stats_count_what_was_done(tiny_llama):
    engine = build_engine(tiny_llama, heads=False)
    assert vars(engine.stats()) == dict(
        running=0, waiting=0, steps=0, prefill_tokens=0, decode_tokens=0, pages_used=0,
        pages_total=4 * 9, tree_size=1, pages_cached=0, running_tokens=0, waiting_tokens=0, reused_tokens=0,
        drafted_tokens=0, accepted_tokens=0, preemptions=0, waited_s=0.0,
    )  # fmt: skip
    engine.generate(random_prompts([5, 9]), greedy(max_tokens=7))
    stats = engine.stats()
    assert (stats.steps, stats.prefill_tokens, stats.decode_tokens) == (6, 14, 12)


def test_stats_count_drafts_and_tokens_in_line(prepared, engine):
    before = engine.stats()
    completions = prepared.decode(TREE)
    after = engine.stats()
    steps = [count for c in completions for count in c.accepted_per_step]
    assert after.drafted_tokens - before.drafted_tokens == len(steps) * (TREE.num_nodes - 1)
    assert [c.num_drafted for c in completions] == [c.num_steps * (TREE.num_nodes - 1) for c in completions]
    assert after.accepted_tokens - before.accepted_tokens == sum(steps) - len(steps) > 0
    for name, prompt in enumerate(prepared.prompts * 2):
        engine.add(prompt, greedy(max_tokens=20), request_id=str(name))
    assert (engine.stats().waiting_tokens, engine.stats().running_tokens) == (2 * (6 + 25 + 13), 0)
    engine.step()
    assert engine.stats().waiting_tokens == 25 + 13
    assert engine.stats().running_tokens == sum(s.num_cached for s in engine._scheduler.running) >= 50
    for name in range(6):
        engine.abort(str(name))


# What is refused


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5] * 512, {}, "the prompt has 512 tokens, but the context holds 512 with the reply; give at most 511"),
        ([5, 512], {}, r"token ids \[512\] are outside the vocabulary of 512 tokens"),
        ([5, -1], {}, r"token ids \[-1\] are outside the vocabulary of 512 tokens"),
        ([5], {"logit_bias": {600: 1.0}}, r"token ids \[600\] are outside the vocabulary of 512 tokens"),
        ([5], {"stop_token_ids": (700,)}, r"token ids \[700\] are outside the vocabulary of 512 tokens"),
        ([5], {"logprobs": 513}, "logprobs=513 asks for more tokens than the vocabulary's 512"),
    ],
)
def test_requests_that_could_never_run_are_refused_with_both_numbers(prepared, engine, prompt, params, message):
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, SamplingParams(**params))


def test_a_request_larger_than_the_cache_is_refused_but_max_tokens_beyond_the_context_is_not(tiny_llama):
    engine = build_engine(tiny_llama, max_model_len=512, kv_cache_gb=gigabytes(tiny_llama, 5))
    with pytest.raises(ValueError, match="can need 9 pages of 64 tokens, but the cache holds 5; lower max_tokens"):
        engine.add([5] * 100, SamplingParams(max_tokens=2000))
    engine = build_engine(tiny_llama, max_model_len=256, kv_cache_gb=gigabytes(tiny_llama, 5))
    completion = engine.generate([[5] * 100], greedy(max_tokens=2000))[0]
    assert len(completion.token_ids) == 156


@pytest.mark.parametrize(
    "prompt", [np.array([9, 10, 11]), torch.tensor([9, 10, 11]), (9, 10, 11), [np.int32(9), 10, 11]]
)
def test_token_ids_may_come_in_any_sequence_of_integers(prepared, engine, prompt):
    completion = engine.generate([prompt], greedy(max_tokens=2))[0]
    assert completion.prompt_token_ids == [9, 10, 11]
    assert {type(token) for token in completion.prompt_token_ids} == {int}


def test_fractions_are_no_token_ids(prepared, engine):
    with pytest.raises(TypeError, match="float"):
        engine.add([9.5], greedy())


def test_a_text_prompt_is_tokenised_as_a_plain_completion(prepared, engine):
    completion = engine.generate(["The quick brown fox"], greedy(max_tokens=2))[0]
    assert completion.prompt_token_ids == engine.tokenizer.encode("The quick brown fox")


def test_a_request_id_in_use_is_refused_and_free_again_afterwards(prepared, engine):
    engine.add([9], greedy(max_tokens=2), request_id="mine")
    with pytest.raises(ValueError, match="'mine' is in use"):
        engine.add([9], greedy(max_tokens=2), request_id="mine")
    engine.abort("mine")
    assert engine.add([9], greedy(max_tokens=2), request_id="mine") == "mine"
    engine.abort("mine")


def test_generate_refuses_arguments_that_do_not_fit(prepared, engine):
    with pytest.raises(ValueError, match="put a single prompt into a list"):
        engine.generate("one text", greedy())
    with pytest.raises(ValueError, match="3 prompts came with 2 sampling parameters"):
        engine.generate(prepared.prompts, [greedy(), greedy()])
    engine.add([9], greedy(), request_id="running")
    with pytest.raises(RuntimeError, match="idle engine"):
        engine.generate(prepared.prompts, greedy())
    engine.abort("running")
    assert engine.generate([], greedy()) == []


def test_an_error_in_generate_leaves_the_engine_idle(prepared, engine):
    with pytest.raises(ValueError, match="empty"):
        engine.generate([*prepared.prompts, []], greedy())
    assert not engine.has_unfinished()

    def stop(i, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prepared.prompts, [greedy(max_tokens=n) for n in (2, 9, 9)], on_finish=stop)
    assert not engine.has_unfinished()
    assert_same(engine.generate(prepared.prompts, prepared.params), prepared.plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"max_model_len": 1}, "max_model_len must be 2 to the model's 512 positions, got 1"),
        ({"max_model_len": 513}, "max_model_len must be 2 to the model's 512 positions, got 513"),
        ({"kv_cache_gb": 1e-5}, "kv_cache_gb=1e-05 holds -1 pages of 64 tokens, but one sequence needs 2"),
        ({"acceptance": "lossy"}, "acceptance is 'exact' or a Typical rule, got 'lossy'"),
        ({"speculation": "on"}, "speculation is 'auto', 'off' or a tree size of the ladder"),
        ({"speculation": 7}, r"a tree size of the ladder \[1, 8, 16\], got 7"),
        ({"speculation": True}, r"a tree size of the ladder \[1, 8, 16\], got True"),
    ],
)
def test_engine_arguments_out_of_range_are_refused(tiny_llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_engine(tiny_llama, trees=[TREES[8], TREES[16]], **arguments)


def test_heads_of_another_backbone_are_refused(tiny_llama, make_backbone_dir):
    backbone, tokenizer = load(tiny_llama)
    other, _ = load(make_backbone_dir("llama", seed=1))
    with pytest.raises(CheckpointMismatchError) as refused:
        Engine(backbone, tokenizer, checkpoint_of(other), speculation="off")
    assert backbone.digest in str(refused.value) and other.digest in str(refused.value)


def test_heads_trained_with_another_tokenizer_or_chat_template_are_refused(tiny_llama):
    backbone, tokenizer = load(tiny_llama)
    checkpoint = checkpoint_of(backbone)
    trained_on = dataclasses.replace(checkpoint.meta.backbone, tokenizer_digest="sha256:another")
    foreign = dataclasses.replace(checkpoint, meta=dataclasses.replace(checkpoint.meta, backbone=trained_on))
    with pytest.raises(CheckpointMismatchError) as refused:
        Engine(backbone, tokenizer, foreign, speculation="off")
    assert tokenizer.digest in str(refused.value) and "sha256:another" in str(refused.value)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0)], "is 5 deep, but this engine has 4 Medusa heads"),
        ([(10,)], "uses rank 10, but heads give 10 guesses"),
        (
            [(a, b) for a in range(8) for b in range(8)] + [(a,) for a in range(8)],
            "has 73 nodes, but this engine is sized for 64",
        ),
    ],
)
def test_trees_that_the_heads_or_the_cache_cannot_carry_are_refused(prepared, engine, paths, message):
    with pytest.raises(ValueError, match=message):
        engine.set_tree(TokenTree.from_paths(paths))


def test_a_tree_without_heads_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="2 nodes is 1 deep, but this engine has 0 Medusa heads"):
        build_engine(tiny_llama, heads=False).set_tree(TREES[2])


# Loading, typical acceptance


def test_from_pretrained_reads_backbone_and_heads(tiny_llama, tmp_path, prepared):
    backbone, _ = load(tiny_llama)
    checkpoint = checkpoint_of(backbone, trees=[TREES[8]], vocabulary="own")
    save_checkpoint(tmp_path / "heads", checkpoint.heads, checkpoint.meta)
    engine = Engine.from_pretrained(tiny_llama, tmp_path / "heads", device="cpu", speculation=8, max_batch_size=3)
    assert engine.trees == (TREES[1], TREES[8])
    assert_same(engine.generate(prepared.prompts, prepared.params), prepared.plain)
    assert engine.stats().tree_size == 8
    plain = Engine.from_pretrained(str(tiny_llama), device="cpu", dtype=torch.float32, max_model_len=100)
    assert (plain.max_model_len, plain.checkpoint, plain.trees) == (100, None, ())
    assert_same(plain.generate(prepared.prompts, prepared.params), prepared.plain)


def test_typical_acceptance_at_temperature_0_is_exact(prepared, tiny_llama):
    engine = build_engine(tiny_llama, acceptance=Typical())
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREE)
    completions = engine.generate(prepared.prompts, prepared.params)
    assert_same(completions, prepared.plain)
    assert max(count for c in completions for count in c.accepted_per_step) > 1


@pytest.mark.parametrize("root", ["greedy", "sampled"])
def test_typical_acceptance_keeps_more_drafts_above_temperature_0_and_counts_them_right(prepared, tiny_llama, root):
    engines = [build_engine(tiny_llama, acceptance=rule) for rule in ("exact", Typical(epsilon=0.01, root=root))]
    lengths = []
    for engine in engines:
        engine.checkpoint.heads.guess = prepared.oracle.guess
        engine.set_tree(TREE)
        params = SamplingParams(max_tokens=LENGTH, temperature=0.7, seed=0, ignore_eos=True, n=2)
        mixed = engine.generate(prepared.prompts, [params, prepared.params, params])
        assert mixed[2].token_ids == prepared.plain[1].token_ids  # a greedy request beside them is exact
        for completion in mixed:
            assert len(completion.token_ids) == LENGTH == 1 + sum(completion.accepted_per_step)
        lengths.append(sum(c.num_steps for c in mixed))
    assert lengths[1] <= lengths[0]


@pytest.mark.parametrize("root", ["greedy", "sampled"])
def test_a_request_may_ask_a_typical_engine_for_exact_acceptance(prepared, tiny_llama, root):
    """Then its tokens are plain decoding's, beside requests that are not."""
    params = SamplingParams(max_tokens=LENGTH, temperature=0.9, seed=8, ignore_eos=True)
    exact = dataclasses.replace(params, acceptance="exact")
    plain = Prepared(build_engine(tiny_llama), prepared.prompts, params, rate=0.9)
    engine = build_engine(tiny_llama, acceptance=Typical(epsilon=0.01, root=root))
    engine.checkpoint.heads.guess = plain.oracle.guess
    engine.set_tree(TREE)
    completions = engine.generate(prepared.prompts, [exact, params, exact])
    assert [completions[i].token_ids for i in (0, 2)] == [plain.plain[i].token_ids for i in (0, 2)]
    lossy = engine.generate(prepared.prompts, params)
    assert [c.token_ids for c in lossy] != [c.token_ids for c in plain.plain]
    assert [c.token_ids for c in engine.generate(prepared.prompts, exact)] == [c.token_ids for c in plain.plain]
