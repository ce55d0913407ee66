"""Losses on the model's own distribution: KL and the language model's term, against whole logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from medusa.config import ConfigError, load_config
from medusa.heads import HeadsConfig, MedusaHeads
from medusa.training.batch import IGNORE, Row, collate
from medusa.training.loss import LM_SUMS, Teacher, count_covered, heads_loss, lm_loss
from medusa.training.schedule import HeadsLossConfig, TrainerConfig

NUM_HEADS, HIDDEN, VOCAB = 2, 6, 11
TOKEN_MAP = torch.tensor([0, 2, 3, 7, 10])


def soft_cap(logits):
    return 4.0 * torch.tanh(logits * 0.5 / 4.0)


def make_case(vocabulary="own", seed=0):
    """Two rows side by side, as a batch has them, with random heads and teacher."""
    generator = torch.Generator().manual_seed(seed)
    rows = [Row.of([1, 2], [3, 4, 5, 6, 7]), Row.of([8], [2, 9, 10, 0])]
    batch = collate(rows, [0, 1], NUM_HEADS)
    truncated = vocabulary == "truncated"
    config = HeadsConfig(
        num_heads=NUM_HEADS,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        vocabulary=vocabulary,
        truncated_vocab_size=len(TOKEN_MAP) if truncated else None,
    )
    weight_Vd = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    heads = MedusaHeads.initialised(config, weight_Vd, TOKEN_MAP if truncated else None)
    for parameter in heads.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    hidden_Nd = torch.randn(len(batch.next_N), HIDDEN, generator=generator, dtype=torch.float64)
    return heads, hidden_Nd, batch, weight_Vd


def by_hand(heads, hidden_Nd, batch, weight_Vd, config):
    """Position by position: head k at n learns what the teacher says at n + k + 1, the same row's later position."""
    losses = [torch.zeros((), dtype=torch.float64) for _ in range(NUM_HEADS)]
    for k in range(NUM_HEADS):
        for n, label in enumerate(batch.labels_NK[:, k].tolist()):
            if label == IGNORE:
                continue
            raw = heads.features(k, hidden_Nd[n]) @ heads.vocabulary_weight(k, weight_Vd).T
            log_q = soft_cap(raw).log_softmax(-1)
            p = (soft_cap(hidden_Nd[n + k + 1].detach() @ weight_Vd.T) / config.teacher_temperature).softmax(-1)
            columns = heads.token_map if heads.config.vocabulary == "truncated" else torch.arange(VOCAB)
            p = p[columns]
            loss = (p * (p.log() - log_q)).sum()
            if config.tokens_share:
                token = -log_q[(columns == label).nonzero()].sum()  # 0 for a label outside the vocabulary
                loss = (1 - config.tokens_share) * loss + config.tokens_share * token
            losses[k] = losses[k] + loss
    return torch.stack(losses)


CONFIGS = [
    HeadsLossConfig(kind="soft"),
    HeadsLossConfig(kind="soft", teacher_temperature=0.5, tokens_share=0.3),
]


@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("vocabulary", ["own", "shared", "truncated"])
@pytest.mark.parametrize("config", CONFIGS)
def test_soft_losses_equal_those_by_hand_with_gradients(config, vocabulary, chunk_size):
    heads, hidden_Nd, batch, weight_Vd = make_case(vocabulary)
    hidden_Nd.requires_grad_()
    teacher = Teacher(hidden_Nd.detach(), weight_Vd, soft_cap)
    totals = heads_loss(
        heads, hidden_Nd, batch.labels_NK, weight_Vd, soft_cap, teacher=teacher, config=config, chunk_size=chunk_size
    )
    expected_K = by_hand(heads, hidden_Nd, batch, weight_Vd, config)
    torch.testing.assert_close(totals.loss_K, expected_K, rtol=1e-9, atol=1e-9)
    inputs = [hidden_Nd, *heads.parameters()]
    weights_K = torch.tensor([1.0, 0.5], dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((weights_K * loss_K).sum(), inputs) for loss_K in (totals.loss_K, expected_K))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_soft_losses_count_every_label():
    heads, _, batch, _ = make_case("truncated")
    labels = (batch.labels_NK != IGNORE).sum(0).tolist()
    assert count_covered(heads, batch.labels_NK, HeadsLossConfig(kind="soft")).tolist() == labels
    assert count_covered(heads, batch.labels_NK).tolist() != labels


def test_a_head_that_says_what_the_model_says_has_no_loss():
    heads, hidden_Nd, batch, weight_Vd = make_case()
    perfect = MedusaHeads.initialised(heads.config, weight_Vd)
    same_Nd = hidden_Nd[:1].expand(len(hidden_Nd), -1)
    teacher = Teacher(same_Nd, weight_Vd, soft_cap)
    totals = heads_loss(perfect, same_Nd, batch.labels_NK, weight_Vd, soft_cap, teacher=teacher, config=CONFIGS[0])
    assert totals.loss_K.abs().max() < 1e-12


def test_a_teacher_is_asked_for():
    heads, hidden_Nd, batch, weight_Vd = make_case()
    with pytest.raises(ValueError, match="needs the teacher's hidden states"):
        heads_loss(heads, hidden_Nd, batch.labels_NK, weight_Vd, soft_cap, config=CONFIGS[0])


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_lm_loss_is_kl_to_the_teacher_over_real_positions(chunk_size):
    _, hidden_Nd, batch, weight_Vd = make_case()
    generator = torch.Generator().manual_seed(9)
    student_Nd = torch.randn(hidden_Nd.shape, generator=generator, dtype=torch.float64).requires_grad_()
    student_Vd = torch.randn(weight_Vd.shape, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = Teacher(hidden_Nd, weight_Vd, soft_cap)
    sums_L = lm_loss(student_Nd, batch.next_N, student_Vd, soft_cap, teacher, chunk_size=chunk_size)
    log_q, log_p = (
        soft_cap(student_Nd @ student_Vd.T).log_softmax(-1),
        soft_cap(hidden_Nd @ weight_Vd.T).log_softmax(-1),
    )
    expected = kl_div(log_q, log_p, log_target=True, reduction="sum")
    found = dict(zip(LM_SUMS, sums_L, strict=True))
    assert found["loss"].item() == pytest.approx(expected.item())
    assert found["labels"] == len(batch.next_N) == 5 + 4
    assert found["overlap"].item() == pytest.approx(torch.minimum(log_p.exp(), log_q.exp()).sum().item())
    assert found["top1"] == (log_q.argmax(-1) == batch.next_N).sum()
    for ours, theirs in zip(
        torch.autograd.grad(sums_L[0], [student_Nd, student_Vd]),
        torch.autograd.grad(expected, [student_Nd, student_Vd]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_lm_loss_without_a_teacher_is_cross_entropy():
    _, hidden_Nd, batch, weight_Vd = make_case()
    sums_L = lm_loss(hidden_Nd, batch.next_N, weight_Vd, soft_cap, None)
    expected = cross_entropy(soft_cap(hidden_Nd @ weight_Vd.T), batch.next_N, reduction="sum")
    assert sums_L[0].item() == pytest.approx(expected.item()) and sums_L[-1] == len(batch.next_N)


@pytest.mark.parametrize("bad", [{"teacher_temperature": 0.0}, {"tokens_share": 1.5}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HeadsLossConfig(**bad)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.kind=lk", "loss.kind: Input should be 'tokens' or 'soft', got 'lk' (str)"),
        ("loss.lk_eta=3", "Allowed in loss: kind, teacher_temperature, tokens_share"),
        ("head_lr_scales=[1,2]", "head_lr_scales: unknown key"),
    ],
)
def test_variants_that_lost_are_refused_with_what_is_allowed(override, expected):
    with pytest.raises(ConfigError) as raised:
        load_config(TrainerConfig, None, [override])
    assert expected in str(raised.value)
