"""Speculation in the engine: measuring step times, choosing by them, and trees that change under way."""

from __future__ import annotations

from itertools import pairwise

import pytest

from medusa import StepTimes, TokenTree
from medusa.calibration import guess_replies, tokens_per_step, walk
from medusa.engine.runner import Runner
from medusa.engine.shapes import Buckets
from tests.medusa.engine.support import (
    TREES,
    Prepared,
    build_engine,
    gigabytes,
    greedy,
    random_prompts,
)

ROOT = TokenTree.root()
LADDER = [TREES[4], TREES[16]]
TIMES = StepTimes.of_uniform_trees({(1, 1): 1.0, (1, 4): 1.0, (1, 16): 1.0})


def test_auto_without_heads_is_plain_decoding(tiny_llama):
    engine = build_engine(tiny_llama, heads=False, speculation="auto")
    engine.generate(random_prompts([5]), greedy(max_tokens=3))
    assert engine.stats().tree_size == 1


def test_auto_without_calibration_says_what_to_do(tiny_llama):
    with pytest.raises(
        ValueError, match="calibrated ladder of trees; run `medusa calibrate`, or give speculation='off'"
    ):
        build_engine(tiny_llama, speculation="auto")
    engine = build_engine(tiny_llama)
    with pytest.raises(ValueError, match="calibrated ladder of trees"):
        engine.set_policy(TIMES)


def test_auto_measures_at_the_start_and_then_decodes(tiny_llama):
    engine = build_engine(tiny_llama, trees=LADDER, speculation="auto")
    assert engine.stats().steps == 0 and engine.stats().pages_used == 0 and not engine.has_unfinished()
    prompts = random_prompts([6, 19], seed=30)
    replies = engine.generate(prompts, greedy())
    assert engine.stats().tree_size in (1, 4, 16)
    engine.set_tree(None)
    assert [c.token_ids for c in replies] == [c.token_ids for c in engine.generate(prompts, greedy())]


def test_auto_measures_only_what_a_small_cache_holds(tiny_llama):
    """Pages for three sequences of the profile's length, though there are eight rows."""
    measured = []

    def spy(self, steps, **settings):
        measured.extend(steps)
        return StepTimes.of_uniform_trees({(1, 1): 1.0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medusa.engine.profile.Profiler.measure", spy)
        # A page of this backbone is 32 KiB; a sequence of 128 + 1 + 64 positions takes four.
        build_engine(tiny_llama, trees=LADDER, speculation="auto", max_batch_size=8, kv_cache_gb=13.5 * 2**15 / 2**30)
        build_engine(tiny_llama, trees=LADDER, speculation="auto", max_batch_size=8)
        build_engine(tiny_llama, trees=LADDER, speculation="auto", max_batch_size=8, kv_cache_gb=3.5 * 2**15 / 2**30)
    assert measured == [1, 2, *(1, 2, 4, 8), 1]


def test_stored_step_times_spare_the_measurement(tiny_llama):
    times = StepTimes.of_uniform_trees({(1, 1): 1.0, (1, 16): 1.0, (4, 1): 1.0, (4, 16): 9.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medusa.engine.profile.Profiler.measure", None)
        engine = build_engine(tiny_llama, trees=LADDER, speculation="auto", step_times=times)
    sizes = []
    for count in (1, 4):
        engine.generate(random_prompts([5] * count), greedy(max_tokens=3))
        sizes.append(engine.stats().tree_size)
    assert sizes == [16, 1]
    engine.set_policy(StepTimes.of_uniform_trees({(1, 1): 1.0, (1, 16): 99.0}))
    engine.generate(random_prompts([5]), greedy(max_tokens=3))
    assert engine.stats().tree_size == 1


def test_measuring_leaves_the_engine_idle_and_decoding_right(tiny_llama):
    engine = build_engine(tiny_llama, trees=LADDER)
    prepared = Prepared(engine, random_prompts([6, 19, 40], seed=31), greedy())
    before = engine.stats()
    times = engine.measure_step_times([1, 3], [ROOT, *LADDER], repeats=2, context=70)
    assert sorted(times.seconds) == [(b, b * n, 70) for b in (1, 3) for n in (1, 4, 16)]
    assert min(times.seconds.values()) > 0
    assert engine.stats() == before and engine.stats().pages_used == 0
    assert [c.token_ids for c in prepared.decode(TREES[16])] == [c.token_ids for c in prepared.plain]


def test_measuring_needs_an_idle_engine_and_sizes_that_fit(tiny_llama):
    engine = build_engine(tiny_llama, max_model_len=128)
    with pytest.raises(ValueError, match="batch size 5 with 127 tokens each do not fit this engine: 4 rows"):
        engine.measure_step_times([1, 5], [ROOT])
    assert not engine.has_unfinished() and engine.stats().pages_used == 0
    with pytest.raises(ValueError, match="uses rank 11"):
        engine.measure_step_times([1], [TokenTree.from_paths([(11,)])])
    engine.add([5], greedy(), request_id="r")
    with pytest.raises(RuntimeError, match="idle engine"):
        engine.measure_step_times([1], [ROOT])
    engine.abort("r")


def test_trees_may_change_between_any_two_steps(tiny_llama):
    """From one node to many there are no guesses yet, from few heads to more there are not enough: none is accepted."""
    engine = build_engine(tiny_llama)
    prepared = Prepared(engine, random_prompts([6, 19, 40], seed=32), greedy(max_tokens=40), rate=0.9)
    for prompt in prepared.prompts:
        engine.add(prompt, prepared.params)
    order, replies, steps = [1, 16, 2, 64, 64, 1, 1, 8, 2, 2, 32, 1, 4], {}, []
    while engine.has_unfinished():
        size = order[engine.stats().steps % len(order)]
        engine.set_tree(TREES[size])
        outputs = engine.step()
        for output in outputs:
            replies.setdefault(output.request_id, []).extend(output.token_ids)
        steps.append((size, max(output.num_draft_accepted for output in outputs)))
    assert list(replies.values()) == [c.token_ids for c in prepared.plain]
    for (previous, _), (size, accepted) in pairwise(steps):
        assert accepted <= min(TREES[previous].max_depth, TREES[size].max_depth)
    assert max(accepted for _, accepted in steps) > 1


def test_only_the_heads_that_the_tree_needs_run(tiny_llama):
    engine = build_engine(tiny_llama)
    prepared = Prepared(engine, random_prompts([6], seed=33), greedy(max_tokens=6))
    asked = []

    def guess(*arguments):
        asked.append(arguments[4])
        return prepared.oracle.guess(*arguments)

    engine.checkpoint.heads.guess = guess
    prepared.decode(ROOT)
    assert asked == []
    prepared.decode(TREES[2])
    assert set(asked) == {1}
    asked.clear()
    prepared.decode(TREES[64])
    assert set(asked) == {TREES[64].max_depth}


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64])
def test_the_offline_walk_is_the_engine_step_by_step(tiny_llama, size):
    """What calibration promises of a tree is what decoding with it does, the last step of a reply included."""
    engine = build_engine(tiny_llama)
    params = [greedy(max_tokens=n) for n in (1, 2, 19, 40, 33)]
    prepared = Prepared(engine, random_prompts([6, 19, 40, 11, 3], seed=34), params, rate=0.8)
    rows = [(c.prompt_token_ids, c.token_ids) for c in prepared.plain]
    guessed = list(guess_replies(engine.backbone, engine.checkpoint.heads, rows, 10))
    completions = prepared.decode(TREES[size])
    assert [walk(item, TREES[size]) for item in guessed] == [c.accepted_per_step for c in completions]
    steps = sum(c.num_steps for c in completions)
    assert tokens_per_step(guessed, TREES[size]) == sum(len(c.token_ids) - 1 for c in completions) / steps


def test_a_runner_of_ragged_shapes_is_measured_on_them_and_given_ragged_trees(tiny_llama, monkeypatch):
    """Whatever the policy makes of the shapes, replies are plain decoding's."""
    buckets = Buckets(nodes=(2, 4, 8, 16, 48, 300), batches=(1, 2, 4, 5))
    monkeypatch.setattr(Runner, "buckets", property(lambda self: buckets))
    monkeypatch.setattr("medusa.engine.profile.CONTEXTS", (20, 40))
    engine = build_engine(tiny_llama, trees=[TREES[4], TREES[64]], max_batch_size=5)
    prepared = Prepared(engine, random_prompts([6, 19, 40, 9], seed=35), greedy(max_tokens=30))
    engine.set_speculation("auto")
    measured = {(batch, total) for batch, total, _ in engine.step_times.seconds}
    sizes = buckets.batches
    expected = {(b, b) for b in sizes} | {(b, n) for b in sizes for n in buckets.nodes if b < n < 64 * b}
    assert measured == expected | {(1, 64), (2, 128), (4, 256)}
    assert {context for _, _, context in engine.step_times.seconds} == {20, 40}
    cheap = StepTimes({shape: 1.0 + 0.001 * shape[1] for shape in engine.step_times.seconds})
    engine.set_policy(cheap)
    trees = []
    for prompt in prepared.prompts:
        engine.add(prompt, prepared.params)
    replies = {}
    while engine.has_unfinished():
        for output in engine.step():
            replies.setdefault(output.request_id, []).extend(output.token_ids)
        trees.append(engine._loop.speculation.choice.nodes)
    assert list(replies.values()) == [c.token_ids for c in prepared.plain]
    assert any(len(set(nodes)) > 1 for nodes in trees)


def test_auto_measures_sequences_as_long_as_there_are_pages_for(tiny_llama, monkeypatch):
    """A cache of eight pages: one sequence may be long, two have half of it each, and four as good as none."""
    buckets = Buckets(nodes=(2, 8), batches=(1, 2, 4, 5))
    monkeypatch.setattr(Runner, "buckets", property(lambda self: buckets))
    engine = build_engine(
        tiny_llama, trees=[TREES[4], TREES[64]], max_batch_size=5, kv_cache_gb=gigabytes(tiny_llama, 8)
    )
    engine.set_speculation("auto")
    contexts = {}
    for batch, _, context in engine.step_times.seconds:
        contexts.setdefault(batch, set()).add(context)
    assert contexts == {1: {128, 447}, 2: {128, 191}, 4: {63}}
    assert engine.stats().pages_used == 0
    plain = build_engine(tiny_llama, heads=False).generate([[5, 6, 7]], greedy(max_tokens=20))
    assert engine.generate([[5, 6, 7]], greedy(max_tokens=20))[0].token_ids == plain[0].token_ids


def test_what_auto_measured_is_kept_and_can_be_given_to_another_engine(tiny_llama, monkeypatch):
    engine = build_engine(tiny_llama, trees=LADDER)
    assert engine.step_times is None
    engine.set_speculation("auto")
    times = engine.step_times
    monkeypatch.setattr("medusa.engine.profile.Profiler.measure", None)
    engine.set_speculation("off")
    engine.set_speculation("auto")
    assert build_engine(tiny_llama, trees=LADDER, speculation="auto", step_times=times).step_times == times


def test_auto_cannot_measure_while_requests_run(tiny_llama):
    engine = build_engine(tiny_llama, trees=LADDER)
    engine.add([5], greedy(), request_id="r")
    with pytest.raises(RuntimeError, match="idle engine"):
        engine.set_speculation("auto")
    engine.abort("r")


def test_accepted_drafts_are_learnt_by_request(tiny_llama):
    """An oracle whose guesses are all right, and one whose guesses are all wrong."""
    factors = {}
    for rate in (0.0, 1.0):
        engine = build_engine(tiny_llama, trees=LADDER)
        prepared = Prepared(engine, random_prompts([6], seed=36), greedy(max_tokens=40), rate=rate)
        engine.set_policy(StepTimes.of_uniform_trees({(1, 1): 1.0, (1, 16): 1.0}))
        engine.add(prepared.prompts[0], prepared.params)
        while engine.has_unfinished():
            engine.step()
            factors[rate] = [s.acceptance.factor for s in engine._scheduler.running] or factors[rate]
    assert factors[0.0][0] < 0.5 and factors[1.0][0] > 1.2
