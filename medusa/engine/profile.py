"""Step times of this machine: what a decode step costs by batch size and tree, for the policy to weigh."""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

from medusa.engine.kv_cache import KVCache
from medusa.engine.limits import Limits
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Sequence
from medusa.engine.speculation import StepTimes
from medusa.engine.step import PrefillChunk, StepRunner
from medusa.sampling import SamplingParams
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree

CONTEXT = 128


class Profiler:
    """Times decode steps of an idle engine on sequences of its own, which leave nothing behind."""

    def __init__(
        self, runner: StepRunner, scheduler: Scheduler, cache: KVCache, limits: Limits, tokenizer: ChatTokenizer
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._scheduler = scheduler
        self._limits = limits
        self._tokenizer = tokenizer

    def measure(
        self, batch_sizes: Items[int], trees: Items[TokenTree], *, repeats: int, context: int = CONTEXT
    ) -> StepTimes:
        """The fastest of `repeats` rounds at each batch size and tree, with `context` committed tokens a sequence.

        The trees are taken in turn, so that a passing disturbance does not fall on one of them; each is stepped once
        before its timed step, as it would find the processor's caches in decoding.
        """
        context = min(context, self._limits.max_model_len - 1)
        best: dict[tuple[int, int], float] = {}
        for batch_size in batch_sizes:
            sequences = self._start(batch_size, context)
            try:
                for tree in [tree for _ in range(repeats) for tree in trees]:
                    self._step(sequences, tree, context)
                    seconds = self._step(sequences, tree, context)
                    key = (batch_size, tree.num_nodes)
                    best[key] = min(best.get(key, seconds), seconds)
            finally:
                self._stop(sequences)
        return StepTimes(best)

    def batch_sizes(self, context: int = CONTEXT) -> list[int]:
        """1, 2, 4 and so on while the engine has rows and pages for them."""
        context = min(context, self._limits.max_model_len - 1)
        most = min(self._limits.max_batch_size, self._limits.num_pages // self._limits.pages_needed(context + 1))
        return [2**power for power in range(most.bit_length())] or [1]

    def _start(self, batch_size: int, context: int) -> list[Sequence]:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        prompt_ids = [token % self._limits.vocab_size for token in range(context)]
        for index in range(batch_size):
            self._scheduler.add(
                Sequence(f"profile-{index}", 0, prompt_ids, params, seed=0, tokenizer=self._tokenizer, max_new_tokens=1)
            )
        sequences = self._scheduler.admit()
        if len(sequences) < batch_size or not all(self._fill(sequence) for sequence in sequences):
            self._stop([*sequences, *self._scheduler.waiting])
            raise ValueError(
                f"step times at batch size {batch_size} with {context} tokens each do not fit this engine: "
                f"{self._limits.max_batch_size} rows, {self._limits.num_pages} pages; give smaller ones"
            )
        return sequences

    def _fill(self, sequence: Sequence) -> bool:
        """Prefills a sequence by itself, with pages for the largest tree behind it; False when there are too few."""
        if not self._cache.grow(sequence.row, sequence.num_to_fill + self._limits.max_nodes):
            return False
        while not sequence.is_filled:
            chunk = PrefillChunk.after(sequence, self._limits.max_prefill_tokens)
            self._runner.prefill([chunk], num_heads=self._limits.num_heads).collect()
            sequence.num_cached = chunk.end
        return True

    def _stop(self, sequences: Items[Sequence]) -> None:
        for sequence in sequences:
            self._scheduler.remove(sequence.request_id)

    def _step(self, sequences: list[Sequence], tree: TokenTree, context: int) -> float:
        self._runner.rewind(sequences, context)
        start = time.perf_counter()
        self._runner.decode(sequences, [tree] * len(sequences), num_heads=tree.max_depth).collect()
        return time.perf_counter() - start
