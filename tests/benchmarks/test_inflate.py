"""Inflating: the large shape says what the small model says, heads included, and costs what its shape costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.inflate import SHAPES, inflate, inflate_checkpoint, inflate_model
from medusa import Engine, HeadsConfig, MedusaHeads, SamplingParams
from medusa.checkpoint import BackboneRef, Checkpoint, CheckpointMeta
from medusa.heads import DraftHeads
from medusa.hydra import HydraHeads
from medusa.model import Backbone
from medusa.tokenizer import ChatTokenizer
from medusa.tree import grow

TREE = grow([[0.5, 0.3, 0.1], [0.4, 0.2], [0.3]], 10)


@pytest.fixture(scope="module")
def small(tiny_llama: Path) -> Backbone:
    return Backbone.from_pretrained(tiny_llama, device="cpu")


@pytest.fixture(scope="module")
def big(small: Backbone) -> Backbone:
    return inflate(small, "tiny-test", dtype=torch.float32, device="cpu")


def random_heads(
    backbone: Backbone, vocabulary: str, num_layers: int = 1, kind: type[DraftHeads] = MedusaHeads
) -> Checkpoint:
    truncated = 100 if vocabulary == "truncated" else None
    config = HeadsConfig(
        hidden_size=backbone.hidden_size,
        vocab_size=backbone.vocab_size,
        num_heads=3,
        num_layers=num_layers,
        vocabulary=vocabulary,
        truncated_vocab_size=truncated,
    )
    torch.manual_seed(1)
    heads = kind(config, torch.randperm(backbone.vocab_size)[:truncated] if truncated else None)
    for parameter in heads.parameters():
        parameter.data.normal_(0, 0.2)
    ref = BackboneRef(name=backbone.name, weights_digest=backbone.digest)
    return Checkpoint(heads.eval().requires_grad_(False), CheckpointMeta.of(heads, ref))


def test_the_logits_are_the_small_models(small: Backbone, big: Backbone) -> None:
    ids = torch.randint(6, small.vocab_size, (2, 40), generator=torch.Generator().manual_seed(3))
    expected = small.logits(small.hidden_states(ids))
    assert torch.allclose(big.logits(big.hidden_states(ids)), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.1  # there is something to be equal to


def test_dead_channels_hold_nothing_and_their_weights_are_noise(small: Backbone, big: Backbone) -> None:
    ids = torch.randint(6, small.vocab_size, (1, 20), generator=torch.Generator().manual_seed(4))
    hidden = big.hidden_states(ids)[..., small.hidden_size :]
    assert hidden.abs().max() == 0
    for layer in big.model.model.layers:
        for linear in (layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
            assert (linear.weight == 0).float().mean() < 0.01
    assert (big.lm_head_weight == 0).float().mean() < 0.01


def test_the_shape_is_what_was_asked_for(big: Backbone) -> None:
    shape = SHAPES["tiny-test"]
    assert (big.hidden_size, big.num_layers, big.kv_shape) == (320, 10, (4, 128))
    assert big.model.model.layers[0].mlp.up_proj.weight.shape == (shape.intermediate_size, 320)


@pytest.mark.parametrize(
    ("name", "vocab_size", "parameters"),
    [
        ("vicuna-7b", 32_000, 6_738_415_616),
        ("vicuna-13b", 32_000, 13_015_864_320),
        ("vicuna-33b", 32_000, 32_528_943_616),
        ("llama3-8b", 128_256, 8_030_261_248),
    ],
)
def test_large_shapes_have_the_published_numbers_of_parameters(name: str, vocab_size: int, parameters: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**vars(SHAPES[name]), vocab_size=vocab_size, tie_word_embeddings=False))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(("vocabulary", "num_layers"), [("own", 1), ("own", 2), ("shared", 1), ("truncated", 1)])
def test_the_heads_guess_the_same(small: Backbone, big: Backbone, vocabulary: str, num_layers: int) -> None:
    checkpoint = random_heads(small, vocabulary, num_layers)
    inflated = inflate_checkpoint(checkpoint, big)
    ids = torch.randint(6, small.vocab_size, (1, 60), generator=torch.Generator().manual_seed(5))
    expected, expected_logprobs = checkpoint.heads.guess(small.hidden_states(ids)[0], small.lm_head_weight, 5)
    guesses, logprobs = inflated.heads.guess(big.hidden_states(ids)[0], big.lm_head_weight, 5)
    assert torch.equal(guesses, expected)
    assert torch.allclose(logprobs, expected_logprobs, atol=1e-4)
    features = inflated.heads.features(0, big.hidden_states(ids)[0])[:, small.hidden_size :]
    assert features.abs().max() == 0
    weight = inflated.heads[0][0].linear.weight
    assert (weight[:, small.hidden_size :] == 0).float().mean() < 0.01  # noise, where it reads dead channels


@pytest.mark.parametrize("num_layers", [1, 2])
def test_hydra_heads_guess_the_same(small: Backbone, big: Backbone, num_layers: int) -> None:
    checkpoint = random_heads(small, "own", num_layers, HydraHeads)
    inflated = inflate_checkpoint(checkpoint, big)
    assert isinstance(inflated.heads, HydraHeads)
    ids = torch.randint(6, small.vocab_size, (1, 60), generator=torch.Generator().manual_seed(5))
    for head in range(3):
        path = ids[0].unfold(0, head + 1, 1)
        found = [
            of.heads.guess_next(head, each.hidden_states(ids)[0, : len(path)], path, each.embed, each.lm_head_weight, 5)
            for of, each in ((checkpoint, small), (inflated, big))
        ]
        assert torch.equal(found[1][0], found[0][0])
        assert torch.allclose(found[1][1], found[0][1], atol=1e-4)


@pytest.mark.parametrize("kind", [MedusaHeads, HydraHeads])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_engine_decodes_the_same_with_both(
    small: Backbone, big: Backbone, tiny_llama: Path, kind: type[DraftHeads], num_layers: int
) -> None:
    tokenizer = ChatTokenizer.from_pretrained(tiny_llama)
    checkpoint = random_heads(small, "own", num_layers, kind)
    replies = []
    for backbone, heads in ((small, checkpoint), (big, inflate_checkpoint(checkpoint, big))):
        engine = Engine(backbone, tokenizer, heads, max_batch_size=2, max_model_len=64, speculation="off")
        engine.set_tree(TREE)
        params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
        replies.append(engine.generate([[7, 8, 9], [11, 40]], params))
    assert [c.token_ids for c in replies[0]] == [c.token_ids for c in replies[1]]
    assert [c.accepted_per_step for c in replies[0]] == [c.accepted_per_step for c in replies[1]]


def test_grouped_heads_move_to_shapes_without_groups(make_backbone_dir) -> None:
    small = Backbone.from_pretrained(make_backbone_dir("llama", seed=2), device="cpu")
    shape = SHAPES["tiny-test"]
    plain = type(shape)(**{**vars(shape), "num_key_value_heads": 8})
    ids = torch.randint(6, small.vocab_size, (1, 30), generator=torch.Generator().manual_seed(6))
    big = inflate_model(small.model, plain, dtype=torch.float32, device="cpu")
    assert torch.allclose(big(ids).logits, small.logits(small.hidden_states(ids)), atol=1e-4, rtol=0)


def test_what_does_not_fit_is_refused(small: Backbone, big: Backbone, make_backbone_dir) -> None:
    with pytest.raises(ValueError, match="no shape 'vicuna-70b'"):
        inflate(small, "vicuna-70b", dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="hidden_size 320 of the small model does not fit the shape's 64"):
        shape = SHAPES["tiny-test"]
        inflate_model(big.model, type(shape)(**{**vars(shape), "hidden_size": 64}), dtype=torch.float32, device="cpu")
    other = Backbone.from_pretrained(make_backbone_dir("llama", seed=5), device="cpu")
    with pytest.raises(ValueError, match="was not inflated from"):
        inflate_checkpoint(random_heads(other, "shared"), big)
    qwen = Backbone.from_pretrained(make_backbone_dir("qwen2"), device="cpu")
    with pytest.raises(ValueError, match="only Llama models can be inflated"):
        inflate(qwen, "tiny-test", dtype=torch.float32, device="cpu")
