"""Packed lines: the hidden states, losses and steps of rows that stand apart."""

from __future__ import annotations

import random

import pytest
import torch

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone, UnsupportedModelError
from medusa.training.batch import Row, collate, pack_lines
from medusa.training.hidden import ComputedHidden, check_packing
from medusa.training.schedule import TrainerConfig
from medusa.training.trainer import Trainer

NUM_HEADS = 3


def make_rows(count=12, seed=0, vocab=512):
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(3, vocab) for _ in range(rng.randint(low, high))]

    return [Row.of(ids(2, 8), ids(2, 14)) for _ in range(count)]


def test_lines_hold_every_row_once_within_their_capacity():
    lengths = [random.Random(1).randint(1, 30) for _ in range(50)]
    lines = pack_lines(list(range(50)), lengths, 32)
    assert sorted(sum(lines, [])) == list(range(50))
    assert all(sum(lengths[row] for row in line) <= 32 for line in lines)
    assert len(lines) <= 1.3 * sum(lengths) / 32 + 1
    with pytest.raises(ValueError, match="row 7 has 40 tokens, a packed line holds 32"):
        pack_lines([7], [40], 32)


def test_pitfall_packing_labels_and_next_tokens_are_those_of_rows_apart():
    rows = make_rows()
    packed = collate(rows, range(len(rows)), NUM_HEADS, 40)
    apart = collate(rows, packed.row_indices, NUM_HEADS)
    assert packed.tokens_BT.shape[0] < len(rows)
    for name in ("labels_NK", "next_N", "ahead_NK"):
        assert torch.equal(getattr(packed, name), getattr(apart, name)), name
    assert packed.positions_per_row == apart.positions_per_row
    starts_BT = packed.position_ids_BT == 0
    assert (starts_BT & (packed.tokens_BT != 0)).sum() == len(rows)  # positions restart at each row


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox"])
def test_packed_rows_have_the_hidden_states_of_rows_apart(make_backbone_dir, family):
    changes = {"sliding_window": 6} if family in ("mistral", "gemma2", "gemma3_text") else {}
    backbone = Backbone.from_pretrained(make_backbone_dir(family, **changes), device="cpu")
    rows, hidden = make_rows(), ComputedHidden(backbone)
    packed = collate(rows, range(len(rows)), NUM_HEADS, 40)
    apart = collate(rows, packed.row_indices, NUM_HEADS)
    torch.testing.assert_close(hidden(packed), hidden(apart), rtol=1e-4, atol=1e-4)
    check_packing(backbone)


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
