"""Counter-based noise: what is drawn depends only on (seed, choice, position, token), never on batch or tree.

Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") in 32-bit words held in int64.
With the noise keyed by absolute position, a seeded request gives the same tokens with speculation on or off.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[torch.Tensor, ...], seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Ten rounds over a counter of four 32-bit words (broadcastable int64) keyed by a 64-bit seed: four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product wraps modulo 2^64 in int64; shifting and masking still yield its true high and low words.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def gumbel(seed: torch.Tensor, choice: torch.Tensor, position: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Gumbel noise for every vocabulary id: [..., V] float32 from int64 seed, choice and position of equal shape.

    Token v takes word v mod 4 of the counter (v // 4, position, choice, 0).
    """
    groups = torch.arange((vocab_size + 3) // 4, device=seed.device)
    counter = (
        groups,
        position[..., None] & _WORD,
        choice[..., None] & _WORD,
        torch.zeros_like(groups),
    )
    words = torch.stack(torch.broadcast_tensors(*philox(counter, seed[..., None])), -1).flatten(-2)[..., :vocab_size]
    # 23 bits, centred: never 0 or 1 in float32, so both logarithms are finite.
    uniform = ((words >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
