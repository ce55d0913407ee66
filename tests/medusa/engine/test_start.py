"""An engine's start: weights are hashed beside it, and nothing gets out before the pair was found to be one."""

from __future__ import annotations

from functools import partial
from threading import Timer

import pytest

from medusa import Engine, SamplingParams, weights
from medusa.checkpoint import CheckpointMismatchError, save_checkpoint
from medusa.model import Backbone
from medusa.weights import Hashing
from tests.medusa.engine.support import TREES, checkpoint_of

start = partial(Engine.from_pretrained, device="cpu", speculation="off", max_batch_size=2)


@pytest.fixture
def heads_for(tmp_path):
    """`heads_for(folder)`: a checkpoint of heads for the backbone there."""

    def save(folder):
        made = checkpoint_of(Backbone.from_pretrained(folder, device="cpu"), trees=[TREES[8]])
        save_checkpoint(tmp_path / folder.name, made.heads, made.meta)
        return tmp_path / folder.name

    return save


@pytest.fixture
def built(monkeypatch, hashing_gate):
    """The engines whose runner was built; only then does the digest become known."""
    engines, build = [], Engine._build_runner

    def build_and_open(engine):
        build(engine)
        engines.append(engine)
        hashing_gate.set()

    monkeypatch.setattr(Engine, "_build_runner", build_and_open)
    return engines


def test_the_weights_are_hashed_while_the_engine_is_built(tiny_llama, heads_for, built):
    heads = heads_for(tiny_llama)
    engine = start(tiny_llama, heads)
    assert built == [engine]
    assert engine.backbone.digest == engine.checkpoint.meta.backbone.weights_digest
    assert engine.backbone.hashing.is_done and engine.backbone.hashing.waited_s > 0
    assert min(engine.start_times.weights_s, engine.start_times.heads_s, engine.start_times.engine_s) > 0
    (reply,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=4, temperature=0.0))
    assert len(reply.token_ids) == 4


def test_a_mismatch_that_is_found_late_is_refused_all_the_same(tiny_llama, make_backbone_dir, heads_for, built):
    other = make_backbone_dir("llama", seed=1)
    heads = heads_for(other)
    with pytest.raises(CheckpointMismatchError, match="these heads belong to") as refused:
        start(tiny_llama, heads)
    assert len(built) == 1  # it was found late indeed
    for folder in (tiny_llama, other):
        assert weights.weights_digest(folder) in str(refused.value)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_a_failing_read_raises_ends_the_start(tiny_llama, heads_for, monkeypatch, tensor_parallel):
    heads = heads_for(tiny_llama)

    def fail(directory):
        raise OSError(5, f"Input/output error: {directory}")

    monkeypatch.setattr(weights, "weights_digest", fail)
    with pytest.raises(OSError, match=f"Input/output error: {tiny_llama}"):
        start(tiny_llama, heads, tensor_parallel=tensor_parallel)


def test_heads_of_another_size_are_refused_before_anything_is_built(
    tiny_llama, make_backbone_dir, heads_for, hashing_gate, monkeypatch
):
    wider = make_backbone_dir("llama", hidden_size=2 * Backbone.from_pretrained(tiny_llama).hidden_size)
    heads = heads_for(wider)
    monkeypatch.delattr(Engine, "_build_runner")
    Timer(0.2, hashing_gate.set).start()
    with pytest.raises(CheckpointMismatchError, match="these heads belong to"):
        start(tiny_llama, heads)


def test_a_build_that_fails_tells_first_that_the_heads_are_others(
    tiny_llama, make_backbone_dir, heads_for, hashing_gate
):
    own, foreign = heads_for(tiny_llama), heads_for(make_backbone_dir("llama", seed=1))
    for heads, error, message in (
        (own, ValueError, r"a tree size of the ladder \[1, 8\], got 7"),
        (foreign, CheckpointMismatchError, "these heads belong to"),
    ):
        hashing_gate.clear()
        Timer(0.2, hashing_gate.set).start()
        with pytest.raises(error, match=message):
            start(tiny_llama, heads, speculation=7)


def test_without_heads_nobody_waits_for_a_digest(tiny_llama, hashing_gate):
    assert start(tiny_llama).backbone.hashing is None
    engine = start(tiny_llama, hashing=Hashing(tiny_llama))
    assert not engine.backbone.hashing.is_done
    hashing_gate.set()
    assert engine.backbone.digest == weights.weights_digest(tiny_llama)
