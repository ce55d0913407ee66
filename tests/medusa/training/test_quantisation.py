"""Quantised frozen backbones and optimiser moments, by bitsandbytes' kernels for CPUs."""

from __future__ import annotations

import pytest
import torch

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.model import Backbone
from medusa.training.quantisation import quantise
from medusa.training.schedule import TrainerConfig
from medusa.training.trainer import Trainer
from tests.medusa.training.test_trainer import make_rows, run


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_heads_learn_on_a_quantised_backbone(tiny_llama, bits):
    exact = Backbone.from_pretrained(tiny_llama, device="cpu")
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    quantise(backbone.model, bits)
    ids = torch.arange(3, 60)[None]
    ours, theirs = backbone.hidden_states(ids), exact.hidden_states(ids)
    similarity = torch.cosine_similarity(ours, theirs, dim=-1).mean()
    assert similarity > 0.95 and not torch.equal(ours, theirs)
    assert torch.equal(backbone.lm_head_weight, exact.lm_head_weight)
    config = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    trainer = Trainer(backbone, heads, make_rows(8), TrainerConfig(max_steps=6, batch_size=8, max_length=48, lr=1e-2))
    losses = run(trainer)
    assert losses[-1] < losses[0]


def test_an_optimiser_of_8_bits_learns_and_resumes_with_the_same_numbers(tiny_llama, tmp_path):

    def make():
        backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
        config = HeadsConfig(num_heads=2, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
        heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
        numbers = TrainerConfig(max_steps=6, batch_size=8, max_length=48, lr=1e-2, optimizer="adamw_8bit")
        return Trainer(backbone, heads, make_rows(8), numbers)

    undisturbed = run(make())
    assert undisturbed[-1] < undisturbed[0]
    first, second = make(), make()
    before = run(first, steps=3)
    assert torch.uint8 in {value.dtype for value in first.optimiser.state_dict().values() if torch.is_tensor(value)}
    first.save_state(tmp_path / "state")
    second.load_state(tmp_path / "state")
    assert before + run(second) == undisturbed


def test_the_extra_is_named_where_it_is_missing(tiny_llama, monkeypatch):
    import sys

    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    backbone = Backbone.from_pretrained(tiny_llama, device="cpu")
    with pytest.raises(ImportError, match=r"pip install 'medusa-on-ray\[quantized\]'"):
        quantise(backbone.model, "4bit")
    config = HeadsConfig(num_heads=1, hidden_size=backbone.hidden_size, vocab_size=backbone.vocab_size)
    heads = MedusaHeads.initialised(config, backbone.lm_head_weight)
    with pytest.raises(ImportError, match=r"pip install 'medusa-on-ray\[quantized\]'"):
        Trainer(backbone, heads, make_rows(4), TrainerConfig(optimizer="adamw_8bit"))
