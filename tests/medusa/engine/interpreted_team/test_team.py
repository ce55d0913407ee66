"""The GPU's runner on two processes, kernels interpreted in both: what one process decodes, token for token."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest

from medusa import Engine, SamplingParams, TensorParallelError
from medusa.checkpoint import BackboneRef
from medusa.engine.graph_runner import GraphRunner
from medusa.engine.sharded import load_sharded
from medusa.engine.watched import WatchedRunner
from medusa.tokenizer import ChatTokenizer
from tests.medusa.engine.interpreted.test_gpu_hydra import knowing
from tests.medusa.engine.interpreted.test_graph_runner import (
    PROMPTS,
    VOCAB,
    GraphEngine,
    assert_equal_runs,
    guessing,
    params,
)
from tests.medusa.engine.support import TREES, wait_until_gone

SETTINGS = {"max_batch_size": 3, "max_model_len": 200, "max_prefill_tokens": 24, "speculation": "off"}


@pytest.fixture(scope="module")
def made(make_backbone_dir, tmp_path_factory):
    """A family's guessing model on disk, with the heads that know it, and a share of it."""
    shares = []

    def make(family, backbone_and_heads=guessing):
        while shares:
            shares.pop().close()
        source = make_backbone_dir(family, vocab=VOCAB, tie_word_embeddings=False)
        backbone, checkpoint = backbone_and_heads(source)
        folder = tmp_path_factory.mktemp(family)
        backbone.model.save_pretrained(folder)
        tokenizer = ChatTokenizer.from_pretrained(source)
        tokenizer.hf.save_pretrained(folder)
        share = load_sharded(folder, 2, device="cpu")
        shares.append(share)
        shared = dataclasses.replace(
            checkpoint,
            meta=dataclasses.replace(
                checkpoint.meta, backbone=BackboneRef(name=share.name, weights_digest=share.digest)
            ),
        )
        engines = Engine(backbone, tokenizer, checkpoint, **SETTINGS), GraphEngine(share, tokenizer, shared, **SETTINGS)
        assert isinstance(engines[1]._runner, WatchedRunner) and isinstance(engines[1]._runner._runner, GraphRunner)
        return engines

    yield make
    while shares:
        shares.pop().close()


def test_a_fused_family(made):
    engines = made("qwen2")  # biases beside its column-split weights
    each = [
        params(temperature=1.2, top_k=20, top_p=0.8),
        params(temperature=0.7, logprobs=1, frequency_penalty=0.5, max_tokens=2),
    ]
    completions = assert_equal_runs(engines, [PROMPTS[0], PROMPTS[2]], each, TREES[8])
    assert max(count for c in completions for count in c.accepted_per_step) > 1
    assert_equal_runs(engines, PROMPTS[2:3], params(temperature=0.8, max_tokens=2), TREES[1])
    assert engines[1]._runner.lag == 1

    followers = engines[1].backbone.followers
    os.kill(followers.pids[0], signal.SIGKILL)
    with pytest.raises(TensorParallelError, match="exited with status -9"):
        engines[1].generate(PROMPTS[:2], SamplingParams(max_tokens=50))
    assert wait_until_gone(followers.pids)


@pytest.mark.slow
def test_a_family_that_runs_by_its_own_modules(made):
    engines = made("gemma2")
    assert_equal_runs(engines, [PROMPTS[0], PROMPTS[2]], [params(max_tokens=3), params(temperature=0.8, max_tokens=2)])


@pytest.mark.slow
def test_hydra_heads_which_guess_in_the_first_process_before_the_nodes_are_handed_out(made):
    completions = assert_equal_runs(made("llama", knowing), PROMPTS[2:4], [params(), params(temperature=0.8)], TREES[8])
    assert max(count for c in completions for count in c.accepted_per_step) > 2
