"""What an engine counts, for its operators."""

from __future__ import annotations

from dataclasses import dataclass

from medusa.engine.kv_cache import KVCache
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Output
from medusa.tree import TokenTree


@dataclass(frozen=True)
class EngineStats:
    """What the engine holds now and has done since it started; differences between two steps are the step's own.

    `tree_size` is the last step's largest tree. `prefill_tokens` were computed, `reused_tokens` found in the cache
    instead. `drafted_tokens` are the trees' nodes without their roots, `accepted_tokens` those of them that replies
    kept. `running_tokens` are cached positions, `waiting_tokens` those that the queue will need. Pages are used by
    running sequences, or `pages_cached` for requests that begin with the same text, or free. `waited_s` is how long the
    host waited for launches of earlier steps, which tells how far ahead of the device it is.
    """

    running: int
    waiting: int
    steps: int
    prefill_tokens: int
    decode_tokens: int
    pages_used: int
    pages_total: int
    tree_size: int
    pages_cached: int = 0
    running_tokens: int = 0
    waiting_tokens: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    waited_s: float = 0.0


class Counters:
    """What has been done since the engine started."""

    def __init__(self) -> None:
        self._steps = self._prefill_tokens = self._decode_tokens = 0
        self._drafted_tokens = self._accepted_tokens = 0
        self._tree_size = 1
        self._waited_s = 0.0

    def count_prefill(self, num_tokens: int) -> None:
        self._prefill_tokens += num_tokens

    def count_step(self, trees: list[TokenTree]) -> None:
        self._steps += 1
        self._tree_size = max(tree.num_nodes for tree in trees)

    def count_decoded(self, tree: TokenTree, output: Output) -> None:
        """What a step gave one reply."""
        self._decode_tokens += len(output.token_ids)
        self._drafted_tokens += tree.num_nodes - 1
        self._accepted_tokens += output.num_draft_accepted

    def count_wait(self, seconds: float) -> None:
        """What a launch of an earlier step took to end, once it was asked for."""
        self._waited_s += seconds

    def stats(self, scheduler: Scheduler, cache: KVCache) -> EngineStats:
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self._steps,
            prefill_tokens=self._prefill_tokens,
            decode_tokens=self._decode_tokens,
            pages_used=cache.pool.num_used,
            pages_total=cache.pool.num_pages,
            tree_size=self._tree_size,
            pages_cached=cache.pool.num_idle,
            running_tokens=sum(sequence.num_cached for sequence in scheduler.running),
            waiting_tokens=sum(sequence.num_to_fill for sequence in scheduler.waiting),
            reused_tokens=scheduler.num_reused_tokens,
            drafted_tokens=self._drafted_tokens,
            accepted_tokens=self._accepted_tokens,
            preemptions=scheduler.num_preemptions,
            waited_s=self._waited_s,
        )
