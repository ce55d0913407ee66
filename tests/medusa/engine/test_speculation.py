"""How much to speculate: step times, the policy over them, measuring them, and trees that change under way."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from medusa import StepTimes, TokenTree
from medusa.calibration import guess_replies, tokens_per_step, walk
from medusa.checkpoint import BackboneRef, Calibration, CheckpointMeta
from medusa.engine.speculation import Policy, always, ladder_of
from medusa.heads import HeadsConfig
from medusa.tree import expected_tokens
from tests.medusa.engine.support import (
    ACCURACY,
    TREES,
    Prepared,
    build_engine,
    greedy,
    random_prompts,
)

ROOT = TokenTree.root()
LADDER = [TREES[4], TREES[16]]
TIMES = StepTimes({(1, 1): 4.0, (1, 5): 6.0, (1, 9): 7.0, (4, 1): 8.0, (4, 9): 16.0})


@pytest.mark.parametrize(
    ("batch_size", "num_nodes", "seconds"),
    [
        (1, 1, 4.0),  # measured
        (1, 9, 7.0),
        (1, 3, 5.0),  # between tree sizes
        (1, 7, 6.5),
        (4, 5, 12.0),
        (2, 1, 4.0 + 4.0 / 3),  # between batch sizes
        (2, 5, 6.0 + 6.0 / 3),  # between both
        (8, 1, 16.0),  # beyond: in proportion
        (8, 9, 32.0),
        (1, 18, 14.0),
        (8, 18, 64.0),
    ],
)
def test_step_times_are_looked_up_between_and_beyond_the_measured_sizes(batch_size, num_nodes, seconds):
    assert TIMES.lookup(batch_size, num_nodes) == pytest.approx(seconds)


def test_below_the_smallest_measured_size_its_own_time_holds():
    times = StepTimes({(4, 8): 3.0, (8, 8): 5.0})
    assert times.lookup(1, 1) == 3.0


def test_step_times_survive_a_round_trip_through_json():
    assert StepTimes.from_dict(json.loads(json.dumps(TIMES.to_dict()))) == TIMES


def test_empty_step_times_are_refused():
    with pytest.raises(ValueError, match="step times are empty"):
        StepTimes.from_dict({"step_times": []})


def policy(seconds, tokens=(1.0, 1.8, 2.4)):
    return Policy((ROOT, TREES[4], TREES[16]), tokens, StepTimes(seconds))


def test_the_policy_takes_the_most_expected_tokens_a_second():
    """0.25, 0.30 and 0.24 tokens a second alone; 0.125, 0.100 and 0.075 at eight."""
    chooses = policy({(1, 1): 4.0, (1, 4): 6.0, (1, 16): 10.0, (8, 1): 8.0, (8, 4): 18.0, (8, 16): 32.0}).choose
    assert chooses(1) == TREES[4]
    assert chooses(8) == ROOT
    speeds = {size: tokens / seconds for size, tokens, seconds in [(1, 1.0, 4), (4, 1.8, 6), (16, 2.4, 10)]}
    assert max(speeds, key=speeds.get) == 4


def test_the_largest_tree_is_taken_where_its_nodes_cost_nothing():
    assert policy({(1, 1): 4.0, (1, 16): 4.0}).choose(1) == TREES[16]


def test_plain_decoding_is_taken_where_speculation_does_not_pay():
    assert policy({(1, 1): 1.0, (1, 4): 1.9, (1, 16): 2.5}).choose(1) == ROOT
    assert policy({(1, 1): 1.0, (1, 4): 1.0, (1, 16): 1.0}, tokens=(1.0, 1.0, 1.0)).choose(1) == ROOT


def test_the_policy_gives_the_same_tree_for_the_same_batch():
    chooses = policy({(1, 1): 4.0, (1, 4): 6.0, (1, 16): 10.0}).choose
    assert {chooses(3) for _ in range(5)} == {chooses(3)}
    assert always(TREES[4])(1) == always(TREES[4])(99) == TREES[4]


def meta(trees, **calibration):
    return CheckpointMeta(
        heads=HeadsConfig(hidden_size=8, vocab_size=32),
        backbone=BackboneRef(name="b", weights_digest="d"),
        calibration=Calibration(accuracy=ACCURACY, num_positions=9, **calibration) if calibration else None,
        trees=[tree.to_list() for tree in trees],
    )


def test_the_ladder_is_sorted_and_always_has_the_root():
    measured = meta([TREES[16], TREES[4]], tokens_per_step=[2.2, 1.7])
    assert ladder_of(measured) == ((ROOT, TREES[4], TREES[16]), (1.0, 1.7, 2.2))
    with_root = meta([ROOT, TREES[4]], tokens_per_step=[1.0, 1.7])
    assert ladder_of(with_root) == ((ROOT, TREES[4]), (1.0, 1.7))


def test_a_ladder_without_a_walk_takes_the_product_estimate():
    estimated = ladder_of(meta([TREES[4]], temperature=0.0))
    assert estimated == ((ROOT, TREES[4]), (1.0, expected_tokens(TREES[4], ACCURACY)))


def test_heads_without_calibration_have_no_ladder():
    assert ladder_of(meta([TREES[4]])) == ((), ())


# The engine


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

    def spy(self, batch_sizes, trees, **settings):
        measured.extend(batch_sizes)
        return StepTimes({(1, 1): 1.0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medusa.engine.profile.Profiler.measure", spy)
        # A page of this backbone is 32 KiB; a sequence of 128 + 1 + 64 positions takes four.
        build_engine(tiny_llama, trees=LADDER, speculation="auto", max_batch_size=8, kv_cache_gb=13.5 * 2**15 / 2**30)
        build_engine(tiny_llama, trees=LADDER, speculation="auto", max_batch_size=8)
        build_engine(tiny_llama, trees=LADDER, speculation="auto", max_batch_size=8, kv_cache_gb=3.5 * 2**15 / 2**30)
    assert measured == [1, 2, *(1, 2, 4, 8), 1]


def test_stored_step_times_spare_the_measurement(tiny_llama):
    times = StepTimes({(1, 1): 1.0, (1, 16): 1.0, (4, 1): 1.0, (4, 16): 9.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medusa.engine.profile.Profiler.measure", None)
        engine = build_engine(tiny_llama, trees=LADDER, speculation="auto", step_times=times)
    sizes = []
    for count in (1, 4):
        engine.generate(random_prompts([5] * count), greedy(max_tokens=3))
        sizes.append(engine.stats().tree_size)
    assert sizes == [16, 1]
    engine.set_policy(StepTimes({(1, 1): 1.0, (1, 16): 99.0}))
    engine.generate(random_prompts([5]), greedy(max_tokens=3))
    assert engine.stats().tree_size == 1


def test_measuring_leaves_the_engine_idle_and_decoding_right(tiny_llama):
    engine = build_engine(tiny_llama, trees=LADDER)
    prepared = Prepared(engine, random_prompts([6, 19, 40], seed=31), greedy())
    before = engine.stats()
    times = engine.measure_step_times([1, 3], [ROOT, *LADDER], repeats=2, context=70)
    assert sorted(times.seconds) == [(b, n) for b in (1, 3) for n in (1, 4, 16)]
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
