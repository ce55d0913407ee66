"""What a request may ask of a step, by the GPU's runner beside the reference one. Run by test_gpu_requests.py, in
Triton's interpreter (TRITON_INTERPRET=1) or, with MEDUSA_KERNEL_DEVICE=cuda, on a GPU."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import pytest
import torch

from medusa import Engine, Grammar, MedusaHeads, SamplingParams
from medusa.engine.runners import graph_runner_of
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from tests.medusa.engine.support import random_prompts
from tests.medusa.engine.test_swap import heads_of

DEVICE = os.environ.get("MEDUSA_KERNEL_DEVICE", "cpu")
PROMPTS = random_prompts([6, 25, 13, 4], seed=3)
GRAMMARS = [
    SamplingParams(max_tokens=5, temperature=0.0, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.9, seed=3, grammar=Grammar("regex", "[a-c ]{20}")),
    SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0.0, grammar=Grammar("regex", "ab"), min_tokens=6),  # it ends before
]
PLAIN = [replace(params, grammar=None) for params in GRAMMARS]
needs_llguidance = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="the extra `grammar` is not installed"
)


class GpuEngine(Engine):
    """Takes the GPU's runner on any device."""

    def _runner_of(self, acceptance):
        return graph_runner_of(self.backbone, self._cache, self._drafting, acceptance)


def engine_of(kind, path, device, heads=MedusaHeads):
    backbone = Backbone.from_pretrained(path, device=device)
    checkpoint = heads_of(path, 1, kind=heads)
    checkpoint.heads.to(device)
    tokenizer = ChatTokenizer.from_pretrained(path)
    return kind(backbone, tokenizer, checkpoint, speculation=8, max_batch_size=3, max_prefill_tokens=20)


def assert_same(ours, expected):
    for completion, other in zip(ours, expected, strict=True):
        assert completion.token_ids == other.token_ids
        assert completion.accepted_per_step == other.accepted_per_step
        if other.prompt_logprobs is not None:
            assert len(completion.prompt_logprobs) == len(other.prompt_logprobs)
            for entry, wanted in zip(completion.prompt_logprobs, other.prompt_logprobs, strict=True):
                assert (entry.token_id, entry.logprob) == (wanted.token_id, pytest.approx(wanted.logprob, abs=1e-3))


@pytest.mark.parametrize("params", [PLAIN, pytest.param(GRAMMARS, marks=needs_llguidance)], ids=["plain", "grammars"])
@pytest.mark.parametrize("heads", [MedusaHeads, HydraHeads])
def test_prompt_logprobs_grammars_and_other_heads(tiny_llama, heads, params, monkeypatch):
    monkeypatch.setattr("medusa.engine.gpu_prefill.LOGITS_AT_ONCE", 4)  # fewer than the prompt's
    reference, gpu = engine_of(Engine, tiny_llama, "cpu", heads), engine_of(GpuEngine, tiny_llama, DEVICE, heads)
    assert_same(gpu.generate(PROMPTS, params), reference.generate(PROMPTS, params))
    for engine in (reference, gpu):
        checkpoint = heads_of(tiny_llama, 2, kind=heads)
        checkpoint.heads.to(engine.backbone.device)
        engine.swap_heads(checkpoint)
    assert_same(gpu.generate(PROMPTS, params), reference.generate(PROMPTS, params))


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are captured on a GPU alone")
def test_prompts_by_graphs_and_without_give_the_same_replies(tiny_llama):
    """Passes of all shapes, in turn with decoding and with passes that are too large for a graph."""
    sizes = [1, 15, 470, 3, 480, 250, 460, 7, 90, 33, 20, 450, 2, 5, 440, 130]
    prompts, params = random_prompts(sizes, seed=8), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    for max_prefill_tokens in (20, 200, 1536):
        ours, reference = (
            kind(Backbone.from_pretrained(tiny_llama, device=device), ChatTokenizer.from_pretrained(tiny_llama),
                 max_batch_size=9, max_prefill_tokens=max_prefill_tokens)
            for kind, device in ((GpuEngine, DEVICE), (Engine, "cpu"))
        )  # fmt: skip
        assert_same(ours.generate(prompts, params), reference.generate(prompts, params))


@pytest.mark.skipif(DEVICE == "cpu", reason="graphs are captured on a GPU alone")
@pytest.mark.parametrize("heads", [MedusaHeads, HydraHeads])
def test_a_step_makes_the_host_wait_for_nothing_but_the_step_before(tiny_llama, heads):
    """CUDA's own watch refuses every call that waits for the device; the wait for an earlier step's event is none."""
    engine = engine_of(GpuEngine, tiny_llama, DEVICE, heads)
    params = [replace(each, prompt_logprobs=None) for each in PLAIN]
    expected = engine.generate(PROMPTS, params)  # captures the graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.ones(1, device=DEVICE).item()
        found = engine.generate(PROMPTS, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
