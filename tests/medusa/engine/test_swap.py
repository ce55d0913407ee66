"""Other heads in a running engine: replies stay what they are, and what is guessed is the new heads'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from medusa import Engine, HeadsConfig, MedusaHeads, TokenTree, Typical
from medusa.checkpoint import BackboneRef, Checkpoint, CheckpointMeta, CheckpointMismatchError
from medusa.engine.step_times import StepTimes
from medusa.tree import grow
from tests.medusa.engine.support import ACCURACY, TREES, checkpoint_of, greedy, load, random_prompts

PROMPTS = random_prompts([6, 25, 13], seed=3)
LADDER = [TREES[8], TREES[16]]


def heads_of(path, seed, *, num_heads=4, trees=LADDER, kind=MedusaHeads):
    """Heads with random blocks, which guess otherwise than others."""
    backbone, _ = load(path)
    made = checkpoint_of(backbone, trees=trees)
    config = HeadsConfig(
        hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, num_heads=num_heads, vocabulary="shared"
    )
    heads = kind.initialised(config, backbone.lm_head_weight)
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    meta = CheckpointMeta.of(heads, made.meta.backbone, calibration=made.meta.calibration, trees=made.meta.trees)
    return Checkpoint(heads.eval().requires_grad_(False), meta)


def engine_with(path, checkpoint, **arguments):
    backbone, tokenizer = load(path)
    settings = {"speculation": 16, "max_batch_size": 3} | arguments
    return Engine(backbone, tokenizer, checkpoint, **settings)


def run(engine, *, swap_after=None, checkpoint=None):
    """Replies by request, with the heads swapped after so many steps."""
    params = greedy(max_tokens=40)
    for i, prompt in enumerate(PROMPTS):
        engine.add(prompt, params, request_id=str(i))
    done, steps = {}, 0
    while engine.has_unfinished():
        if steps == swap_after:
            engine.swap_heads(checkpoint)
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output.finished
        steps += 1
    return [done[str(i)] for i in range(len(PROMPTS))]


def tokens(completions):
    return [completion.token_ids for completion in completions]


def accepted(completions):
    return [completion.accepted_per_step for completion in completions]


def test_replies_do_not_change_and_later_guesses_are_the_new_heads(tiny_llama):
    old, new = heads_of(tiny_llama, 1), heads_of(tiny_llama, 2)
    engine = engine_with(tiny_llama, old)
    plain = run(engine_with(tiny_llama, old, speculation="off"))
    before = run(engine)
    assert not engine.must_be_idle_for(new)
    assert tokens(run(engine, swap_after=5, checkpoint=new)) == tokens(before) == tokens(plain)
    assert engine.checkpoint.meta is new.meta
    fresh = run(engine_with(tiny_llama, heads_of(tiny_llama, 2)))
    assert accepted(run(engine)) == accepted(fresh)
    assert accepted(fresh) != accepted(before)


@pytest.mark.parametrize("num_heads", [3, 5], ids=["fewer", "more"])
def test_heads_of_another_shape_are_taken_by_an_idle_engine(tiny_llama, num_heads):
    depth = min(num_heads, 4)
    trees = [grow(ACCURACY[:depth], 8), grow(ACCURACY[:depth], 16)]
    engine = engine_with(tiny_llama, heads_of(tiny_llama, 1))
    before = run(engine)
    new = heads_of(tiny_llama, 2, num_heads=num_heads, trees=trees)
    assert engine.must_be_idle_for(new)
    with pytest.raises(RuntimeError, match="while no request runs"):
        run(engine, swap_after=3, checkpoint=new)
    while engine.has_unfinished():
        engine.step()
    engine.swap_heads(new)
    fresh = engine_with(tiny_llama, new)
    after = run(engine)
    assert engine.trees == fresh.trees
    assert tokens(after) == tokens(before)
    assert accepted(after) == accepted(run(fresh))
    assert engine.stats().pages_used == 0


def test_swapping_there_and_back_is_as_before(tiny_llama):
    engine = engine_with(tiny_llama, heads_of(tiny_llama, 1))
    before = run(engine)
    run(engine, swap_after=3, checkpoint=heads_of(tiny_llama, 2))
    run(engine, swap_after=4, checkpoint=heads_of(tiny_llama, 1))
    assert accepted(run(engine)) == accepted(before)


def test_the_policy_weighs_the_new_trees_by_the_times_it_has(tiny_llama):
    times = StepTimes({(1, 1, 128): 1.0, (1, 16, 128): 1.2, (4, 4, 128): 1.0, (4, 64, 128): 9.0})
    engine = engine_with(tiny_llama, heads_of(tiny_llama, 1), speculation="auto", step_times=times)
    small = grow(ACCURACY, 2)
    engine.swap_heads(heads_of(tiny_llama, 2, trees=[small]))
    assert engine.trees == (TokenTree.root(), small)
    assert tokens(run(engine)) == tokens(run(engine_with(tiny_llama, heads_of(tiny_llama, 1), speculation="off")))
    assert engine.stats().tree_size in (1, 2)


def assert_kept(engine, before, completions):
    assert engine.checkpoint is before
    assert accepted(run(engine)) == accepted(completions)


def test_heads_of_another_backbone_are_refused(tiny_llama):
    old = heads_of(tiny_llama, 1)
    engine = engine_with(tiny_llama, old)
    completions = run(engine)
    other = heads_of(tiny_llama, 2)
    stranger = replace(other, meta=replace(other.meta, backbone=BackboneRef(name="other", weights_digest="sha256:0")))
    with pytest.raises(CheckpointMismatchError, match="belong to other"):
        engine.swap_heads(stranger)
    assert_kept(engine, old, completions)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trees": [grow(ACCURACY, 80), TREES[16]]}, "80 nodes, but this engine is sized for 64"),
        ({"trees": [TREES[8]]}, "a tree size of the ladder"),
        ({"trees": []}, "a tree size of the ladder"),
        ({"num_heads": 2, "trees": LADDER}, "this engine has 2 Medusa heads"),
    ],
    ids=["too-large", "other-sizes", "no-trees", "too-deep"],
)
def test_heads_without_room_are_refused_and_the_old_ones_stay(tiny_llama, changes, words):
    old = heads_of(tiny_llama, 1)
    engine = engine_with(tiny_llama, old)
    completions = run(engine)
    with pytest.raises(ValueError, match=words):
        engine.swap_heads(heads_of(tiny_llama, 2, **changes))
    assert_kept(engine, old, completions)


def test_heads_that_no_runner_can_be_made_for_are_refused_and_the_old_ones_stay(tiny_llama, monkeypatch):
    old = heads_of(tiny_llama, 1)
    engine = engine_with(tiny_llama, old)
    completions = run(engine)

    def refuse(acceptance):
        raise ValueError("no room")

    monkeypatch.setattr(engine, "_runner_of", refuse)
    with pytest.raises(ValueError, match="no room"):
        engine.swap_heads(heads_of(tiny_llama, 2, num_heads=3, trees=[TREES[8], TREES[16]]))
    assert_kept(engine, old, completions)


def test_an_engine_without_heads_takes_none(tiny_llama):
    with pytest.raises(ValueError, match="started without heads"):
        engine_with(tiny_llama, None, speculation="off").swap_heads(heads_of(tiny_llama, 1))


def test_typical_acceptance_swaps_when_idle(tiny_llama):
    engine = engine_with(tiny_llama, heads_of(tiny_llama, 1), acceptance=Typical())
    assert engine.must_be_idle_for(heads_of(tiny_llama, 2))
    engine.add(PROMPTS[0], greedy(max_tokens=4))
    with pytest.raises(RuntimeError, match="wait for those that do to end"):
        engine.swap_heads(heads_of(tiny_llama, 2))
    while engine.has_unfinished():
        engine.step()
    new = heads_of(tiny_llama, 2)
    engine.swap_heads(new)
    assert engine.checkpoint.meta is new.meta
