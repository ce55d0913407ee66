"""What the host does between the halves of a step: logits changed along each node's path, log-probabilities read."""

from __future__ import annotations

import pytest
import torch

from medusa import Grammar, SamplingParams
from medusa.engine.sequence import Sequence
from medusa.engine.step import Done, StepTokens
from medusa.engine.tree_rows import TreeRows
from medusa.kernels.state import Trees
from medusa.sampling import penalise
from medusa.tree import TokenTree
from tests.medusa.engine.support import NUM_HEADS, load

pytest.importorskip("triton", reason="Triton is not installed")
from medusa.engine.host_work import HostWork, changes_logits, needs_host

VOCAB = 20
GROWTH = [(), (0,), (0, 0), (1,)]
TREE = TokenTree.from_paths(GROWTH)


@pytest.fixture
def sequence(tiny_llama):
    def make(output_ids=(5,), **params):
        tokenizer = load(tiny_llama)[1]
        made = Sequence("r", 0, [3, 4], SamplingParams(**params), seed=0, tokenizer=tokenizer, max_new_tokens=50)
        made.output_ids = list(output_ids)
        return made

    return make


@pytest.fixture
def work():
    return HostWork(TreeRows(Trees.roots(3, 64, NUM_HEADS, torch.device("cpu")), GROWTH))


@pytest.mark.parametrize(
    ("params", "changes", "needs"),
    [
        ({}, False, False),
        ({"min_tokens": 4}, False, False),
        ({"logprobs": 0}, False, True),
        ({"logit_bias": {3: 1.0}}, True, True),
        ({"presence_penalty": 0.5}, True, True),
        ({"min_tokens": 4, "stop_token_ids": tuple(range(9))}, True, True),
        ({"stop_token_ids": tuple(range(9))}, False, False),
        ({"grammar": Grammar("regex", "a*")}, True, True),
    ],
)
def test_who_needs_the_host(sequence, params, changes, needs):
    assert (changes_logits(sequence(**params)), needs_host(sequence(**params))) == (changes, needs)


def test_only_those_that_ask_are_changed_each_along_its_own_paths(sequence, work):
    logits, tokens = torch.randn(9, VOCAB), torch.arange(9)
    asking = sequence(frequency_penalty=1.0, repetition_penalty=1.5)
    changed = work.change([sequence(), asking], [TREE, TREE], [0, 4], logits, tokens)
    assert torch.equal(changed[:4], logits[:4])
    assert torch.equal(changed[8], logits[8])
    ancestors = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]).bool()
    assert torch.equal(changed[4:8], penalise(logits[4:8], asking.params, [3, 4], [5], tokens[4:8], ancestors))
    assert not torch.equal(changed[4:8], logits[4:8])
    assert work.change([sequence()], [TREE], [0], logits, tokens) is logits


def test_more_stop_ids_than_the_gpu_knows_wait_for_min_tokens(sequence, work):
    """The root has given 1 token, so nodes of depth 0 and 1 draw too early for min_tokens 3."""
    early = sequence(min_tokens=3, stop_token_ids=tuple(range(10)), ignore_eos=True)
    changed = work.change([early], [TREE], [0], torch.zeros(4, VOCAB), torch.zeros(4, dtype=torch.int64))
    assert changed[:, :10].isinf().all(1).tolist() == [True, True, False, True]
    assert not changed[:, 10:].isinf().any()


def test_first_tokens_are_changed_where_one_is_wanted(sequence, work):
    biased = sequence((), logit_bias={7: 9.0})
    logits = torch.zeros(3, VOCAB)
    changed = work.change_first([biased, biased, sequence(())], [True, False, True], logits, torch.zeros(3).long())
    assert changed[:, 7].tolist() == [9.0, 0.0, 0.0]
    assert work.change_first([biased], [False], logits[:1], torch.zeros(1).long()) is not None
    assert logits.eq(0).all()


def test_logprobs_are_those_of_the_accepted_nodes(sequence, work):
    logits = torch.randn(8, VOCAB)
    path = torch.tensor([[0, 3, -1], [0, 1, 2]], dtype=torch.int32)
    launched = Done([StepTokens([9, 8], []), StepTokens([7, 6, 5], [])])
    steps = work.logprobs([sequence(logprobs=2), sequence()], [4, 0], logits, path, launched).collect()
    expected = logits[[4, 7]].log_softmax(-1)
    assert [found.logprob for found in steps[0].logprobs] == pytest.approx(
        [float(expected[0, 9]), float(expected[1, 8])]
    )
    assert [found.top[0][0] for found in steps[0].logprobs] == expected.argmax(-1).tolist()
    assert steps[1] == StepTokens([7, 6, 5], [])
    plain = Done([])
    assert work.logprobs([sequence()], [0], logits, path, plain) is plain
