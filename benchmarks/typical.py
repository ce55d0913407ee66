"""How far typical acceptance lies from exact decoding: the divergence of its first tokens' law from the model's."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medusa import Engine, SamplingParams


@dataclass(frozen=True)
class Distance:
    """KL(typical || exact) in nats of the first token, and of the second given the first, averaged over prompts. With
    `samples` draws a prompt the law of the engine's tokens is taken as drawn, which is exact for a greedy root (it
    always says the same); where draws differ it is too large by up to (different tokens - 1) / (2 * samples)."""

    first: float
    second: float
    prompts: int
    samples: int


def distance_from_exact(engine: Engine, prompts: Sequence[list[int]], temperature: float, samples: int = 8) -> Distance:
    """Of an engine that accepts by a typical rule and speculates."""
    params = SamplingParams(max_tokens=3, temperature=temperature, n=samples, seed=1, ignore_eos=True)
    done = engine.generate(prompts, params)
    first, second = [], []
    for i, prompt in enumerate(prompts):
        drawn = [tuple(c.token_ids[:2]) for c in done[i * samples : (i + 1) * samples]]
        first.append(divergence([a for a, _ in drawn], _law(engine, prompt, temperature)))
        after = defaultdict(list)
        for a, b in drawn:
            after[a].append(b)
        second.append(
            sum(
                len(bs) / len(drawn) * divergence(bs, _law(engine, [*prompt, a], temperature))
                for a, bs in after.items()
            )
        )
    return Distance(sum(first) / len(first), sum(second) / len(second), len(prompts), samples)


def divergence(drawn: Sequence[int], logprobs: Sequence[float] | torch.Tensor) -> float:
    """KL(law of the draws || the law with these log-probabilities), in nats."""
    counts = Counter(drawn)
    return sum(n / len(drawn) * (math.log(n / len(drawn)) - float(logprobs[token])) for token, n in counts.items())


def _law(engine: Engine, token_ids: list[int], temperature: float) -> torch.Tensor:
    """Log-probabilities of the next token in plain decoding."""
    backbone = engine.backbone
    hidden = backbone.hidden_states(torch.tensor([token_ids], device=backbone.device))[0, -1]
    with torch.inference_mode():
        return (backbone.logits(hidden).float() / temperature).log_softmax(-1).cpu()
