"""A backbone shared out among two processes decodes token for token what one process does, whatever is asked of it.

A follower is a new Python, some seconds until it is there: each family starts one, and all its engines use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from medusa import Engine, Grammar, SamplingParams, TensorParallelError, Typical
from medusa.engine.kv_cache import PAGE_SIZE
from medusa.engine.sharded import ShardedBackbone, load_sharded
from tests.medusa.engine.support import (
    TREES,
    Prepared,
    build_engine,
    checkpoint_of,
    gigabytes,
    greedy,
    hugging_face,
    install_oracle,
    load,
    random_prompts,
    wait_until_gone,
)
from tests.medusa.engine.test_swap import heads_of

FAMILIES = ["llama", "qwen2"]
OTHERS = ["mistral", "qwen3", "gemma2", "phi3", "mixtral", "granite", "cohere"]
PROMPTS = random_prompts([5, 90, 1, 33, 21], seed=4)
SAMPLED = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.8, seed=11, ignore_eos=True)


class Pair:
    """Engines on the whole backbone and on a shared one, built alike."""

    def __init__(self, path: Any, shared: ShardedBackbone) -> None:
        self.path, self.shared = path, shared

    def engines(self, *, heads: bool = True, pages: int | None = None, **arguments: Any) -> list[Engine]:
        settings = {"speculation": "off", "max_batch_size": 3, **arguments}
        whole, tokenizer = load(self.path)
        made = []
        for backbone, share in ((whole, 1), (self.shared, 2)):
            memory = None if pages is None else gigabytes(self.path, pages) / share
            checkpoint = checkpoint_of(whole) if heads else None
            made.append(Engine(backbone, tokenizer, checkpoint, kv_cache_gb=memory, **settings))
        return made


@pytest.fixture(scope="module")
def pair(request, make_backbone_dir) -> Iterator[Pair]:
    path = make_backbone_dir(request.param)
    shared = load_sharded(path, 2, device="cpu")
    pair = Pair(path, shared)
    yield pair
    engine = pair.engines(heads=False)[1]
    for _ in range(2):
        engine.close()
        assert wait_until_gone(shared.followers.pids)
        with pytest.raises(TensorParallelError, match="the engine is closed"):
            engine.generate([[5]], greedy())


def replies(completions):
    return [(c.token_ids, c.text, c.finish_reason, c.accepted_per_step) for c in completions]


def assert_equal_with_trees(pair: Pair) -> None:
    """Plainly, then over trees whose guesses are often right: the same tokens, and the same of them in each step."""
    for params in (greedy(), SAMPLED):
        got = []
        for engine in pair.engines():
            prepared = Prepared(engine, PROMPTS, params)
            got.append(replies(prepared.plain) + replies(prepared.decode(TREES[16])))
            assert max(count for c in prepared.decode(TREES[16]) for count in c.accepted_per_step) > 2
        assert got[0] == got[1]


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
class TestEveryFamily:
    def test_replies_plainly_and_over_trees(self, pair):
        assert_equal_with_trees(pair)

    def test_a_process_holds_its_share(self, pair):
        whole, _ = load(pair.path)
        heads, size = whole.kv_shape
        assert pair.shared.kv_shape == (heads // 2, size)
        layers = [backbone.model.base_model.layers[0] for backbone in (whole, pair.shared)]
        for name in ("q_proj", "o_proj"):
            weights = [getattr(layer.self_attn, name).weight for layer in layers]
            assert weights[0].numel() == 2 * weights[1].numel()
        assert pair.shared.digest == whole.digest


@pytest.mark.slow
@pytest.mark.parametrize("pair", OTHERS, indirect=True)
def test_replies_of_other_families(pair):
    """Plans with whole heads in every process, soft-caps, experts, and other attention than Llama's."""
    assert_equal_with_trees(pair)


@pytest.mark.parametrize("pair", ["llama"], indirect=True)
class TestLlama:
    def test_replies_are_those_of_transformers(self, pair):
        engine = pair.engines(heads=False)[1]
        got = [c.token_ids for c in engine.generate(PROMPTS, greedy())]
        assert got == hugging_face(pair.path, PROMPTS, 24)

    def test_prompts_that_begin_alike_share_pages(self, pair):
        prompts = [PROMPTS[1][:70] + tail for tail in ([7, 8], [9], [7, 8])]
        got = []
        for engine in pair.engines():
            first = engine.generate(prompts[:1], greedy())
            got.append(replies([*first, *engine.generate(prompts, SAMPLED)]))
            assert engine.stats().reused_tokens >= PAGE_SIZE * 3
        assert got[0] == got[1]

    def test_sequences_that_lose_their_pages_go_on_where_they_were(self, pair):
        prompts = random_prompts([51, 49, 3], seed=1)
        params = greedy(max_tokens=40)
        got = []
        for engine in pair.engines(pages=4):
            prepared = Prepared(engine, prompts, params)
            got.append(replies(prepared.decode(TREES[8])))
            assert engine.stats().preemptions > 0 and engine.stats().pages_total == 4
        assert got[0] == got[1]

    def test_what_the_host_does_to_logits(self, pair):
        params = [
            greedy(logprobs=2, prompt_logprobs=1, frequency_penalty=0.7, logit_bias={7: 2.0}),
            SamplingParams(max_tokens=9, temperature=0.9, seed=3, grammar=Grammar("regex", "[a-c ]{20}")),
            greedy(min_tokens=8, ignore_eos=False, stop_token_ids=tuple(range(20, 200))),
        ]
        got, logprobs = [], []
        for engine in pair.engines():
            engine.set_tree(TREES[8])
            completions = engine.generate(PROMPTS[1:4], params)
            got.append(replies(completions))
            logprobs.append([e.logprob for e in [*completions[0].logprobs, *completions[0].prompt_logprobs]])
        assert got[0] == got[1]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)

    def test_typical_acceptance(self, pair):
        got = []
        for engine in pair.engines(acceptance=Typical(epsilon=0.02, delta=0.3, root="sampled")):
            plain = engine.generate(PROMPTS, SAMPLED)
            install_oracle(engine, [[*c.prompt_token_ids, *c.token_ids] for c in plain])
            engine.set_tree(TREES[16])
            got.append(replies(engine.generate(PROMPTS, SAMPLED)))
        assert got[0] == got[1]

    def test_other_heads_while_it_runs(self, pair):
        got = []
        for engine in pair.engines():
            engine.swap_heads(heads_of(pair.path, 1, num_heads=3, trees=[TREES[4]]))
            engine.set_speculation(4)
            got.append(replies(engine.generate(PROMPTS, greedy())))
        assert got[0] == got[1]

    def test_scores_of_given_texts(self, pair):
        whole, _ = load(pair.path)
        tokens = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]])
        torch.testing.assert_close(pair.shared.hidden_states(tokens), whole.hidden_states(tokens))

    def test_one_engine_at_a_time(self, pair):
        first, second = (pair.engines(heads=False)[1] for _ in range(2))
        with pytest.raises(RuntimeError, match="another engine was built"):
            first.generate([[5]], greedy())
        assert second.generate([[5]], greedy())[0].token_ids


def test_a_share_is_not_trained(tiny_llama):
    backbone = build_engine(tiny_llama).backbone
    shared = ShardedBackbone(backbone.model, name="share")
    with pytest.raises(ValueError, match="not trained"):
        shared.trainable_hidden_states(torch.tensor([[5, 6]]))
