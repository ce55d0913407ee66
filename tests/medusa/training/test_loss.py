"""The chunked loss against its plain twin, against finite differences, and the meaning of its counts."""

from __future__ import annotations

import math

import pytest
import torch

from medusa.heads import HeadsConfig, MedusaHeads
from medusa.training.batch import IGNORE
from medusa.training.loss import count_covered, head_weights, heads_loss, heads_loss_eager

NUM_HEADS, HIDDEN, VOCAB = 3, 6, 11
TOKEN_MAP = torch.tensor([0, 2, 3, 7, 10])


def soft_cap(logits):
    return 4.0 * torch.tanh(logits * 0.5 / 4.0)


def plain(logits):
    return logits


def make_case(vocabulary, seed=0, num_positions=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    truncated = vocabulary == "truncated"
    config = HeadsConfig(
        num_heads=NUM_HEADS,
        num_layers=2,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        vocabulary=vocabulary,
        truncated_vocab_size=len(TOKEN_MAP) if truncated else None,
    )
    lm_head_weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype)
    heads = MedusaHeads.initialised(config, lm_head_weight, TOKEN_MAP if truncated else None)
    for parameter in heads.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    hidden_Nd = torch.randn(num_positions, HIDDEN, generator=generator, dtype=dtype)
    labels_NK = torch.randint(0, VOCAB, (num_positions, NUM_HEADS), generator=generator)
    labels_NK[torch.rand(labels_NK.shape, generator=generator) < 0.2] = IGNORE
    return heads, hidden_Nd, labels_NK, lm_head_weight


def gradients(heads, loss_K):
    heads.zero_grad()
    weights = torch.tensor(head_weights(NUM_HEADS, 0.8), dtype=loss_K.dtype)
    (weights * loss_K).sum().backward()
    return [parameter.grad.clone() for parameter in heads.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 100])
@pytest.mark.parametrize("cap", [plain, soft_cap])
@pytest.mark.parametrize("vocabulary", ["own", "shared", "truncated"])
def test_chunked_equals_eager_with_gradients(vocabulary, cap, chunk_size):
    heads, hidden_Nd, labels_NK, lm_head_weight = make_case(vocabulary)
    chunked = heads_loss(heads, hidden_Nd, labels_NK, lm_head_weight, cap, chunk_size=chunk_size)
    eager = heads_loss_eager(heads, hidden_Nd, labels_NK, lm_head_weight, cap)
    torch.testing.assert_close(chunked.values_MK, eager.values_MK, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(heads, chunked.loss_K), gradients(heads, eager.loss_K), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vocabulary", ["own", "shared", "truncated"])
def test_gradients_equal_finite_differences(vocabulary):
    heads, hidden_Nd, labels_NK, lm_head_weight = make_case(vocabulary, num_positions=4)
    hidden_Nd.requires_grad_()

    def weighted_loss(hidden_Nd, *_):
        losses_K = heads_loss(heads, hidden_Nd, labels_NK, lm_head_weight, soft_cap, chunk_size=3).loss_K
        return (losses_K * torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)).sum()

    assert torch.autograd.gradcheck(weighted_loss, (hidden_Nd, *heads.parameters()))


def test_loss_in_float32_and_bfloat16_is_close_to_float64():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        exact = heads_loss(*make_case("own"), plain).mean_loss_K
        heads, hidden_Nd, labels_NK, lm_head_weight = make_case("own")
        case = heads.to(dtype), hidden_Nd.to(dtype), labels_NK, lm_head_weight.to(dtype)
        torch.testing.assert_close(heads_loss(*case, plain).mean_loss_K, exact, rtol=tolerance, atol=tolerance)


def test_no_gradient_is_taken_without_grad():
    heads, hidden_Nd, labels_NK, lm_head_weight = make_case("own")
    with torch.no_grad():
        totals = heads_loss(heads, hidden_Nd, labels_NK, lm_head_weight, plain)
    assert not totals.values_MK.requires_grad


def test_logits_of_all_heads_never_exist_at_once():
    heads, hidden_Nd, labels_NK, lm_head_weight = make_case("own", num_positions=12)
    seen = []

    def spy(logits):
        seen.append(tuple(logits.shape))
        return logits

    heads_loss(heads, hidden_Nd, labels_NK, lm_head_weight, spy, chunk_size=4)
    assert seen == [(4, VOCAB)] * (3 * NUM_HEADS)


def test_head_k_weighs_decay_to_the_k_plus_1():
    assert head_weights(3, 0.8) == pytest.approx([0.8, 0.64, 0.512])


def test_new_heads_have_the_loss_of_the_lm_head():
    _, hidden_Nd, labels_NK, lm_head_weight = make_case("own")
    config = HeadsConfig(num_heads=NUM_HEADS, hidden_size=HIDDEN, vocab_size=VOCAB)
    heads = MedusaHeads.initialised(config, lm_head_weight)
    totals = heads_loss(heads, hidden_Nd, labels_NK, lm_head_weight, soft_cap)
    logits_NV = soft_cap(hidden_Nd @ lm_head_weight.T)
    for k in range(NUM_HEADS):
        mean = torch.nn.functional.cross_entropy(logits_NV, labels_NK[:, k], ignore_index=IGNORE)
        assert totals.mean_loss_K[k].item() == pytest.approx(mean.item())


def test_labels_outside_a_truncated_vocabulary_carry_no_loss_but_are_misses():
    heads, hidden_Nd, _, lm_head_weight = make_case("truncated", num_positions=4)
    labels_NK = torch.tensor([[0, 1, 2], [3, 4, IGNORE], [7, 5, IGNORE], [10, IGNORE, IGNORE]])
    totals = heads_loss(heads, hidden_Nd, labels_NK, lm_head_weight, plain)
    assert totals.labels_K.tolist() == [4, 3, 1]
    assert totals.covered_K.tolist() == count_covered(heads, labels_NK).tolist() == [4, 0, 1]
    assert totals.coverage_K.tolist() == [1.0, 0.0, 1.0]
    assert totals.loss_K[1] == 0 and totals.top5_accuracy_K.tolist() == [1.0, 0.0, 1.0]
    assert torch.isfinite(totals.mean_loss_K).all()


def test_hits_count_the_rank_of_the_label():
    config = HeadsConfig(num_heads=1, hidden_size=VOCAB, vocab_size=VOCAB)
    heads = MedusaHeads.initialised(config, torch.eye(VOCAB))
    hidden_Nd = torch.arange(VOCAB, 0, -1.0).expand(4, VOCAB)  # token 0 ranks first, 1 second, ...
    totals = heads_loss(heads, hidden_Nd, torch.tensor([[0], [4], [5], [IGNORE]]), torch.eye(VOCAB), plain)
    assert totals.top1_accuracy_K.item() == pytest.approx(1 / 3)
    assert totals.top5_accuracy_K.item() == pytest.approx(2 / 3)


def test_no_positions_give_zeros_and_zero_gradients():
    heads, hidden_Nd, labels_NK, lm_head_weight = make_case("own")
    values_MK = heads_loss(heads, hidden_Nd[:0], labels_NK[:0], lm_head_weight, plain).values_MK
    values_MK[0].sum().backward()
    assert values_MK.abs().sum() == 0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in heads.parameters())


def test_uniform_logits_cost_log_of_the_vocabulary():
    config = HeadsConfig(num_heads=1, hidden_size=HIDDEN, vocab_size=VOCAB)
    heads = MedusaHeads.initialised(config, torch.zeros(VOCAB, HIDDEN))
    totals = heads_loss(heads, torch.ones(2, HIDDEN), torch.tensor([[1], [2]]), torch.zeros(VOCAB, HIDDEN), plain)
    assert totals.mean_loss_K.item() == pytest.approx(math.log(VOCAB))
