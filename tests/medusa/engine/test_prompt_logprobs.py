"""Log-probabilities of a prompt: what Hugging Face's logits say, in chunks, in batches, beside a known beginning."""

from __future__ import annotations

import pytest
import torch

from medusa import SamplingParams
from tests.medusa.engine.support import TREES, build_engine, gigabytes, greedy, load_reference, random_prompts

PROMPTS = random_prompts([1, 2, 70, 130], seed=5)


def expected(path, prompt, num_top):
    with torch.inference_mode():
        logprobs = load_reference(path)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    top = logprobs.topk(num_top, dim=-1)
    return [
        (token, logprobs[i, token].item(), list(zip(top.indices[i].tolist(), top.values[i].tolist(), strict=True)))
        for i, token in enumerate(prompt[1:])
    ]


def assert_are(found, path, prompt, num_top=2):
    wanted = expected(path, prompt, num_top)
    assert [entry.token_id for entry in found] == [token for token, _, _ in wanted]
    for entry, (_, logprob, top) in zip(found, wanted, strict=True):
        assert entry.logprob == pytest.approx(logprob, abs=1e-4)
        assert [token for token, _ in entry.top] == [token for token, _ in top]
        assert [value for _, value in entry.top] == pytest.approx([value for _, value in top], abs=1e-4)


@pytest.mark.parametrize("max_prefill_tokens", [7, 64, 1000])
def test_they_are_what_the_model_says(tiny_llama, max_prefill_tokens):
    engine = build_engine(tiny_llama, max_prefill_tokens=max_prefill_tokens)
    engine.set_tree(TREES[8])
    completions = engine.generate(PROMPTS, greedy(max_tokens=3, prompt_logprobs=2))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert_are(completion.prompt_logprobs, tiny_llama, prompt)


def test_they_are_whole_though_the_prompt_is_cached(tiny_llama):
    engine = build_engine(tiny_llama)
    (plain,) = engine.generate([PROMPTS[3]], greedy(max_tokens=3))
    (asked, other) = engine.generate([PROMPTS[3]] * 2, [greedy(max_tokens=3, prompt_logprobs=2), greedy(max_tokens=3)])
    assert_are(asked.prompt_logprobs, tiny_llama, PROMPTS[3])
    assert plain.prompt_logprobs is None and other.prompt_logprobs is None
    assert asked.token_ids == plain.token_ids == other.token_ids


def test_each_of_n_replies_has_them_and_they_come_with_its_first_output(tiny_llama):
    engine = build_engine(tiny_llama, max_prefill_tokens=50)
    engine.add(PROMPTS[2], SamplingParams(max_tokens=4, n=2, prompt_logprobs=2), request_id="a")
    outputs = {0: [], 1: []}
    while engine.has_unfinished():
        for output in engine.step():
            outputs[output.index].append(output)
    for its_own in outputs.values():
        assert_are(its_own[0].prompt_logprobs, tiny_llama, PROMPTS[2])
        assert [output.prompt_logprobs for output in its_own[1:]] == [None] * (len(its_own) - 1)


def test_a_sequence_that_lost_its_pages_has_them_once(tiny_llama):
    engine = build_engine(tiny_llama, max_batch_size=3, max_prefill_tokens=48, kv_cache_gb=gigabytes(tiny_llama, 7))
    prompts = random_prompts([100, 110, 120], seed=6)
    completions = engine.generate(prompts, greedy(max_tokens=60, prompt_logprobs=2))
    assert engine.stats().preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        assert_are(completion.prompt_logprobs, tiny_llama, prompt)
    (alone,) = engine.generate(prompts[2:], greedy(max_tokens=60))
    assert completions[2].token_ids == alone.token_ids


def test_more_than_the_vocabulary_is_refused(tiny_llama):
    engine = build_engine(tiny_llama)
    with pytest.raises(ValueError, match="prompt_logprobs=600 asks for more"):
        engine.add(PROMPTS[1], greedy(prompt_logprobs=600))
    with pytest.raises(ValueError, match="prompt_logprobs must be None, 0 or more"):
        SamplingParams(prompt_logprobs=-1)
