"""How the sampling kernels read a node's logits: stop ids masked while a reply may not end, divided by temperature.

Both `cut` and `sample` go through `load_scaled`, so that a cut compares equal to the logit it was found at.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def may_not_stop(row, position, LENGTH, NUM_OUTPUT, MIN_TOKENS):
    """Whether the token drawn at a node of this position (length + depth) comes before the reply may end."""
    depth = position - tl.load(LENGTH + row)
    return tl.load(NUM_OUTPUT + row) + depth < tl.load(MIN_TOKENS + row)


@triton.jit
def is_restricted(row, TEMPERATURE, TOP_P, TOP_K, MIN_P):
    """Whether a draw of this row is from part of the vocabulary; a greedy row never is."""
    some = (tl.load(TOP_P + row) < 1.0) | (tl.load(TOP_K + row) > 0) | (tl.load(MIN_P + row) > 0.0)
    return some & (tl.load(TEMPERATURE + row) > 0.0)


@triton.jit
def load_scaled(base, v, V, temperature, early, stops, E: tl.constexpr):
    """Tokens v's logits as float32 and over temperature; -inf beyond the vocabulary and at masked stop ids."""
    logits = tl.load(base + v, mask=v < V, other=-float("inf")).to(tl.float32)
    if early:
        for e in range(E):
            logits = tl.where(v == tl.load(stops + e), -float("inf"), logits)
    # The floor is SamplingBatch's; the exact quotient makes the cuts the reference's to the last bit.
    return logits, tl.div_rn(logits, tl.zeros_like(logits) + tl.maximum(temperature, 1e-6))
