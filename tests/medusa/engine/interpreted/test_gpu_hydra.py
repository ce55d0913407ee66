"""Hydra heads on the GPU's step, kernels interpreted: the plain drafter's drafts, and the reference runner's replies.

The backbone says mostly a permutation of the last token, and its heads guess it of the token before theirs on the path:
of each node another, so that a draft is right only below the right ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from functools import cache

import pytest
import torch

from medusa import Engine, HeadsConfig
from medusa.calibration import grow_on, guess_replies, head_accuracy, tokens_per_step, walk
from medusa.checkpoint import Calibration, Checkpoint, CheckpointMeta
from medusa.decoding import TreeBatch, Typical
from medusa.drafter import PathDrafter
from medusa.engine.gpu_hydra import GpuHydra
from medusa.engine.graph_runner import GraphRunner
from medusa.engine.runner import Runner
from medusa.engine.step_times import StepTimes
from medusa.engine.tree_rows import TreeRows
from medusa.hydra import HydraHeads
from medusa.kernels.draft import draft
from medusa.kernels.state import Drafts, RowState, Trees
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree
from tests.medusa.engine.interpreted.test_graph_runner import (
    PROMPTS,
    VOCAB,
    GraphEngine,
    assert_equal_runs,
    guessing,
    params,
)
from tests.medusa.engine.support import NUM_HEADS, TREES, Choosing, checkpoint_of, random_prompts

CPU = torch.device("cpu")
WIDTH = 4
ROWS = 6  # the last is nobody's


@pytest.fixture(scope="module")
def llama(make_backbone_dir):
    return make_backbone_dir("llama", vocab=VOCAB)


def knowing(path, trees=(8, 16)):
    """A backbone, and a checkpoint whose heads say what follows the last token of their path: the sum of a large bias,
    that SiLU leaves as it is, and that token's embedding; vocabulary rows without a mean do not see the bias."""
    backbone, _ = guessing(path)
    embedding = backbone.model.get_input_embeddings().weight.data
    embedding -= embedding.mean(-1, keepdim=True)
    after = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(7))
    head_weight = backbone.model.get_output_embeddings().weight.data
    head_weight[after] = embedding
    size = backbone.hidden_size
    config = HeadsConfig(hidden_size=size, vocab_size=VOCAB, num_heads=NUM_HEADS, vocabulary="own")
    heads = HydraHeads.initialised(config, head_weight)
    for head in range(NUM_HEADS):
        block = heads[head][0].linear
        block.weight.data[:, -size:] = 4 * torch.eye(size)
        block.bias.data.fill_(12.0)
    made = checkpoint_of(backbone, trees=[TREES[size] for size in trees])
    meta = CheckpointMeta.of(heads, made.meta.backbone, calibration=made.meta.calibration, trees=made.meta.trees)
    return backbone, Checkpoint(heads.eval().requires_grad_(False), meta)


def build(kind, path, trees=(8, 16), **arguments):
    backbone, checkpoint = knowing(path, trees)
    settings = {"max_batch_size": 3, "max_model_len": 200, "max_prefill_tokens": 24, "speculation": "off"}
    engine = kind(backbone, ChatTokenizer.from_pretrained(path), checkpoint, **(settings | arguments))
    assert type(engine._runner) is (GraphRunner if kind is GraphEngine else Runner)
    return engine


@cache
def pair(path, **arguments):
    return build(Engine, path, **arguments), build(GraphEngine, path, **arguments)


def random_heads(backbone, seed, **changes):
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=VOCAB, num_heads=NUM_HEADS, **changes)
    token_map = torch.randperm(VOCAB)[:120] if config.vocabulary == "truncated" else None
    heads = HydraHeads.initialised(config, backbone.lm_head_weight, token_map)
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return heads.eval().requires_grad_(False)


def random_tree(rng, num_nodes):
    paths = {()}
    while len(paths) < num_nodes:
        parent = rng.choice(sorted(path for path in paths if len(path) < NUM_HEADS))
        paths.add((*parent, rng.randrange(WIDTH)))
    return TokenTree.from_paths(paths)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary": "own"},
        {"vocabulary": "shared", "num_layers": 3},
        {"vocabulary": "truncated", "truncated_vocab_size": 120},
    ],
    ids=["own", "shared-layers", "truncated"],
)
@pytest.mark.parametrize("sizes", [[1, 2, 9, 30], [40], [5, 1, 1], [2, 2, 2, 2, 2]], ids=str)
def test_every_draft_is_the_plain_drafters(llama, changes, sizes):
    """Of rows in any order, one of them dead and one whose heads did not guess, with nodes of nobody behind."""
    backbone, _ = guessing(llama)
    rng, heads = random.Random(len(sizes)), random_heads(backbone, 1, **changes)
    trees = [random_tree(rng, size) for size in sizes]
    rows = rng.sample(range(ROWS - 1), len(trees))
    device_trees = Trees.roots(ROWS, 64, NUM_HEADS, CPU)
    counts = TreeRows(device_trees).place(rows, trees)
    state = RowState.empty(ROWS, NUM_HEADS, WIDTH, 1, CPU)
    state.root_R.random_(0, VOCAB, generator=torch.Generator().manual_seed(3))
    state.live_R[rows], state.num_guessed_R[rows] = 1, NUM_HEADS
    if len(rows) > 3:
        state.live_R[rows[0]], state.num_guessed_R[rows[1]] = 0, 0
    rows_B = torch.tensor(rows)
    hidden_Bd = torch.randn(len(rows), backbone.hidden_size, generator=torch.Generator().manual_seed(4))
    plain = PathDrafter(heads, backbone, ROWS, WIDTH)
    plain.remember(rows_B, hidden_Bd, NUM_HEADS)
    expected_BN = plain.propose(TreeBatch.stack(trees, CPU), rows_B, state.root_R[rows_B])

    ours = GpuHydra(heads, backbone, num_rows=ROWS, width=WIDTH)
    drafts = Drafts.empty(sum(counts) + 7, len(rows) + 1, CPU)
    ours.remember(hidden_Bd, rows_B.int(), state)
    rows_with_nobody = torch.tensor([*rows, ROWS - 1], dtype=torch.int32)
    draft(rows_with_nobody, torch.tensor([*counts, 0], dtype=torch.int32), device_trees, state, drafts)
    ours.propose(drafts, device_trees, state)
    seen = 0
    for b, row in enumerate(rows):
        start, valid = int(drafts.start_B[b]), drafts.valid_M[int(drafts.start_B[b]) :][: counts[b]].bool()
        assert valid.all() == bool(state.live_R[row] and (state.num_guessed_R[row] or counts[b] == 1))
        tokens = drafts.tokens_M[start : start + counts[b]][valid]
        assert tokens.tolist() == expected_BN[b, : counts[b]][valid].tolist()
        seen += int(valid.sum())
    assert seen == int(drafts.valid_M.sum()) > 0


def test_requests_that_join_and_leave(llama):
    each = [
        params(),
        params(temperature=1.2, top_k=20, top_p=0.8, max_tokens=3),
        params(temperature=0.8, repetition_penalty=1.3, logprobs=1, max_tokens=4),  # in halves, the host between them
    ]
    completions = assert_equal_runs(pair(llama, max_batch_size=2), PROMPTS[4:7], each, TREES[8])
    accepted = [count for completion in completions for count in completion.accepted_per_step]
    assert max(accepted) > 2
    assert min(accepted) == 1


def test_trees_of_several_sizes_in_a_step_and_other_ones_in_the_next(llama):
    """Plain decoding among them, of one sequence and of all. The other trees have every depth: where the deepest of a
    step has not, the reference runner asks fewer heads than this one."""
    spine = [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
    sides = [(1,), (0, 1), (1, 0), (2,), (1, 0, 0), (0, 0, 1), (0, 0, 0, 1), (1, 1)]
    trees = [TokenTree.from_paths(spine + sides[:count]) for count in (0, 3, 8)]
    replies = []
    for engine in pair(llama):
        steps = itertools.count()

        def choose(sequences, steps=steps):
            step = next(steps)
            chosen = [trees[(step + sequence.row) % 3] for sequence in sequences]
            return [TokenTree.root() if step % 4 == 3 or s.index else t for s, t in zip(sequences, chosen, strict=True)]

        engine._loop.speculation = Choosing(choose)
        each = [params(max_tokens=2, n=2), params(max_tokens=14, temperature=0.7)]
        completions = engine.generate(random_prompts([3, 9], vocab=VOCAB, seed=2), each)
        replies.append([(completion.token_ids, completion.accepted_per_step) for completion in completions])
    assert replies[0] == replies[1]
    assert {1, 5} <= set(replies[0][-1][1])


def test_typical_acceptance(llama):
    engines = pair(llama, acceptance=Typical(epsilon=0.02, delta=0.3))
    completions = assert_equal_runs(engines, PROMPTS[2:3], params(temperature=1.0))
    assert max(completions[0].accepted_per_step) > 1


@pytest.mark.slow
def test_other_hydra_heads_are_taken_by_a_running_engine(llama):
    """They say anything but what the old ones said, and guess for the step that comes."""
    replies = []
    for engine in (build(Engine, llama), build(GraphEngine, llama)):
        engine.set_tree(TREES[8])
        _, wrong = knowing(llama)
        for head in range(NUM_HEADS):
            wrong.heads[head][0].linear.weight.data.mul_(-1)
        engine.add(PROMPTS[2], params(max_tokens=12))
        done = []
        for step in range(20):
            if step == 3:
                engine.swap_heads(wrong)
            done += [output.finished for output in engine.step() if output.finished]
            if done and not engine.has_unfinished():
                break
        replies.append((done[0].token_ids, done[0].accepted_per_step))
    assert replies[0] == replies[1]
    accepted = replies[0][1]
    assert max(accepted[:2]) > 1
    assert set(accepted[3:]) == {1}


def calibrated(checkpoint, guessed):
    """The checkpoint with a ladder of trees that grew on these guesses."""
    accuracy, num_positions = head_accuracy(guessed, NUM_HEADS, WIDTH)
    growth, path_accuracy = grow_on(guessed, accuracy, 8)
    trees = [TokenTree.from_paths(growth[: size - 1]) for size in (4, 8)]
    calibration = Calibration(
        accuracy=accuracy,
        num_positions=num_positions,
        tokens_per_step=[tokens_per_step(guessed, tree) for tree in trees],
        growth=[list(path) for path in growth],
        path_accuracy=path_accuracy,
    )
    meta = dataclasses.replace(checkpoint.meta, calibration=calibration, trees=[tree.to_list() for tree in trees])
    return Checkpoint(checkpoint.heads, meta)


@pytest.mark.slow
def test_the_policy_chooses_trees_of_a_calibrated_ladder(llama):
    """Calibration says what each step of this runner accepts. Many nodes cost little in these step times, so that it
    speculates from the start."""
    times = StepTimes({(1, 1, 128): 1.0, (1, 16, 128): 1.1, (2, 2, 128): 1.0, (2, 32, 128): 1.2})
    engine = build(GraphEngine, llama, step_times=times, max_batch_size=2)
    prompts = [PROMPTS[2], PROMPTS[5]]
    plain = build(Engine, llama).generate(prompts, params(max_tokens=9))
    rows = [(c.prompt_token_ids, c.token_ids) for c in plain]
    guessed = list(guess_replies(engine.backbone, engine.checkpoint.heads, rows, WIDTH))
    engine.swap_heads(calibrated(engine.checkpoint, guessed))
    assert [tree.num_nodes for tree in engine.trees] == [1, 4, 8]
    accepted = {}
    for speculation in (8, "auto"):
        engine.set_speculation(speculation)
        completions = engine.generate(prompts, params(max_tokens=9))
        assert [c.token_ids for c in completions] == [c.token_ids for c in plain]
        accepted[speculation] = [c.accepted_per_step for c in completions]
    assert accepted[8] == [walk(item, engine.trees[-1]) for item in guessed]
    assert max(map(max, accepted["auto"])) > 2


@pytest.mark.slow
def test_step_times_are_measured_at_the_start(llama):
    """Of the shapes that the policy may choose for the ladder's largest tree."""
    engine = build(GraphEngine, llama, speculation="auto", trees=(2, 4), max_batch_size=1, max_model_len=10)
    assert {nodes for _, nodes, _ in engine.step_times.seconds} == {1, 4}
    (completion,) = engine.generate(PROMPTS[2:3], params())
    assert len(completion.token_ids) == 5
