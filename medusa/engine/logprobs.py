"""Log-probabilities of emitted tokens under the model's own distribution.

Shapes: D emitted tokens, V vocabulary.
"""

from __future__ import annotations

import torch

from medusa.engine.sequence import TokenLogprob


def token_logprobs(logits_DV: torch.Tensor, emitted: list[int], num_top: int) -> list[TokenLogprob]:
    """Of each emitted token and the `num_top` most likely ones, from the logits at the node before it."""
    logprobs_DV = logits_DV[: len(emitted)].float().log_softmax(-1)
    top = logprobs_DV.topk(num_top, dim=-1)
    own = logprobs_DV.gather(1, torch.tensor(emitted, device=logits_DV.device)[:, None])[:, 0].tolist()
    return [
        TokenLogprob(token, logprob, list(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(emitted, own, top.indices.tolist(), top.values.tolist(), strict=True)
    ]
