"""Step times of this machine: what a decode step costs by batch size and tree, for the policy to weigh."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import TypeVar

from medusa.engine.kv_cache import PAGE_SIZE, KVCache
from medusa.engine.limits import Limits
from medusa.engine.scheduler import Scheduler
from medusa.engine.sequence import Sequence
from medusa.engine.shapes import Buckets
from medusa.engine.step import PrefillChunk, StepRunner
from medusa.engine.step_times import CONTEXT, Shape, StepTimes
from medusa.growth import GrownTree
from medusa.sampling import SamplingParams
from medusa.tokenizer import ChatTokenizer
from medusa.tree import TokenTree

T = TypeVar("T")

REPEATS = 5  # rounds of each step, where nobody asks for another number
CONTEXTS = (CONTEXT, 1024)  # of a profile that is measured at the start


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

    @property
    def buckets(self) -> Buckets | None:
        """The runner's shapes; None where it takes any, and pads trees to the largest."""
        return self._runner.buckets

    def measure_choices(self, grown: GrownTree, trees: Items[TokenTree]) -> StepTimes:
        """All that a policy over these heads may choose among."""
        if self.buckets is not None:
            return self.measure_buckets(self.buckets, grown)
        steps = {batch: [[tree] * batch for tree in trees] for batch in self.batch_sizes()}
        return self.measure(steps, repeats=REPEATS)

    def measure(
        self,
        steps: Mapping[int, Items[Items[TokenTree]]],
        *,
        repeats: int,
        contexts: Items[int] = (CONTEXT,),
    ) -> StepTimes:
        """The fastest of `repeats` rounds of each step: `steps[batch]` lists them, a step as the tree of each sequence.

        Shapes are taken in turn, each round beginning with another, so that a passing disturbance does not fall on one
        of them; each is stepped once before its timed step, as it would find the processor's caches in decoding.
        """
        lengths = sorted({min(context, self._limits.max_model_len - 1) for context in contexts})
        best: dict[Shape, float] = {}
        for batch_size, its_steps in steps.items():
            best |= self._measure(batch_size, its_steps, lengths, repeats)
        return StepTimes(best)

    def measure_buckets(self, buckets: Buckets, grown: GrownTree, *, repeats: int = 3) -> StepTimes:
        """The shapes that the policy may choose, at a short and a long context, or the longest that so many sequences
        have pages for."""
        best: dict[Shape, float] = {}
        for batch in buckets.batches:
            longest = self._longest(batch)
            if longest < 1:  # so many never run at once
                continue
            most = batch * grown.max_nodes
            totals = sorted({batch, *(min(total, most) for total in buckets.nodes if total > batch)})
            steps = [spread_evenly(grown, batch, total) for total in totals]
            best |= self._measure(batch, steps, sorted({min(context, longest) for context in CONTEXTS}), repeats)
        return StepTimes(best)

    def _measure(
        self, batch: int, steps: Items[Items[TokenTree]], lengths: Items[int], repeats: int
    ) -> dict[Shape, float]:
        shapes = [(trees, length) for length in lengths for trees in steps]
        sequences = self._start(batch, max(lengths))
        best: dict[Shape, float] = {}
        try:
            for trees, length in [shape for r in range(repeats) for shape in _rotated(shapes, r)]:
                self._step(sequences, trees, length)
                seconds = self._step(sequences, trees, length)
                shape = (batch, sum(tree.num_nodes for tree in trees), length)
                best[shape] = min(best.get(shape, seconds), seconds)
        finally:
            self._stop(sequences)
        return best

    def _longest(self, batch: int) -> int:
        """The longest context that so many sequences can have at once; 0 or less where they cannot run together."""
        room = self._limits.num_pages // batch * PAGE_SIZE - self._limits.max_nodes - 1
        return min(self._limits.max_model_len - 1, room)

    def batch_sizes(self, context: int = CONTEXT) -> list[int]:
        """1, 2, 4 and so on while the engine has rows and pages for them."""
        return [2**power for power in range(self._most_rows(context).bit_length())] or [1]

    def _most_rows(self, context: int) -> int:
        """Sequences of that context, or the longest there can be, that the engine has room for at once."""
        context = min(context, self._limits.max_model_len - 1)
        return min(self._limits.max_batch_size, self._limits.num_pages // self._limits.pages_needed(context + 1))

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

    def _step(self, sequences: list[Sequence], trees: Items[TokenTree], context: int) -> float:
        self._runner.rewind(sequences, context)
        start = time.perf_counter()
        self._runner.decode(sequences, list(trees), num_heads=max(tree.max_depth for tree in trees)).collect()
        return time.perf_counter() - start


def spread_evenly(grown: GrownTree, batch: int, total: int) -> list[TokenTree]:
    """`total` nodes over `batch` sequences as evenly as whole nodes allow: how a ragged shape is measured."""
    if not batch <= total <= batch * grown.max_nodes:
        raise ValueError(f"{total} nodes over {batch} sequences: each has 1 to {grown.max_nodes}")
    share, left = divmod(total, batch)
    return [grown.tree(share + (i < left)) for i in range(batch)]


def _rotated(shapes: list[T], by: int) -> list[T]:
    by %= len(shapes)
    return shapes[by:] + shapes[:by]
