"""Hydra heads: what a head sees, how a tree is filled, and that the engine stays lossless with them."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch

from medusa import Engine, SamplingParams, TokenTree
from medusa.calibration import guess_replies, walk
from medusa.checkpoint import BackboneRef, Checkpoint, CheckpointError, CheckpointMeta, load_checkpoint, save_checkpoint
from medusa.decoding import TreeBatch
from medusa.drafter import PathDrafter, make_drafter, plan_depths
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.hydra import HydraHeads, embed_path
from medusa.model import Backbone, UnsupportedModelError
from medusa.tokenizer import ChatTokenizer
from medusa.training.batch import Row
from medusa.training.schedule import HeadsLossConfig, TrainerConfig
from medusa.training.trainer import Trainer

NUM_HEADS, WIDTH = 3, 3


@pytest.fixture(scope="module")
def backbone(tiny_llama):
    return Backbone.from_pretrained(tiny_llama, device="cpu")


def make_heads(backbone, seed=0, spread=0.3, **changes):
    """Heads away from their start, so that every token they see matters."""
    config = HeadsConfig(
        num_heads=NUM_HEADS, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size, **changes
    )
    token_map = torch.arange(0, backbone.vocab_size, 2) if config.vocabulary == "truncated" else None
    heads = HydraHeads.initialised(config, backbone.lm_head_weight, token_map)
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    return heads.eval().requires_grad_(False)


def make_checkpoint(backbone, tokenizer, heads):
    reference = BackboneRef(name="tiny", weights_digest=backbone.digest, tokenizer_digest=tokenizer.digest)
    return Checkpoint(heads, CheckpointMeta.of(heads, reference))


def random_tree(seed, num_nodes):
    rng = random.Random(seed)
    paths = {()}
    while len(paths) < num_nodes:
        parent = rng.choice(sorted(path for path in paths if len(path) < NUM_HEADS))
        paths.add((*parent, rng.randrange(WIDTH)))
    return TokenTree.from_paths(paths)


def filled_by_hand(backbone, heads, tree, root, hidden_d):
    """Each node asks its parent's guesses on its own, one path at a time."""
    tokens = {(): root}
    for path in tree.paths[1:]:
        seen = [tokens[path[:depth]] for depth in range(len(path))]
        ids, _ = heads.guess_next(
            len(path) - 1, hidden_d[None], torch.tensor([seen]), backbone.embed, backbone.lm_head_weight, WIDTH
        )
        tokens[path] = int(ids[0, path[-1]])
    return [tokens[path] for path in tree.paths]


@pytest.mark.parametrize(
    "changes", [{}, {"vocabulary": "shared"}, {"vocabulary": "truncated", "truncated_vocab_size": 256}]
)
def test_a_tree_is_filled_as_path_by_path(backbone, changes):
    heads = make_heads(backbone, **changes)
    trees = [random_tree(seed, nodes) for seed, nodes in ((0, 12), (1, 1), (2, 20))]
    hidden_Rd = torch.randn(5, backbone.hidden_size, generator=torch.Generator().manual_seed(3))
    rows_B, root_B = torch.tensor([4, 0, 2]), torch.tensor([7, 11, 300])
    drafter = make_drafter(heads, backbone, num_rows=5, width=WIDTH)
    drafter.remember(rows_B, hidden_Rd[rows_B], NUM_HEADS)
    tokens_BN = drafter.propose(TreeBatch.stack(trees, torch.device("cpu")), rows_B, root_B)
    for b, tree in enumerate(trees):
        by_hand = filled_by_hand(backbone, heads, tree, int(root_B[b]), hidden_Rd[rows_B[b]])
        assert tokens_BN[b, : tree.num_nodes].tolist() == by_hand


def test_only_nodes_with_children_are_asked():
    tree = TokenTree.from_paths([(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 0, 1)])
    plans = plan_depths(TreeBatch.stack([tree, TokenTree.root()], torch.device("cpu")))
    asked = [[tree.paths[node] for node in plan.asked_node_M.tolist()] for plan in plans]
    assert asked == [[()], [(0,), (2,)], [(0, 0)]]
    assert all(not plan.asked_row_M.any() for plan in plans)  # the second tree is its root alone


def test_plan_is_made_once_while_the_trees_stay(backbone, monkeypatch):
    made = []
    monkeypatch.setattr("medusa.drafter.plan_depths", lambda tree: made.append(1) or plan_depths(tree))
    drafter = PathDrafter(make_heads(backbone), backbone, 2, WIDTH)
    rows_B, root_B = torch.tensor([0]), torch.tensor([5])
    for tree, steps in ((random_tree(0, 8), 3), (random_tree(1, 8), 2)):
        batch = TreeBatch.stack([tree], torch.device("cpu"))
        for _ in range(steps):
            drafter.propose(batch, rows_B, root_B)
    assert len(made) == 2


def test_a_head_sees_the_tokens_before_its_own_and_no_others(backbone):
    heads = make_heads(backbone)
    hidden = torch.randn(1, backbone.hidden_size)
    ids = torch.tensor([[5, 6, 7]])
    for k, changed in itertools.product(range(NUM_HEADS), range(NUM_HEADS)):
        other = ids.clone()
        other[0, changed] = 99
        one, two = (heads.features(k, hidden, embed_path(backbone.embed, x)) for x in (ids, other))
        assert torch.equal(one, two) == (changed > k), (k, changed)
    with pytest.raises(ValueError, match="need the embeddings of the tokens ahead"):
        heads.features(0, hidden)


def test_what_training_teaches_is_what_decoding_asks_for(backbone):
    """Heads that know replies by heart guess them when asked as the drafter asks: with the tokens drawn so far."""
    rng = random.Random(5)
    rows = [Row.of(rng.sample(range(3, 400), 4), rng.sample(range(3, 400), 12)) for _ in range(4)]
    config = HeadsConfig(num_heads=NUM_HEADS, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = HydraHeads.initialised(config, backbone.lm_head_weight)
    numbers = TrainerConfig(
        max_steps=40, batch_size=4, lr=2e-2, warmup_steps=2, grad_clip=None, loss=HeadsLossConfig(kind="tokens")
    )
    trainer = Trainer(backbone, heads, rows, numbers)
    while not trainer.finished:
        trainer.train_step(trainer.next_batches())
    heads.eval().requires_grad_(False)
    for row in rows:
        ids = row.token_ids
        hidden_Td = backbone.hidden_states(ids[None])[0]
        for k in range(NUM_HEADS):
            starts = range(row.prompt_length - 1, len(ids) - k - 2)  # the last prompt token's hidden state on
            drawn = torch.stack([ids[t + 1 : t + k + 2] for t in starts])
            guesses, _ = heads.guess_next(
                k, hidden_Td[list(starts)], drawn, backbone.embed, backbone.lm_head_weight, 1, backbone.cap
            )
            assert guesses[:, 0].tolist() == [int(ids[t + k + 2]) for t in starts], k


def test_new_heads_are_the_lm_head(backbone):
    heads = make_heads(backbone, spread=0.0, num_layers=2)
    hidden = torch.randn(4, backbone.hidden_size)
    ids, logprobs = heads.guess_next(1, hidden, torch.tensor([[1, 2]] * 4), backbone.embed, backbone.lm_head_weight, 5)
    expected = (hidden @ backbone.lm_head_weight.T).log_softmax(-1).topk(5)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logprobs, expected.values)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_engine_gives_the_tokens_of_plain_decoding(backbone, tiny_llama, temperature):
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    heads = make_heads(backbone, spread=0.05)
    prompts = [[1, 5 + i, 40 + 3 * i, 7] for i in range(5)]
    params = SamplingParams(max_tokens=24, temperature=temperature, seed=3, ignore_eos=True)
    plain = Engine(backbone, tokenizer, max_batch_size=3, max_model_len=128).generate(prompts, params)
    engine = Engine(
        backbone,
        tokenizer,
        make_checkpoint(backbone, tokenizer, heads),
        max_batch_size=3,
        max_model_len=128,
        speculation="off",
    )
    engine.set_tree(random_tree(4, 16))
    ours = engine.generate(prompts, params)
    assert [c.token_ids for c in ours] == [c.token_ids for c in plain]
    assert all(sum(c.accepted_per_step) == 23 for c in ours)


def test_offline_walk_equals_the_engine_step_by_step(backbone, tiny_llama):
    """Heads trained for a few steps, so that some drafts are kept."""
    from medusa.training.batch import Row
    from medusa.training.schedule import HeadsLossConfig, TrainerConfig
    from medusa.training.trainer import Trainer

    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    prompts = [[1, 5 + i, 40 + 3 * i, 7] for i in range(6)]
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    plain = Engine(backbone, tokenizer, max_batch_size=6, max_model_len=128).generate(prompts, params)
    replies = [(prompt, completion.token_ids) for prompt, completion in zip(prompts, plain, strict=True)]
    heads = make_heads(backbone, spread=0.0).requires_grad_(True)
    tokens = HeadsLossConfig(kind="tokens")
    config = TrainerConfig(max_steps=40, batch_size=6, lr=1e-2, warmup_steps=2, grad_clip=None, loss=tokens)
    trainer = Trainer(backbone, heads, [Row.of(*reply) for reply in replies], config)
    while not trainer.finished:
        record = trainer.take_record(trainer.train_step(trainer.next_batches()))
    assert record["head_2/top1_accuracy"] > 0.9
    heads = heads.eval().requires_grad_(False)
    tree = random_tree(4, 16)
    engine = Engine(
        backbone,
        tokenizer,
        make_checkpoint(backbone, tokenizer, heads),
        max_batch_size=4,
        max_model_len=128,
        speculation="off",
    )
    engine.set_tree(tree)
    decoded = engine.generate(prompts, params)
    walked = [walk(item, tree) for item in guess_replies(backbone, heads, replies, WIDTH, batch_size=4)]
    assert [c.accepted_per_step for c in decoded] == walked
    assert sum(map(sum, walked)) / sum(map(len, walked)) > 1.5


def test_checkpoint_round_trip_has_keys_and_schema_of_its_own(backbone, tmp_path):
    heads = make_heads(backbone, num_layers=2)
    reference = BackboneRef(name="tiny", weights_digest=backbone.digest)
    save_checkpoint(tmp_path / "heads", heads, CheckpointMeta.of(heads, reference))
    loaded = load_checkpoint(tmp_path / "heads", backbone)
    assert isinstance(loaded.heads, HydraHeads)
    torch.testing.assert_close(loaded.heads.state_dict(), heads.state_dict(), rtol=0, atol=0)
    meta = json.loads((tmp_path / "heads" / "medusa.json").read_text())
    assert (meta["schema_version"], meta["head_kind"]) == (2, "hydra")
    assert json.loads((tmp_path / "heads" / "config.json").read_text())["model_type"] == "hydra"
    from safetensors.torch import load_file

    names = load_file(tmp_path / "heads" / "medusa_lm_head.safetensors")
    assert names["hydra.1.0.linear.weight"].shape == (64, 3 * 64)
    assert all(name.startswith("hydra.") for name in names)


def test_kinds_do_not_pass_for_each_other(backbone, tmp_path):
    heads = make_heads(backbone)
    reference = BackboneRef(name="tiny", weights_digest=backbone.digest)
    medusa = MedusaHeads.initialised(heads.config, backbone.lm_head_weight)
    with pytest.raises(CheckpointError, match="hydra heads with meta data of medusa heads"):
        save_checkpoint(tmp_path / "one", heads, CheckpointMeta.of(medusa, reference))
    save_checkpoint(tmp_path / "two", heads, CheckpointMeta.of(heads, reference))
    meta = json.loads((tmp_path / "two" / "medusa.json").read_text())
    (tmp_path / "two" / "medusa.json").write_text(json.dumps(meta | {"head_kind": "medusa", "schema_version": 1}))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path / "two", backbone)


def test_embeddings_of_another_size_are_refused(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    backbone.model.set_input_embeddings(torch.nn.Embedding(512, 32))
    with pytest.raises(UnsupportedModelError, match="embeddings of size 32"):
        embed_path(backbone.embed, torch.tensor([1]))
