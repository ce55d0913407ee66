"""Is a trained backbone still the model it was? Its distance from the base on given replies, and its answers to sums.

Replies are teacher-forced: at each position that predicts a reply token both models' distributions are compared. The
logits of both exist for a chunk of positions at a time.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from medusa.model import Backbone

Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, reply ids
_CHUNK = 1024
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Closeness:
    """Means over `positions` reply tokens. `kl` is KL(base || model); `agreement` how often both have the same best
    token; perplexities are of the reply's own tokens."""

    positions: int
    kl: float
    agreement: float
    base_perplexity: float
    perplexity: float

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.base_perplexity


@torch.no_grad()
def compare(base: Backbone, model: Backbone, rows: Iterable[Row], *, batch_size: int = 16) -> Closeness:
    """Both models on the same rows; ValueError when no row has a reply."""
    sums = torch.zeros(4, dtype=torch.float64)
    positions = 0
    for batch in _batches(rows, batch_size):
        next_N, base_Nd = _predicting(base, batch)
        _, model_Nd = _predicting(model, batch)
        positions += len(next_N)
        for start in range(0, len(next_N), _CHUNK):
            part = slice(start, start + _CHUNK)
            sums += _distances(base.logits(base_Nd[part]), model.logits(model_Nd[part]), next_N[part])
    if positions == 0:
        raise ValueError("there is nothing to compare on: no row has a reply")
    kl, same, base_nll, nll = (sums / positions).tolist()
    return Closeness(positions, kl, same, math.exp(base_nll), math.exp(nll))


def last_number(text: str) -> float | None:
    """The last number that a text names, the way GSM8K's answers are read ("#### 1,234", "$18.00.")."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("$", "")) if found else None


def _distances(base_NV: torch.Tensor, model_NV: torch.Tensor, next_N: torch.Tensor) -> torch.Tensor:
    log_p_NV, log_q_NV = base_NV.float().log_softmax(-1), model_NV.float().log_softmax(-1)
    kl = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    same = log_p_NV.argmax(-1) == log_q_NV.argmax(-1)
    nll = [-log_NV.gather(1, next_N[:, None])[:, 0] for log_NV in (log_p_NV, log_q_NV)]
    return torch.stack([part.double().sum() for part in (kl, same, *nll)]).cpu()


def _predicting(backbone: Backbone, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reply tokens [N] and the hidden states [N, d] that predict them."""
    sequences = [[*prompt, *reply] for prompt, reply in rows]
    longest = max(map(len, sequences))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=backbone.device)
    predicts_BT = torch.zeros_like(padded, dtype=torch.bool)
    for b, (prompt, reply) in enumerate(rows):
        predicts_BT[b, len(prompt) - 1 : len(prompt) + len(reply) - 1] = True
    hidden_BTd = backbone.hidden_states(padded)
    return padded.roll(-1, 1)[predicts_BT], hidden_BTd[predicts_BT]


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    """By length, so that little is padding; rows without a reply are left out."""
    kept = sorted((row for row in rows if row[1]), key=lambda row: len(row[0]) + len(row[1]))
    for start in range(0, len(kept), size):
        yield kept[start : start + size]
