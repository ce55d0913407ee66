"""The heads' guesses equal MedusaHeads.guess's: tokens and order."""

from __future__ import annotations

import pytest
import torch

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.kernels.topk import scratch, topk

CPU = torch.device("cpu")


def guesses(logits, rows, num_rows, heads, width, token_map=None):
    batch, num_heads, vocab = logits.shape
    tokens = torch.full((num_rows, heads, width), -7)
    pairs = scratch(batch, num_heads, width, vocab, CPU).fill_(-7)
    topk(logits, rows, tokens, pairs, token_map=token_map)
    return tokens


def plain(logits, width):
    """Best first, lowest token among equals; -0.0 equals 0.0."""
    return (logits.float() + 0.0).sort(dim=-1, descending=True, stable=True).indices[..., :width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "heads", "vocab", "width"), [(1, 1, 5, 5), (3, 4, 2048, 10), (2, 3, 5003, 32)])
@pytest.mark.parametrize("heads_first", [False, True])
def test_guesses_are_the_best_tokens(dtype, batch, heads, vocab, width, heads_first):
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(batch, heads, vocab, generator=generator) * 2).to(dtype)
    logits[:, 0] = logits[:, 0].round()  # many equal, zeros of both signs
    laid_out = logits.transpose(0, 1).contiguous().transpose(0, 1) if heads_first else logits
    rows = torch.randperm(batch + 2, generator=generator)[:batch].int()
    tokens = guesses(laid_out, rows, batch + 2, heads + 1, width)
    assert torch.equal(tokens[rows.long(), :heads], plain(logits, width))
    assert tokens[rows.long(), heads:].eq(-7).all()
    untouched = [row for row in range(batch + 2) if row not in rows.tolist()]
    assert tokens[untouched].eq(-7).all()


def test_truncated_heads_guess_the_backbones_tokens():
    generator = torch.Generator().manual_seed(0)
    token_map = torch.randperm(300, generator=generator)[:90]
    config = HeadsConfig(hidden_size=8, vocab_size=300, num_heads=2, vocabulary="truncated", truncated_vocab_size=90)
    heads = MedusaHeads.initialised(config, torch.randn(300, 8, generator=generator), token_map)
    hidden, weight = torch.randn(3, 8, generator=generator), torch.zeros(300, 8)
    expected, _ = heads.guess(hidden, weight, 6)
    rows = torch.arange(3, dtype=torch.int32)
    logits = torch.stack(heads.logits(hidden, weight), 1).detach()
    assert torch.equal(guesses(logits, rows, 3, 2, 6, heads.token_map), expected)


def test_tokens_stay_in_the_vocabulary_where_logits_are_not_numbers():
    logits = torch.full((2, 1, 2500), float("-inf"))
    logits[1] = float("nan")
    tokens = guesses(logits, torch.arange(2, dtype=torch.int32), 2, 1, 4)
    assert tokens[0].tolist() == [[0, 1, 2, 3]]
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < 2500


def test_too_many_guesses_are_refused():
    logits, rows = torch.zeros(1, 2, 50), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 2 heads and 32 guesses"):
        guesses(logits, rows, 1, 2, 33)
    with pytest.raises(ValueError, match="at most 1 heads"):
        guesses(logits, rows, 1, 1, 3)
