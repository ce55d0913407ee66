"""Medusa heads on the GPU's step, kernels interpreted: the guesses of `MedusaHeads.guess`, in the sequences' rows."""

from __future__ import annotations

import pytest
import torch

from medusa import HeadsConfig, MedusaHeads
from medusa.engine.gpu_heads import GpuHeads
from medusa.kernels.state import RowState
from medusa.model import Backbone
from tests.medusa.engine.support import NUM_HEADS

VOCAB, ROWS, WIDTH = 300, 6, 7  # the last row is nobody's


def random_heads(backbone, seed, **changes):
    config = HeadsConfig(hidden_size=backbone.hidden_size, vocab_size=VOCAB, num_heads=NUM_HEADS, **changes)
    generator = torch.Generator().manual_seed(seed)
    token_map = torch.randperm(VOCAB, generator=generator)[: config.truncated_vocab_size]
    heads = MedusaHeads.initialised(
        config, backbone.lm_head_weight, token_map if config.vocabulary == "truncated" else None
    )
    for parameter in heads.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return heads.eval().requires_grad_(False)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    "changes",
    [{"vocabulary": "own"}, {"vocabulary": "shared"}, {"vocabulary": "truncated", "truncated_vocab_size": 120}],
    ids=lambda changes: changes["vocabulary"],
)
def test_guesses_are_the_plain_heads(make_backbone_dir, changes, num_layers):
    """Of some rows, in any order, and again after other weights of the same shape were taken."""
    backbone = Backbone.from_pretrained(make_backbone_dir("llama", vocab=VOCAB), device="cpu")
    heads, others = (random_heads(backbone, seed, num_layers=num_layers, **changes) for seed in (1, 2))
    gpu = GpuHeads(heads, backbone, max_batch_size=ROWS - 1, width=WIDTH)
    rows_B = torch.tensor([4, 0, 3], dtype=torch.int32)
    guesses = []
    for weights in (heads, others):
        if weights is others:
            gpu.take(others)
        state = RowState.empty(ROWS, NUM_HEADS, WIDTH, 1, torch.device("cpu"))
        state.guesses_RKS.fill_(-7)
        hidden_Bd = torch.randn(len(rows_B), backbone.hidden_size, generator=torch.Generator().manual_seed(3))
        expected, _ = weights.guess(hidden_Bd, backbone.lm_head_weight, WIDTH, backbone.cap)
        with torch.inference_mode():
            gpu.remember(hidden_Bd, rows_B, state)
        assert torch.equal(state.guesses_RKS[rows_B.long()], expected)
        assert state.guesses_RKS[[1, 2, 5]].eq(-7).all()
        guesses.append(expected)
    assert not torch.equal(*guesses)
