"""Calibration: what the offline walk says of a tree is what the engine does with it, step by step."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from medusa import Engine, SamplingParams, TokenTree
from medusa.calibration import ReplyGuesses, guess_replies, head_accuracy, tokens_per_step, walk
from medusa.checkpoint import BackboneRef, Calibration, Checkpoint, CheckpointMeta
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.training.batch import Row
from medusa.training.schedule import HeadsLossConfig, TrainerConfig
from medusa.training.trainer import Trainer
from medusa.tree import grow

NUM_HEADS, WIDTH = 3, 6
PROMPTS = ["How many foxes", "def fibonacci", "User: What is", "Water boils", "Explain step by step", "The capital of"]
TREES = {
    "root": TokenTree.root(),
    "chain": TokenTree.from_paths([(0,), (0, 0), (0, 0, 0)]),
    "wide": TokenTree.from_paths([(rank,) for rank in range(WIDTH)]),
    "odd": TokenTree.from_paths([(1,), (3,), (1, 0), (1, 2), (3, 1), (1, 0, 4)]),
    "grown": grow([[0.5, 0.2, 0.1, 0.05], [0.4, 0.2, 0.1], [0.3, 0.15]], 20),
}


def random_replies(count=40, vocab=4, width=3, seed=0):
    rng = random.Random(seed)
    for _ in range(count):
        length = rng.randrange(1, 15)
        reply = [rng.randrange(vocab) for _ in range(length)]
        guesses = [[rng.sample(range(vocab), width) for _ in range(NUM_HEADS)] for _ in range(length)]
        yield ReplyGuesses(reply, guesses)


def simulate(item, tree):
    """Every path of the tree against the tokens that follow; the prefill gives the first token."""
    steps, done = [], 1
    while done < len(item.reply):
        heads = item.guesses[done - 1]
        true_paths = [
            path
            for path in tree.paths
            if [heads[depth][rank] for depth, rank in enumerate(path)] == item.reply[done : done + len(path)]
        ]
        steps.append(min(max(map(len, true_paths)) + 1, len(item.reply) - done))
        done += steps[-1]
    return steps


@pytest.mark.parametrize(
    "tree",
    [
        TokenTree.root(),
        TokenTree.from_paths([(0,), (0, 0), (0, 0, 0)]),
        TokenTree.from_paths([(0,), (1,), (2,), (1, 0), (2, 2), (2, 2, 1)]),
        grow([[0.5, 0.3, 0.2]] * NUM_HEADS, 30),
    ],
)
def test_walk_equals_trying_every_path(tree):
    for item in random_replies():
        assert walk(item, tree) == simulate(item, tree)


def test_walk_of_plain_decoding_and_of_short_replies():
    item = ReplyGuesses([5, 6, 7], [[[6], [7], [0]]] * 3)
    chain = TREES["chain"]
    assert walk(item, TokenTree.root()) == [1, 1]
    assert walk(item, chain) == [2]  # two drafts and a bonus, of which two are in the reply
    assert walk(ReplyGuesses([5], [[[6], [7], [0]]]), chain) == []
    assert walk(ReplyGuesses([], []), chain) == []


def test_a_tree_deeper_than_the_heads_walks_as_far_as_they_guess():
    deep = TokenTree.from_paths([(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)])
    assert walk(ReplyGuesses([1] * 9, [[[1]] * 3] * 9), deep) == [4, 4]


def test_tokens_per_step_is_tokens_over_steps_of_the_whole_set():
    hit = ReplyGuesses([1] * 5, [[[1]] * 3] * 5)  # one step of 4
    miss = ReplyGuesses([1] * 4, [[[0]] * 3] * 4)  # three steps of 1
    assert tokens_per_step([hit, miss], TREES["chain"]) == pytest.approx(7 / 4)
    assert tokens_per_step([], TREES["chain"]) == 1.0
    assert tokens_per_step([ReplyGuesses([1], [[[1]] * 3])], TREES["chain"]) == 1.0


def test_head_accuracy_by_hand():
    # Head 0 guesses the next token, head 1 the one after. Of 5 tokens, 3 positions have a token for both heads.
    guesses = [
        [[11, 0], [0, 12]],  # of 11, 12: rank 0, rank 1
        [[0, 12], [13, 0]],  # of 12, 13: rank 1, rank 0
        [[0, 1], [2, 14]],  # of 13, 14: missed, rank 1
        [[14, 0], [0, 0]],  # head 1 has nothing to guess: not counted
        [[0, 0], [0, 0]],
    ]
    accuracy, positions = head_accuracy([ReplyGuesses([10, 11, 12, 13, 14], guesses)], num_heads=2, width=2)
    assert positions == 3
    assert accuracy == [[pytest.approx(1 / 3), pytest.approx(1 / 3)], [pytest.approx(1 / 3), pytest.approx(2 / 3)]]


def test_head_accuracy_without_a_position_is_zero():
    accuracy, positions = head_accuracy([ReplyGuesses([1, 2], [[[2]] * 3] * 2)], num_heads=3, width=1)
    assert (accuracy, positions) == ([[0.0]] * 3, 0)


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return ChatTokenizer.from_pretrained(tiny_llama)


def params(temperature):
    return [SamplingParams(max_tokens=60, temperature=temperature, seed=seed) for seed in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=[0.0, 0.8])
def plain_replies(request, backbone, tokenizer):
    """(temperature, completions of plain decoding)."""
    engine = Engine(backbone, tokenizer, max_batch_size=4, max_model_len=128)
    return request.param, engine.generate(PROMPTS, params(request.param))


@pytest.fixture(scope="module")
def checkpoint(plain_replies, backbone):
    """Heads that know a part of those replies: they hit and miss at every rank."""
    _, completions = plain_replies
    config = HeadsConfig(num_heads=NUM_HEADS, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    rows = [Row.of(c.prompt_token_ids, c.token_ids) for c in completions]
    settings = TrainerConfig(
        batch_size=6,
        max_length=96,
        lr=2e-2,
        max_steps=12,
        warmup_steps=2,
        epochs=12,
        bucket_batches=1,
        loss=HeadsLossConfig(kind="tokens"),
    )
    trainer = Trainer(backbone, MedusaHeads.initialised(config, backbone.lm_head_weight), rows, settings)
    while not trainer.finished:
        trainer.train_step(trainer.next_batches())
    ref = BackboneRef(name=backbone.name, weights_digest=backbone.digest)
    return Checkpoint(trainer.heads.eval().requires_grad_(False), CheckpointMeta(heads=config, backbone=ref))


@pytest.fixture(scope="module")
def guessed(plain_replies, checkpoint, backbone):
    _, completions = plain_replies
    rows = [(c.prompt_token_ids, c.token_ids) for c in completions]
    return list(guess_replies(backbone, checkpoint.heads, rows, WIDTH, batch_size=4))


@pytest.mark.parametrize("name", TREES)
def test_the_engine_takes_the_very_steps_of_the_walk(name, plain_replies, checkpoint, guessed, backbone, tokenizer):
    temperature, plain = plain_replies
    engine = Engine(backbone, tokenizer, checkpoint, max_batch_size=4, max_model_len=128, speculation="off")
    engine.set_tree(TREES[name])
    completions = engine.generate(PROMPTS, params(temperature))
    assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
    assert [c.accepted_per_step for c in completions] == [walk(item, TREES[name]) for item in guessed]
    steps = [kept for c in completions for kept in c.accepted_per_step]
    assert tokens_per_step(guessed, TREES[name]) == pytest.approx(sum(steps) / len(steps))
    if name != "root":  # the heads hit at times, and at times not: the equality above says something
        assert {1, 2} <= set(steps)


def test_a_ladder_that_the_heads_cannot_carry_is_refused_when_the_engine_starts(checkpoint, backbone, tokenizer):
    calibration = Calibration(accuracy=[[0.5]] * NUM_HEADS, num_positions=9)
    meta = replace(checkpoint.meta, calibration=calibration, trees=[[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]])
    with pytest.raises(ValueError, match="4 deep, but this engine has 3 Medusa heads"):
        Engine(backbone, tokenizer, Checkpoint(checkpoint.heads, meta), max_batch_size=1, speculation="off")


def test_guesses_are_made_on_the_hidden_state_before_each_reply_token(plain_replies, checkpoint, guessed, backbone):
    _, completions = plain_replies
    assert [item.reply for item in guessed] == [c.token_ids for c in completions]
    for completion, item in zip(completions, guessed, strict=True):
        ids, start = completion.prompt_token_ids + completion.token_ids, len(completion.prompt_token_ids)
        hidden = backbone.hidden_states(torch.tensor([ids]))[0]
        assert len(item.guesses) == len(item.reply)
        for i in (0, len(item.reply) - 1):
            made, _ = checkpoint.heads.guess(hidden[[start - 1 + i]], backbone.lm_head_weight, WIDTH, backbone.cap)
            assert made[0].tolist() == item.guesses[i]


def test_accuracy_counts_every_hit_of_real_guesses(guessed):
    accuracy, positions = head_accuracy(guessed, NUM_HEADS, WIDTH)
    counted = [(item, i) for item in guessed for i in range(len(item.reply) - NUM_HEADS)]
    assert positions == len(counted)
    for k in range(NUM_HEADS):
        hits = sum(item.reply[i + k + 1] in item.guesses[i][k] for item, i in counted)
        assert sum(accuracy[k]) == pytest.approx(hits / positions)
    assert 0.05 < accuracy[0][0] < 1
