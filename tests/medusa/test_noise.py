"""Philox against Random123's known answers, Gumbel noise against its law, and that no batch or tree can move it."""

from __future__ import annotations

import math

import pytest
import torch

from medusa.noise import gumbel, philox

EULER = 0.5772156649015329
# Random123's kat_vectors for philox4x32-10: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def int64(value):
    """The signed 64-bit integer with these bits."""
    return torch.tensor(value - 2**64 if value >= 2**63 else value)


def plain_philox(counter, key):
    """The ten rounds in Python's own unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def noise(seed, choice, position, vocab_size):
    return gumbel(torch.tensor(seed), torch.tensor(choice), torch.tensor(position), vocab_size)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = philox(tuple(torch.tensor(word) for word in counter), int64(key[0] | key[1] << 32))
    assert tuple(int(word) for word in words) == answer


def test_philox_equals_the_rounds_in_unbounded_integers():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (200, 6), generator=generator)
    batched = philox(tuple(words[:, i] for i in range(4)), words[:, 4] | words[:, 5] << 32)
    for row, answer in zip(words.tolist(), torch.stack(batched, -1).tolist(), strict=True):
        assert tuple(answer) == plain_philox(row[:4], row[4:])


def test_noise_of_a_token_is_its_word_of_the_documented_counter():
    seed, choice, position, vocab_size = -3, 5, 77, 11
    drawn = noise(seed, choice, position, vocab_size)
    for token in range(vocab_size):
        word = plain_philox((token // 4, position, choice, 0), (seed % 2**32, (seed >> 32) % 2**32))[token % 4]
        uniform = ((word >> 9) + 0.5) / 2**23
        assert float(drawn[token]) == pytest.approx(-math.log(-math.log(uniform)), abs=1e-4)


def test_noise_is_finite_at_the_ends_of_the_uniform_range(monkeypatch):
    ends = (torch.tensor([0]), torch.tensor([0xFFFFFFFF]), torch.tensor([0x1FF]), torch.tensor([0xFFFFFE00]))
    monkeypatch.setattr("medusa.noise.philox", lambda counter, seed: ends)
    drawn = noise(0, 0, 0, 4)
    assert torch.isfinite(drawn).all()
    assert drawn[0] == drawn[2] < 0 < drawn[1] == drawn[3]


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_noise_follows_the_gumbel_law(seed):
    drawn = noise(seed, 0, 12, 100_000).double().sort().values
    assert torch.isfinite(drawn).all()
    assert float(drawn.mean()) == pytest.approx(EULER, abs=0.02)
    assert float(drawn.var()) == pytest.approx(math.pi**2 / 6, abs=0.05)
    law = torch.exp(-torch.exp(-drawn))
    steps = torch.arange(len(drawn) + 1, dtype=torch.float64) / len(drawn)
    distance = torch.maximum((law - steps[:-1]).abs().max(), (law - steps[1:]).abs().max())
    assert float(distance) < 1.95 / math.sqrt(len(drawn))  # Kolmogorov-Smirnov at the 0.1 % level


def test_largest_noise_over_logits_draws_from_their_softmax():
    probabilities = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    positions = torch.arange(50_000)
    drawn = gumbel(torch.full_like(positions, 9), torch.zeros_like(positions), positions, 5)
    counts = (probabilities.log() + drawn).argmax(-1).bincount(minlength=5)
    expected = probabilities * len(positions)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # chi-square with 4 degrees, 0.1 % level


def test_neighbouring_seeds_choices_and_positions_are_unrelated():
    base = noise(7, 0, 100, 20_000)
    others = [noise(8, 0, 100, 20_000), noise(7, 1, 100, 20_000), noise(7, 0, 101, 20_000), noise(-7, 0, 100, 20_000)]
    others.append(noise(7 + 2**32, 0, 100, 20_000))  # the key's high word counts
    for other in others:
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(20_000)


def test_noise_does_not_depend_on_batch_or_vocabulary():
    seeds, choices = torch.tensor([[3, -4, 5]] * 2), torch.tensor([[0, 1, 2]] * 2)
    positions = torch.tensor([[10, 11, 12], [10, 500, 12]])
    together = gumbel(seeds, choices, positions, 37)
    assert together.shape == (2, 3, 37)
    assert together.dtype == torch.float32
    for b in range(2):
        for n in range(3):
            alone = gumbel(seeds[b, n], choices[b, n], positions[b, n], 37)
            assert torch.equal(together[b, n], alone)
            assert torch.equal(gumbel(seeds[b, n], choices[b, n], positions[b, n], 64)[:37], alone)
