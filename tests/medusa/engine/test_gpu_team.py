"""Two GPUs decode what one does: graphs with sums in them. On a machine with two:
`python -m pytest -m gpu tests/medusa/engine/test_gpu_team.py`."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from medusa import Engine, SamplingParams, TensorParallelError, TokenTree
from medusa.checkpoint import save_checkpoint
from tests.medusa.engine.support import checkpoint_of, load, random_prompts, wait_until_gone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
TREE = TokenTree.from_paths([(0,), (1,), (0, 0), (0, 1)])
PROMPTS = random_prompts([5, 90, 1, 33], seed=4)
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.9, top_p=0.8, seed=11, ignore_eos=True),
    SamplingParams(max_tokens=20, temperature=0.0, logprobs=1, frequency_penalty=0.5),
    SamplingParams(max_tokens=1, temperature=0.0),
]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_tokens_are_those_of_one_gpu(make_backbone_dir, tmp_path, family):
    path = make_backbone_dir(family)
    made = checkpoint_of(load(path)[0])
    save_checkpoint(tmp_path / "heads", made.heads, made.meta)
    got = []
    for count in (1, 2):
        engine = Engine.from_pretrained(
            path,
            tmp_path / "heads",
            device="cuda",
            dtype=torch.float32,
            speculation="off",
            max_batch_size=3,
            kv_cache_gb=0.1,
            tensor_parallel=count,
        )
        for tree in (None, TREE):
            engine.set_tree(tree)
            got.append([c.token_ids for c in engine.generate(PROMPTS, PARAMS)])
        engine.close()
    assert got[0] == got[1] == got[2] == got[3]


def test_a_follower_that_dies_is_told_and_nothing_hangs(tiny_llama):
    engine = Engine.from_pretrained(
        tiny_llama, device="cuda", dtype=torch.float32, speculation="off", kv_cache_gb=0.1, tensor_parallel=2
    )
    engine.generate(PROMPTS, PARAMS)
    pids = engine.backbone.followers.pids
    engine.add(PROMPTS[0], SamplingParams(max_tokens=300, temperature=0.0, ignore_eos=True))
    for _ in range(5):
        engine.step()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(TensorParallelError, match="exited with status -9"):
        while engine.has_unfinished():
            engine.step()
    assert wait_until_gone(pids)
    engine.close()
