"""The GPU's runner, its kernels interpreted, gives what the reference runner gives: tokens, steps, log-probabilities.

The backbones are made to say mostly a permutation of the last token, and the heads to guess it, so that many drafts are
right and some are not.
"""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch

from medusa import Engine, MedusaHeads, SamplingParams
from medusa.decoding import Typical
from medusa.engine.graph_runner import GraphRunner
from medusa.engine.kv_cache import PAGE_SIZE
from medusa.engine.runners import graph_runner_of
from medusa.kernels.typical import judge
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree
from tests.medusa.engine.support import NUM_HEADS, TREES, checkpoint_of, gigabytes, random_prompts

VOCAB = 300
LENGTH = 5
PROMPTS = random_prompts([5, 40, 1, 9, 21, 3, 8], vocab=VOCAB)


class GraphEngine(Engine):
    """On the GPU's runner wherever it is."""

    def _runner_of(self, acceptance):
        return graph_runner_of(self.backbone, self._cache, self._drafting, acceptance)


def guessing(path, temperament=1.0):
    """A backbone whose next token is mostly a permutation of its last one, and a checkpoint whose heads know it."""
    backbone = Backbone.from_pretrained(path, device="cpu")
    embedding = backbone.model.get_input_embeddings().weight.data
    generator = torch.Generator().manual_seed(7)
    after = torch.randperm(len(embedding), generator=generator)
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * 0.4)
    backbone.model.get_output_embeddings().weight.data[after] = embedding * temperament
    checkpoint = checkpoint_of(backbone, vocabulary="own")
    weights = dict(checkpoint.heads.state_dict())
    reached = after
    for head in range(NUM_HEADS):
        reached = after[reached]
        weights[f"{head}.1.weight"] = torch.empty_like(embedding).index_copy(0, reached, embedding * temperament)
    assert isinstance(checkpoint.heads, MedusaHeads)
    checkpoint.heads.load_state_dict(weights)
    return backbone, checkpoint


def build(kind, path, **arguments):
    backbone, checkpoint = guessing(path)
    settings = {"max_batch_size": 3, "max_model_len": 200, "max_prefill_tokens": 24, "speculation": "off"}
    engine = kind(backbone, ChatTokenizer.from_pretrained(path), checkpoint, **{**settings, **arguments})
    engine.set_tree(TREES[4])
    return engine


@cache
def pair(path, **arguments):
    engines = build(Engine, path, **arguments), build(GraphEngine, path, **arguments)
    assert isinstance(engines[1]._runner, GraphRunner)
    return engines


@pytest.fixture(scope="module")
def llama(make_backbone_dir):
    return make_backbone_dir("llama", vocab=VOCAB)


def assert_equal_runs(engines, prompts, params, tree=TREES[4]):
    """Generates on both; returns the reference's completions."""
    for engine in engines:
        engine.set_tree(tree)
    expected, got = (engine.generate(prompts, params) for engine in engines)
    for plain, graph in zip(expected, got, strict=True):
        assert graph.token_ids == plain.token_ids
        assert graph.accepted_per_step == plain.accepted_per_step
        assert (graph.text, graph.finish_reason, graph.seed) == (plain.text, plain.finish_reason, plain.seed)
        assert (graph.logprobs is None) == (plain.logprobs is None)
        for one, other in zip(graph.logprobs or [], plain.logprobs or [], strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert engines[1].stats().pages_used == engines[0].stats().pages_used == 0
    return expected


def params(**arguments):
    return SamplingParams(**{"max_tokens": LENGTH, "temperature": 0.0, "seed": 3, "ignore_eos": True, **arguments})


def test_mixed_requests_more_than_rows_and_prompts_in_chunks(llama):
    engines = pair(llama)
    greedy = engines[0].generate(PROMPTS[:2], params())
    each = [
        params(),
        params(stop_token_ids=(greedy[1].token_ids[3],)),
        params(temperature=0.9, stop=(greedy[0].text[2:4],), include_stop_str_in_output=True),
        params(temperature=1.2, top_k=20, top_p=0.8, n=2),
        params(temperature=0.7, min_p=0.1),
        params(temperature=1.0, ignore_eos=False, min_tokens=3, stop_token_ids=tuple(greedy[0].token_ids)),
        params(max_tokens=1),
    ]
    completions = assert_equal_runs(engines, PROMPTS, each, TREES[8])
    assert max(count for c in completions for count in c.accepted_per_step) > 2
    assert min(count for c in completions for count in c.accepted_per_step) == 1
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert engines[1]._runner.lag == 1


def test_requests_that_need_the_host_beside_others(llama):
    each = [
        params(frequency_penalty=0.8, logit_bias={7: 3.0, 9: -2.0}, logprobs=2),
        params(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4),
        params(temperature=0.8),
        params(temperature=0.9, logprobs=0, max_tokens=3),
        params(temperature=0.9, min_tokens=4, stop_token_ids=tuple(range(20, 200))),  # more than the GPU knows
    ]
    completions = assert_equal_runs(pair(llama), PROMPTS[:5], each)
    assert max(count for c in completions for count in c.accepted_per_step) > 1


def test_the_runner_changes_between_lag_and_none_while_sequences_run(llama):
    """A request for log-probabilities comes while others are one step ahead of the host, and leaves before them."""
    replies = []
    for engine in pair(llama):
        engine.add(PROMPTS[0], params(max_tokens=14, temperature=0.6), request_id="long")
        done = {}
        for step in range(100):
            if step == 2:
                engine.add(PROMPTS[2], params(max_tokens=3, logprobs=1), request_id="asking")
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = output.finished
            if step >= 2 and not engine.has_unfinished():
                break
        replies.append({name: (c.token_ids, c.accepted_per_step) for name, c in done.items()})
    assert replies[0] == replies[1]
    assert replies[0].keys() == {"long", "asking"}


@pytest.mark.slow
def test_preempted_sequences_go_on_where_they_were(llama):
    engines = pair(llama, kv_cache_gb=gigabytes(llama, 4), max_prefill_tokens=70)
    prompts = random_prompts([51, 49, 3], vocab=VOCAB, seed=1)
    completions = assert_equal_runs(engines, prompts, params(max_tokens=13, temperature=0.8), TREES[8])
    assert all(engine.stats().preemptions > 0 for engine in engines)
    assert [len(c.token_ids) for c in completions] == [13] * 3
    # The last may end from its tenth token on, nine of which it may have had when it lost its pages.
    ends = params(max_tokens=13, temperature=0.8, min_tokens=9, stop_token_ids=(completions[2].token_ids[9],))
    before = [engine.stats().preemptions for engine in engines]
    last = assert_equal_runs(engines, prompts, [params(max_tokens=13, temperature=0.8)] * 2 + [ends], TREES[8])[2]
    assert all(engine.stats().preemptions > count for engine, count in zip(engines, before, strict=True))
    assert last.token_ids == completions[2].token_ids[:10]


def test_a_second_turn_finds_the_pages_of_the_first_and_leaves_them_as_they_are(llama):
    """The page holds a prompt and the drafts that were accepted behind it; two requests then decode on it at once."""
    engines = [build(kind, llama) for kind in (Engine, GraphEngine)]
    prompts = random_prompts([PAGE_SIZE - 5], vocab=VOCAB, seed=4)
    (first,) = assert_equal_runs(engines, prompts, params(max_tokens=8), TREES[8])
    assert max(first.accepted_per_step[:3]) > 1
    text = [*first.prompt_token_ids, *first.token_ids]
    turns = [[*text, 7, 8], [*text, 9]]
    pages = [[*engine._cache.pool._digest_of] for engine in engines]
    assert [len(known) for known in pages] == [1, 1]
    before = [engine._cache.data[:, :, known].clone() for engine, known in zip(engines, pages, strict=True)]
    torch.testing.assert_close(before[1], before[0], atol=1e-4, rtol=1e-3)
    assert_equal_runs(engines, turns, params(max_tokens=4, temperature=0.7), TREES[8])
    for engine, known, content in zip(engines, pages, before, strict=True):
        assert engine.stats().reused_tokens == 2 * PAGE_SIZE
        assert torch.equal(engine._cache.data[:, :, known], content)


def test_a_reply_that_fills_the_context(llama):
    engines = pair(llama, max_model_len=24)
    completions = assert_equal_runs(engines, PROMPTS[3:5], params(max_tokens=50, temperature=0.5))
    assert [len(c.prompt_token_ids) + len(c.token_ids) for c in completions] == [24, 24]


@pytest.mark.parametrize("root", ["greedy", "sampled"])
def test_a_typical_engine_and_requests_that_ask_it_for_exact_acceptance(llama, root, monkeypatch):
    engines, rules = pair(llama, acceptance=Typical(epsilon=0.02, delta=0.4, root=root)), []
    monkeypatch.setattr(
        "medusa.engine.gpu_step.judge", lambda *args, **rule: rules.append(rule) or judge(*args, **rule)
    )
    lossy = params(temperature=1.0, max_tokens=4)
    exact = dataclasses.replace(lossy, acceptance="exact")
    completions = assert_equal_runs(engines, PROMPTS[:4], [exact, lossy, params(max_tokens=2), exact])
    plain = pair(llama)[0].generate(PROMPTS[:4], lossy)
    assert [completions[i].token_ids for i in (0, 3)] == [plain[i].token_ids for i in (0, 3)]
    assert rules and all(rule == {"epsilon": 0.02, "delta": 0.4} for rule in rules)


@pytest.mark.parametrize("family", ["gemma2", "phi3"])
def test_families_that_run_by_their_own_modules(make_backbone_dir, family):
    path = make_backbone_dir(family, vocab=VOCAB, tie_word_embeddings=False)
    completions = assert_equal_runs(pair(path), PROMPTS[:3], [params(), params(temperature=0.8), params(max_tokens=2)])
    assert sum(len(c.token_ids) for c in completions) == 2 * LENGTH + 2


def test_every_batch_of_trees_has_a_step_that_holds_it(llama):
    """Sizes are rounded up, however odd the batch and however many the nodes."""
    engine = build(GraphEngine, llama, max_batch_size=5)
    for batch in range(1, 6):
        for nodes in range(1, 65):
            shape = engine._runner._shapes.of([nodes] * batch, True)
            assert batch <= shape.batch <= 5
            assert batch * nodes <= shape.nodes < 2 * shape.batch * shape.max_nodes
            assert nodes <= shape.max_nodes <= 64
            assert engine._runner._step.logits(shape).shape == (shape.nodes, VOCAB)


@pytest.mark.parametrize("kind", [Engine, GraphEngine])
def test_steps_are_timed_at_the_contexts_that_they_are_named_after(llama, kind, monkeypatch):
    engine, contexts = build(kind, llama), []
    runner = engine._runner
    length_R = runner._step.state.length_R if kind is GraphEngine else runner._length
    decode = runner.decode

    def spy(sequences, trees, **named):
        contexts.append([int(length_R[sequence.row]) for sequence in sequences])
        return decode(sequences, trees, **named)

    monkeypatch.setattr(runner, "decode", spy)
    times = engine._profiler.measure({2: [[TREES[4], TREES[1]]]}, repeats=2, contexts=(9, 30))
    assert {context for _, _, context in times.seconds} == {9, 30}
    assert contexts == [[9, 9], [9, 9], [30, 30], [30, 30], [30, 30], [30, 30], [9, 9], [9, 9]]


def test_larger_trees_share_their_graphs(llama):
    """Not one a size: each is captured while requests wait."""
    engine = build(GraphEngine, llama, max_batch_size=2)
    assert {engine._runner._shapes.of([nodes, 1], True).max_nodes for nodes in range(65, 193)} == {128, 192}


def test_the_host_knows_a_prompts_first_token_when_it_changes_the_next_step(llama):
    """The runner was ahead of the host until the prompt's last chunk; a token may end the reply from the second on."""
    engines = pair(llama)
    (plain,) = assert_equal_runs(engines, PROMPTS[:1], params(max_tokens=3))
    assert engines[1]._runner.lag == 1
    first, second, _ = plain.token_ids
    stops = {second, *range(200, 210)} - {first}  # more than the GPU knows
    (completion,) = assert_equal_runs(engines, PROMPTS[:1], params(min_tokens=1, stop_token_ids=tuple(stops)))
    assert completion.token_ids == [first, second]


def test_the_host_lags_while_a_prompt_that_needs_it_is_read(llama):
    """It is needed from the first token on: until then the others' steps are not waited for."""
    engine = build(GraphEngine, llama, max_prefill_tokens=8)
    lags = []
    engine.add(PROMPTS[1], params(logprobs=1))  # 40 tokens
    while engine.has_unfinished() and len(lags) < 6:
        engine.step()
        lags.append(engine._runner.lag)
    assert lags == [1, 1, 1, 1, 0, 0]


def test_trees_wider_than_the_gpus_guesses_are_refused_at_the_start(llama):
    backbone, _ = guessing(llama)
    wide = TokenTree.from_paths([(rank,) for rank in range(33)])
    made = checkpoint_of(backbone, trees=[wide])
    with pytest.raises(ValueError, match="guess 32 of a head, but a GPU step has guesses 0 to 31"):
        GraphEngine(backbone, ChatTokenizer.from_pretrained(llama), made, max_model_len=200, speculation="off")
