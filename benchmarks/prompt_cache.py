"""How many prompts a KV cache holds from one wave to the next, so that a wave finds them and decodes all its requests.

Prompts that are computed anew come in chunks, over many steps, in which the first replies end before the last begin.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import hardware
from benchmarks.workload import Request
from medusa import Engine, SamplingParams
from medusa.engine.kv_cache import PAGE_SIZE, pages_for
from medusa.engine.limits import MAX_NODES
from medusa.model import Backbone

STEP_PAGES = 3  # of a running request behind its full pages: the page that it fills, and a step's tree


def requests_that_fit(requests: Sequence[Request], concurrency: int, num_pages: int) -> int:
    """How many, from the first on, find their prompts again in a cache of `num_pages` when they come in waves of
    `concurrency`: all of them or whole waves; 0 where not even one wave fits."""
    rounds = -(-concurrency // len(requests))  # of fewer requests than a wave has, which repeat in it
    left = num_pages - concurrency * STEP_PAGES
    for count, request in enumerate(requests):
        left -= _full_pages(len(request.prompt_ids), max(request.lengths.values()), rounds)
        if left < 0:
            return count - count % concurrency
    return len(requests)


def fill(engine: Engine, requests: Sequence[Request]) -> None:
    """Computes the prompts that are not in the engine's cache."""
    engine.generate([request.prompt_ids for request in requests], SamplingParams(max_tokens=1, temperature=0.0))


def cache_gb(
    backbone: Backbone, prompt_tokens: Sequence[int], reply_tokens: int, batch: int, room: int
) -> float | None:
    """Of a cache for all prompts and a wave of `batch`, as far as there is memory; None where an engine's own, for so
    many sequences of `room` tokens, is no smaller."""
    page_bytes = hardware.kv_bytes_per_token(backbone) * PAGE_SIZE
    rounds = -(-batch // len(prompt_tokens))
    replies = 2 * rounds * len(prompt_tokens) * pages_for(reply_tokens)  # at least as many as _full_pages counts
    pages = batch * STEP_PAGES + sum(tokens // PAGE_SIZE for tokens in prompt_tokens) + replies
    wanted = min((pages + 2) * page_bytes, hardware.bytes_for_cache(backbone.device))  # one is the trash page
    return wanted / 2**30 if wanted > batch * pages_for(room + MAX_NODES) * page_bytes else None


def _full_pages(prompt_tokens: int, reply_tokens: int, rounds: int) -> int:
    """That come into the cache between two uses of a prompt: the least recently used are given up first, and two
    contenders may have run meanwhile, with replies of their own."""
    prompt = prompt_tokens // PAGE_SIZE
    return prompt + 2 * rounds * ((prompt_tokens + reply_tokens) // PAGE_SIZE - prompt)
