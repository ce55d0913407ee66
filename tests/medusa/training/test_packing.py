"""Packed rows: the hidden states, gradients, losses and steps of rows that stand apart."""

from __future__ import annotations

import random

import pytest
import torch

from medusa.attention import PackedRows
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone, UnsupportedModelError
from medusa.training.batch import Row, collate
from medusa.training.hidden import ComputedHidden, check_packing, forward
from medusa.training.schedule import TrainerConfig
from medusa.training.trainer import Trainer

NUM_HEADS = 3


def make_rows(count=12, seed=0, vocab=512):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]

    return [Row.of(ids(2, 8), ids(2, 14)) for _ in range(count)]


def test_rows_come_apart_and_together_again():
    rows = PackedRows.of([3, 1, 5])
    assert rows.position_1N.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 4]]
    line = torch.randn(1, 2, 9, 4)  # heads of 9 tokens
    apart = rows.apart(line)
    assert apart.shape == (3, 2, 5, 4)
    assert torch.equal(apart[2], line[0, :, 4:])
    assert torch.equal(rows.packed(apart), line.transpose(1, 2))


def test_pitfall_packing_labels_and_next_tokens_are_those_of_rows_apart():
    rows = make_rows()
    packed = collate(rows, range(len(rows)), NUM_HEADS, packed=True)
    apart = collate(rows, packed.row_indices, NUM_HEADS)
    assert packed.tokens_BT.shape == (1, sum(map(len, rows)))  # without padding
    for name in ("labels_NK", "next_N", "ahead_NK"):
        assert torch.equal(getattr(packed, name), getattr(apart, name)), name
    assert packed.positions_per_row == apart.positions_per_row
    assert (packed.rows.position_1N == 0).sum() == len(rows)  # positions restart at each row


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox"])
def test_packed_rows_have_the_hidden_states_of_rows_apart(make_backbone_dir, family):
    changes = {"sliding_window": 6} if family in ("mistral", "gemma2", "gemma3_text") else {}
    backbone = Backbone.from_pretrained(make_backbone_dir(family, **changes), device="cpu")
    rows, hidden = make_rows(), ComputedHidden(backbone)
    packed = collate(rows, range(len(rows)), NUM_HEADS, packed=True)
    apart = collate(rows, packed.row_indices, NUM_HEADS)
    torch.testing.assert_close(hidden(packed), hidden(apart), rtol=1e-4, atol=1e-4)
    check_packing(backbone)


def test_gradients_are_those_of_rows_apart(tiny_llama):
    gradients = []
    for packed in (True, False):
        backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
        backbone.model.requires_grad_(True)
        batch = collate(make_rows(), range(12), NUM_HEADS, packed=packed)
        forward(backbone, batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4)


def test_no_rows_are_a_line_of_padding(tiny_llama):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    assert ComputedHidden(backbone)(collate([], [], NUM_HEADS, packed=True)).shape == (0, backbone.hidden_size)


def test_a_model_that_attends_across_rows_is_refused(tiny_llama, monkeypatch):
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    whole = backbone.trainable_hidden_states
    monkeypatch.setattr(backbone, "trainable_hidden_states", lambda ids_BT, _: whole(ids_BT))
    with pytest.raises(UnsupportedModelError, match="llama attends across the rows of a packed line"):
        check_packing(backbone)


@pytest.mark.parametrize("cache_gib", [0.0, 0.1])
def test_packed_training_takes_the_steps_of_rows_apart(tiny_llama, cache_gib):
    losses = []
    for packing in (False, True):
        backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
        config = HeadsConfig(num_heads=NUM_HEADS, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
        trainer = Trainer(
            backbone,
            MedusaHeads.initialised(config, backbone.lm_head_weight),
            make_rows(20),
            TrainerConfig(batch_size=8, max_length=40, lr=5e-3, packing=packing, hidden_cache_gib=cache_gib),
        )
        losses.append([])
        while not trainer.finished:
            losses[-1].append(trainer.take_record(trainer.train_step(trainer.next_batches()))["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
