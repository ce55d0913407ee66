"""Pages shared, taken away and found again, prompts in pieces, steps read late: none of it changes a reply."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from medusa import SamplingParams
from medusa.engine.kv_cache import PAGE_SIZE
from medusa.engine.page_pool import TRASH_PAGE, chain
from tests.medusa.engine.support import (
    NUM_HEADS,
    TREES,
    Prepared,
    build_engine,
    gigabytes,
    greedy,
    hugging_face,
    random_prompts,
)

LENGTH = 110


def run(engine, prompts, params):
    """Replies by the engine's loop, with what was streamed of each; checks that the two are the same."""
    names = {}
    for i, prompt in enumerate(prompts):
        each = params[i] if isinstance(params, list) else params
        names[engine.add(prompt, each)] = i
    streamed, done = {}, {}
    while engine.has_unfinished():
        for output in engine.step():
            key = (names[output.request_id], output.index)
            assert key not in done
            streamed.setdefault(key, []).append(output)
            if output.finished:
                done[key] = output.finished
    for key, completion in done.items():
        assert [token for output in streamed[key] for token in output.token_ids] == completion.token_ids
        assert "".join(output.text for output in streamed[key]) == completion.text
    return [done[key] for key in sorted(done)]


def assert_same(completions, expected):
    for completion, plain in zip(completions, expected, strict=True):
        assert completion.token_ids == plain.token_ids
        assert (completion.text, completion.finish_reason) == (plain.text, plain.finish_reason)
        assert sum(completion.accepted_per_step) == len(completion.token_ids) - 1
        if plain.logprobs is not None:
            assert [l.token_id for l in completion.logprobs] == completion.token_ids
            for got, wanted in zip(completion.logprobs, plain.logprobs, strict=True):
                assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert [token for token, _ in got.top] == [token for token, _ in wanted.top]


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "seed": 5},
    "penalised": {
        "temperature": 0.8,
        "seed": 6,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.1,
        "min_tokens": 70,
        "logprobs": 2,
        "n": 2,
    },
}


@pytest.fixture(scope="module", params=SAMPLING)
def prepared(request, tiny_llama):
    """Prompts of up to two pages, their replies of some two more with room for all, and an oracle."""
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, **SAMPLING[request.param])
    engine = build_engine(tiny_llama, max_batch_size=8)
    return Prepared(engine, random_prompts([6, 60, 100, 33, 70], seed=50), params)


# Preemption


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize("pages", [5, 7])
def test_replies_are_the_same_when_sequences_lose_their_pages(prepared, tiny_llama, size, pages):
    engine = build_engine(tiny_llama, max_batch_size=8, kv_cache_gb=gigabytes(tiny_llama, pages))
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREES[size])
    completions = run(engine, prepared.prompts, prepared.params)
    assert_same(completions, prepared.plain)
    assert engine.stats().preemptions > 0
    assert engine.stats().pages_used == 0
    assert size == 1 or max(count for c in completions for count in c.accepted_per_step) > 1


def test_stop_strings_end_a_reply_that_lost_its_pages_where_they_would(prepared, tiny_llama):
    stops = [(c.text[len(c.text) * 3 // 4 :][:5],) for c in prepared.plain[:: prepared.params.n]]
    params = [
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, seed=7, temperature=t, stop=stop, logprobs=0)
        for stop, t in zip(stops, (0.0, 0.5, 0.0, 0.9, 0.0), strict=True)
    ]
    expected = build_engine(tiny_llama, max_batch_size=8).generate(prepared.prompts, params)
    engine = build_engine(tiny_llama, max_batch_size=8, kv_cache_gb=gigabytes(tiny_llama, 5))
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREES[8])
    assert_same(run(engine, prepared.prompts, params), expected)
    assert engine.stats().preemptions > 0


def test_a_sequence_that_lost_its_pages_finds_most_of_them_again(tiny_llama):
    engine = build_engine(tiny_llama, max_batch_size=2, kv_cache_gb=gigabytes(tiny_llama, 6))
    prompts = random_prompts([100, 100], seed=51)
    run(engine, prompts, greedy(max_tokens=130))
    stats = engine.stats()
    assert stats.preemptions == 1 and stats.reused_tokens == 2 * PAGE_SIZE
    assert stats.prefill_tokens == 2 * 100 + 192 - 2 * PAGE_SIZE


def test_the_heads_guess_on_where_a_sequence_left_off(tiny_llama):
    """After its pages come back the first step accepts drafts: the guesses are those of the last position before."""
    engine = build_engine(tiny_llama, max_batch_size=2)
    prepared = Prepared(engine, random_prompts([20], seed=52), greedy(max_tokens=60), rate=1.0)
    engine.set_tree(TREES[64])
    engine.add(prepared.prompts[0], prepared.params)
    for _ in range(4):
        engine.step()
    (sequence,) = engine._scheduler.running
    engine._scheduler._preempt(sequence)
    before = engine.stats().prefill_tokens
    (output,) = engine.step()
    assert engine.stats().prefill_tokens - before == sequence.num_to_fill - len(output.token_ids)
    assert output.num_draft_accepted > 0
    while engine.has_unfinished():
        engine.step()
    assert sequence.output_ids == prepared.plain[0].token_ids


# Text in the cache


def test_a_second_turn_computes_only_what_is_new(prepared, tiny_llama):
    engine = build_engine(tiny_llama, max_batch_size=8)
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREES[16])
    first = run(engine, prepared.prompts, prepared.params)
    endings = [prompt for prompt in prepared.prompts for _ in range(prepared.params.n)]
    turns = [[*c.prompt_token_ids, *c.token_ids, *prompt[:9]] for c, prompt in zip(first, endings, strict=True)]
    before = engine.stats()
    second = run(engine, turns, prepared.params)
    after = engine.stats()
    reused = [(len(c.prompt_token_ids) + LENGTH - 1) // PAGE_SIZE * PAGE_SIZE for c in first]
    replies = prepared.params.n * len(turns)
    most = sum(len(turn) for turn in turns) * prepared.params.n
    assert after.reused_tokens - before.reused_tokens == sum(reused) * prepared.params.n
    assert after.prefill_tokens - before.prefill_tokens == most - sum(reused) * prepared.params.n
    assert len(second) == replies
    fresh = build_engine(tiny_llama, max_batch_size=8)
    assert_same(second, fresh.generate(turns, prepared.params))


def test_the_same_prompt_again_computes_its_last_token_only(tiny_llama):
    engine = build_engine(tiny_llama)
    (prompt,) = random_prompts([2 * PAGE_SIZE + 1], seed=53)
    expected = hugging_face(tiny_llama, [prompt], 12, eos_token_id=None)
    for computed in (len(prompt), 1, 1):
        before = engine.stats().prefill_tokens
        assert [c.token_ids for c in engine.generate([prompt], greedy(max_tokens=12))] == expected
        assert engine.stats().prefill_tokens - before == computed


def test_n_replies_compute_their_prompts_full_pages_once(tiny_llama):
    engine = build_engine(tiny_llama, max_batch_size=5, max_prefill_tokens=64)
    (prompt,) = random_prompts([3 * PAGE_SIZE + 20], seed=54)
    params = SamplingParams(max_tokens=10, seed=1, n=5, ignore_eos=True)
    completions = engine.generate([prompt], params)
    assert engine.stats().prefill_tokens == 3 * PAGE_SIZE + 5 * 20
    assert engine.stats().reused_tokens == 4 * 3 * PAGE_SIZE
    for index, completion in enumerate(completions):
        alone = build_engine(tiny_llama, max_batch_size=5).generate([prompt], params)[index]
        assert completion.token_ids == alone.token_ids


def test_old_text_makes_room_for_new(tiny_llama):
    engine = build_engine(tiny_llama, max_batch_size=2, kv_cache_gb=gigabytes(tiny_llama, 8))
    prompts = random_prompts([150] * 6, seed=55)
    expected = hugging_face(tiny_llama, prompts, 10, eos_token_id=None)
    for _ in range(2):
        for prompt, reply in zip(prompts, expected, strict=True):
            assert engine.generate([prompt], greedy(max_tokens=10))[0].token_ids == reply
            assert engine.stats().pages_cached <= 8 and engine.stats().pages_used == 0
    reused = engine.stats().reused_tokens
    assert reused == 0  # each was given up before it came again
    assert engine.generate(prompts[-1:], greedy(max_tokens=10))[0].token_ids == expected[-1]
    assert engine.stats().reused_tokens == 2 * PAGE_SIZE


def test_speculation_never_disturbs_a_page_that_others_read(tiny_llama):
    """Pages of known text stay the same, bit for bit, while others decode on them with wide trees."""
    engine = build_engine(tiny_llama, max_batch_size=4)
    (prompt,) = random_prompts([2 * PAGE_SIZE - 1], seed=56)
    prepared = Prepared(engine, [prompt], greedy(max_tokens=80), rate=0.7)
    engine.set_tree(TREES[64])
    known = dict(engine._cache.pool._digest_of)
    before = engine._cache.data[:, :, list(known)].clone()
    params = [prepared.params, SamplingParams(max_tokens=80, seed=3, ignore_eos=True)]
    completions = engine.generate([prompt, prompt], params)
    assert completions[0].token_ids == prepared.plain[0].token_ids
    assert known.items() <= engine._cache.pool._digest_of.items()
    assert torch.equal(engine._cache.data[:, :, list(known)], before)


@pytest.mark.parametrize("late", [False, True])
def test_only_full_pages_of_kept_tokens_are_known(tiny_llama, late):
    """Wherever a reply is cut in a run of accepted drafts, and whatever a later step added behind the cut."""
    engine = build_engine(tiny_llama)
    prepared = Prepared(engine, random_prompts([40], seed=63), greedy(max_tokens=40), rate=1.0)
    reply, known = prepared.plain[0].token_ids, set()
    for end in range(20, 29):
        engine = build_engine(tiny_llama)
        engine.checkpoint.heads.guess = prepared.oracle.guess
        engine.set_tree(TREES[64])
        if late:
            make_late(engine)
        params = (greedy(max_tokens=end), greedy(max_tokens=40, stop=(engine.tokenizer.decode(reply[end - 2 : end]),)))
        for completion in run(engine, prepared.prompts * 2, list(params)):
            text, pool = [*completion.prompt_token_ids, *completion.token_ids], engine._cache.pool
            known |= {chain(pool.root_digest, text[:PAGE_SIZE])} if len(text) >= PAGE_SIZE else set()
        assert pool._page_of.keys() <= known
    assert known


# Prompts in chunks


@pytest.mark.parametrize("budget", [1, 7, PAGE_SIZE, PAGE_SIZE + 1, 100, 1000])
def test_replies_are_the_same_whatever_the_chunks(prepared, tiny_llama, budget):
    engine = build_engine(tiny_llama, max_batch_size=8, max_prefill_tokens=budget)
    engine.checkpoint.heads.guess = prepared.oracle.guess
    engine.set_tree(TREES[16])
    assert_same(run(engine, prepared.prompts, prepared.params), prepared.plain)


def test_a_long_prompt_holds_the_others_up_by_no_more_than_the_budget(tiny_llama):
    engine = build_engine(tiny_llama, max_prefill_tokens=50)
    short, long = random_prompts([10, 430], seed=57)
    engine.add(short, greedy(max_tokens=30), request_id="short")
    engine.step()
    engine.add(long, greedy(max_tokens=5), request_id="long")
    replies = {"short": 0, "long": 0}
    for _ in range(9):
        before = engine.stats().prefill_tokens
        outputs = {output.request_id: output for output in engine.step()}
        assert engine.stats().prefill_tokens - before <= 50
        assert "short" in outputs  # one more token, every step
        replies = {name: replies[name] + len(o.token_ids) for name, o in outputs.items()} | {
            name: count for name, count in replies.items() if name not in outputs
        }
    assert replies["short"] == 9 and replies["long"] > 0


def test_speculation_gets_prompts_done_in_fewer_steps(tiny_llama):
    """Under long prompts with short replies there are as many steps as prompts take, and one with trees costs more."""
    prompts, params, budget = random_prompts([150] * 12, seed=65), greedy(max_tokens=30), 32
    prepared = Prepared(build_engine(tiny_llama, max_batch_size=12), prompts, params, rate=1.0)
    prefilled = {}
    for size in (1, 64):
        engine = build_engine(tiny_llama, max_batch_size=12, max_prefill_tokens=budget)
        engine.checkpoint.heads.guess = prepared.oracle.guess
        engine.set_tree(TREES[size])
        names = [engine.add(prompt, params) for prompt in prompts]
        replies, prefilled[size] = {name: [] for name in names}, []
        while engine.has_unfinished():
            before = engine.stats().prefill_tokens
            for output in engine.step():
                replies[output.request_id] += output.token_ids
            prefilled[size].append(engine.stats().prefill_tokens - before)
        assert list(replies.values()) == [c.token_ids for c in prepared.plain]
    assert max(prefilled[1]) == budget < max(prefilled[64]) <= budget * (NUM_HEADS + 1)
    assert len(prefilled[64]) < 0.7 * len(prefilled[1])


@pytest.mark.parametrize("seed", range(3))
def test_prompts_that_join_while_others_decode_change_nothing(tiny_llama, seed):
    prompts = random_prompts([300, 5, 130, 64, 65, 128, 1], seed=seed)
    expected = hugging_face(tiny_llama, prompts, 20, eos_token_id=None)
    engine = build_engine(tiny_llama, max_batch_size=4, max_prefill_tokens=37 + 20 * seed)
    prepared = Prepared(engine, prompts, greedy(max_tokens=20), seed=seed)
    completions = prepared.decode(TREES[8])
    assert [c.token_ids for c in completions] == expected
    assert engine.stats().reused_tokens > 0  # the second time the prompts are known


def test_a_chunk_far_into_the_context_is_not_padded_past_its_table(tiny_llama):
    """A few new tokens behind a long known text, beside a longer new prompt."""
    engine = build_engine(tiny_llama, max_prefill_tokens=1000)
    far, new = random_prompts([460, 300], seed=64)
    engine.generate([far], greedy(max_tokens=1))
    prompts = [[*far, 7, 8, 9], new]
    expected = hugging_face(tiny_llama, prompts, 10, eos_token_id=None)
    before = engine.stats().reused_tokens
    assert [c.token_ids for c in engine.generate(prompts, greedy(max_tokens=10))] == expected
    assert engine.stats().reused_tokens - before == 448


# What stands in pages that nobody owns


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_nothing_from_reused_pages_or_the_trash_page_reaches_a_reply(make_backbone_dir, name, value):
    """0 * NaN is NaN: what a mask hides must not be multiplied either."""
    path = make_backbone_dir(name)
    engine = build_engine(path, max_batch_size=3, max_model_len=200, max_prefill_tokens=50)
    prompts = random_prompts([6, 130, 63], seed=58)
    prepared = Prepared(engine, prompts, greedy(max_tokens=24), rate=0.8)
    expected = hugging_face(path, prompts, 24, eos_token_id=None)
    assert [c.token_ids for c in prepared.plain] == expected
    for size in (1, 16, 64):
        engine.set_tree(TREES[size])
        pool = engine._cache.pool
        pool.take(pool.num_available), pool.release(range(1, pool.num_pages + 1))  # nothing is known any more
        engine._cache.data.fill_(value)
        names = [engine.add(prompt, prepared.params) for prompt in prompts]
        replies = {name: [] for name in names}
        while engine.has_unfinished():
            for output in engine.step():
                replies[output.request_id] += output.token_ids
            engine._cache.data[:, :, [TRASH_PAGE, *pool._free]] = value
        assert list(replies.values()) == expected
        assert pool.num_used == 0


# Steps that are read late


class LateRunner:
    """The reference runner as one of lag 1: the host learns of a step after it has launched the next."""

    lag = 1

    def __init__(self, runner):
        self._runner = runner
        self.num_late = 0  # launches of sequences that the host had not heard from since their last one

    def prefill(self, chunks, *, num_heads):
        return self._runner.prefill(chunks, num_heads=num_heads)

    def decode(self, sequences, trees, *, num_heads):
        self.num_late += any(sequence.least_ahead for sequence in sequences)
        for sequence, tree in zip(sequences, trees, strict=True):
            written = int(self._runner._length[sequence.row]) + tree.num_nodes
            assert written <= self._runner._cache.num_owned(sequence.row) * PAGE_SIZE
        return self._runner.decode(sequences, trees, num_heads=num_heads)


def make_late(engine):
    """Only for requests whose draws need nothing but logits: the reference runner reads penalties off the host."""
    engine._loop._runner = runner = LateRunner(engine._runner)
    return runner


@pytest.mark.parametrize(
    ("size", "pages", "temperature"), [(1, 5, 0.9), (1, None, 0.0), (16, 5, 0.0), (16, 7, 0.9), (16, None, 0.9)]
)
def test_replies_are_the_same_when_steps_are_read_one_step_late(tiny_llama, size, pages, temperature):
    params = [
        SamplingParams(
            max_tokens=n, ignore_eos=True, temperature=temperature, seed=n, logprobs=1, stop_token_ids=(300,)
        )
        for n in (110, 1, 2, 60, 100)
    ]
    prompts = random_prompts([6, 60, 100, 33, 70], seed=60)
    prepared = Prepared(build_engine(tiny_llama, max_batch_size=8), prompts, params)
    stops = [c.text[len(c.text) // 2 :][:4] for c in prepared.plain]
    for stop in ((), (stops[0],)):
        asked = [SamplingParams(**{name: getattr(p, name) for name in p.__slots__} | {"stop": stop}) for p in params]
        expected = build_engine(tiny_llama, max_batch_size=8).generate(prompts, asked)
        engine = build_engine(
            tiny_llama,
            max_batch_size=8,
            max_prefill_tokens=50,
            kv_cache_gb=gigabytes(tiny_llama, pages) if pages else None,
        )
        engine.checkpoint.heads.guess = prepared.oracle.guess
        engine.set_tree(TREES[size])
        late = make_late(engine)
        assert_same(run(engine, prompts, asked), expected)
        assert late.num_late > 20
        assert engine.stats().pages_used == 0
        tokens = sum(len(c.token_ids) - 1 for c in expected)
        assert engine.stats().decode_tokens == tokens  # what a step too many gave is counted nowhere


def test_an_abort_drops_what_is_in_flight(tiny_llama):
    engine = build_engine(tiny_llama, max_batch_size=2)
    prompts = random_prompts([20, 30, 40], seed=61)
    expected = engine.generate(prompts, greedy(max_tokens=20))
    make_late(engine)
    names = [engine.add(prompt, greedy(max_tokens=20)) for prompt in prompts]
    for _ in range(5):
        engine.step()
    (aborted,) = engine.abort(names[0])
    count = len(aborted.finished.token_ids)
    assert aborted.finished.token_ids == expected[0].token_ids[:count] and 0 < count < 20
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            assert output.request_id != names[0]
            if output.finished:
                done[output.request_id] = output.finished
    assert [done[name].token_ids for name in names[1:]] == [c.token_ids for c in expected[1:]]


@pytest.mark.parametrize("late", [False, True])
def test_what_the_host_waits_for_steps_before_the_last_is_counted(tiny_llama, monkeypatch, late):
    """By a clock that only a decode step's end moves: of a step that is read at once it tells nothing."""
    engine, seconds = build_engine(tiny_llama), []
    runner = make_late(engine) if late else engine._loop._runner
    decode = runner.decode

    class Slow:
        def __init__(self, launched):
            self._launched = launched

        def collect(self):
            seconds.append(1.0)
            return self._launched.collect()

    monkeypatch.setattr(runner, "decode", lambda *arguments, **named: Slow(decode(*arguments, **named)))
    monkeypatch.setattr("medusa.engine.loop.time", SimpleNamespace(perf_counter=lambda: sum(seconds)))
    engine.generate(random_prompts([20]), greedy(max_tokens=10))
    assert len(seconds) == 9
    assert engine.stats().waited_s == (9.0 if late else 0.0)


@pytest.mark.parametrize("size", [1, 64])
def test_steps_read_late_write_within_the_pages_at_the_end_of_the_context(tiny_llama, size):
    """The step in flight when a reply reaches the last position has gone past it."""
    prompts = random_prompts(range(46, 54), seed=62)
    longer = Prepared(build_engine(tiny_llama, max_batch_size=8), prompts, greedy(max_tokens=40), rate=1.0)
    engine = build_engine(tiny_llama, max_batch_size=8, max_model_len=64)
    engine.checkpoint.heads.guess = longer.oracle.guess  # drafts go on past the end, and are right
    engine.set_tree(TREES[size])
    make_late(engine)
    completions = run(engine, prompts, greedy(max_tokens=500))
    for completion, plain in zip(completions, longer.plain, strict=True):
        assert completion.token_ids == plain.token_ids[: 64 - len(plain.prompt_token_ids)]
