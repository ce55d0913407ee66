"""Which sequences run, what each does in a step, and on which pages.

First come, first served, within a priority: both lists are in order of turn. Pages are taken as a sequence grows. When
they run out the last running sequence loses its own and goes back to its turn in the queue, to be computed again later.
The first can take pages from all others, and no request is taken that could not run alone; so it always gets on, and
everyone becomes the first in time, once those of a lower priority are done.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from medusa.engine.kv_cache import PAGE_SIZE, KVCache, pages_for
from medusa.engine.sequence import Sequence
from medusa.engine.step import PrefillChunk
from medusa.tree import TokenTree

ChooseTrees = Callable[[list[Sequence]], list[TokenTree]]  # a step's trees, one a sequence
RECENT_STEPS = 8  # of a sequence, that tell how many tokens the next gives it


@dataclass(frozen=True)
class Plan:
    """One step: chunks to prefill, then sequences to decode, those among them whose last chunk this is."""

    chunks: list[PrefillChunk]
    decoding: list[Sequence]
    trees: list[TokenTree]


class Scheduler:
    """Sequences wait in order, take a row of the batch and pages as they need them, and leave.

    A step writes up to `max_nodes` positions past a sequence's own; it prefills up to `max_prefill_tokens` in all for
    each token that decoding gives a sequence in it. So prompts cost replies no more time a token than with plain
    decoding, which gives one, and are computed no more slowly, though a step with trees takes longer.
    """

    def __init__(self, cache: KVCache, *, max_batch_size: int, max_nodes: int, max_prefill_tokens: int) -> None:
        self._cache = cache
        self._max_nodes = max_nodes
        self._max_prefill_tokens = max_prefill_tokens
        self._left_over = 0.0  # of the last step's prefill budget, in parts of `max_prefill_tokens`
        self._rows = list(range(max_batch_size - 1, -1, -1))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._ages = itertools.count()
        self.num_preemptions = 0
        self.num_reused_tokens = 0

    def add(self, sequence: Sequence) -> None:
        """Lets it wait for its turn."""
        sequence.age = next(self._ages)
        insort(self.waiting, sequence, key=_turn)

    def holds(self, request_id: str) -> bool:
        return any(sequence.request_id == request_id for sequence in (*self.running, *self.waiting))

    def schedule(self, choose: ChooseTrees, *, may_preempt: bool = True) -> Plan | None:
        """The next step, with pages for all of it. None when pages run out and none may be taken from a sequence."""
        self.admit()
        budget, left_over = self._prefill_budget()
        chunks = self._share_out_prefill(budget)
        decoding = [s for s in self.running if _decodes(s, chunks.get(s))]
        trees = dict(zip(decoding, choose(decoding), strict=True)) if decoding else {}
        for sequence in list(self.running):
            needed = _positions_needed(sequence, chunks.get(sequence), trees.get(sequence))
            while sequence.row >= 0 and not self._cache.grow(sequence.row, needed):
                if not may_preempt:
                    return None
                self._preempt(self.running[-1])
        self._left_over = left_over
        decoding = [s for s in decoding if s.row >= 0]
        return Plan(
            chunks=[chunk for s, chunk in chunks.items() if s.row >= 0],
            decoding=decoding,
            trees=[trees[s] for s in decoding],
        )

    def admit(self) -> list[Sequence]:
        """Moves waiting sequences into the batch while there are rows, and pages for all that they have to fill."""
        admitted: list[Sequence] = []
        promised = sum(self._pages_to_come(sequence) for sequence in self.running if not sequence.is_filled)
        while self.waiting and self._rows:
            sequence = self.waiting[0]
            promised += self._pages_to_come(sequence)
            if self.running and promised > self._cache.pool.num_available:
                break
            sequence.row = self._rows.pop()
            insort(self.running, self.waiting.popleft(), key=_turn)
            admitted.append(sequence)
        return admitted

    def note_launch(self, chunk: PrefillChunk) -> None:
        """Counts a chunk as cached from its launch on: later launches find its pages written."""
        sequence = chunk.sequence
        sequence.num_cached = chunk.end
        self.register(sequence)

    def register(self, sequence: Sequence) -> None:
        """Makes the text of the sequence's full pages known, for others to begin with."""
        num_pages = sequence.num_cached // PAGE_SIZE
        if num_pages > self._cache.num_known(sequence.row):
            self._cache.register(sequence.row, sequence.page_digests(self._cache.pool.root_digest, num_pages))

    def retire(self) -> None:
        """Frees the rows and pages of sequences that have finished."""
        for sequence in self.running:
            if sequence.finish_reason is not None:
                self._release(sequence)
        self.running = [sequence for sequence in self.running if sequence.row >= 0]

    def remove(self, request_id: str) -> list[Sequence]:
        """Takes a request's sequences out, running or waiting, and returns them."""
        removed = [s for s in (*self.running, *self.waiting) if s.request_id == request_id]
        for sequence in removed:
            if sequence.row >= 0:
                self._release(sequence)
        self.running = [s for s in self.running if s.request_id != request_id]
        self.waiting = deque(s for s in self.waiting if s.request_id != request_id)
        return removed

    def clear(self) -> None:
        """Forgets all sequences, running and waiting."""
        for sequence in self.running:
            self._release(sequence)
        self.running.clear()
        self.waiting.clear()

    def _prefill_budget(self) -> tuple[int, float]:
        """Prompt tokens of this step: whole times `max_prefill_tokens`, since a GPU pads its forwards; and what that
        leaves of a token's share, which is the next step's."""
        if all(sequence.is_filled for sequence in self.running):
            return 0, 0.0
        shares = self._left_over + self._tokens_per_step()
        return int(shares) * self._max_prefill_tokens, shares % 1

    def _tokens_per_step(self) -> float:
        """What a decode step has given a running sequence of late; 1 while there was none."""
        decoding = (sequence for sequence in self.running if sequence.is_filled)
        recent = [count for sequence in decoding for count in sequence.accepted_per_step[-RECENT_STEPS:]]
        return sum(recent) / len(recent) if recent else 1.0

    def _share_out_prefill(self, budget: int) -> dict[Sequence, PrefillChunk]:
        """Chunks for the sequences that are being filled, the oldest first, within a budget of tokens.

        One whose next page an older one is about to compute waits for it, so that a text is computed once.
        """
        chunks: dict[Sequence, PrefillChunk] = {}
        underway: set[bytes] = set()
        for sequence in (s for s in self.running if not s.is_filled):
            self._reuse_pages(sequence)
            coming = self._shareable_digests(sequence)[sequence.num_cached // PAGE_SIZE :]
            waits = self._is_between_pages(sequence) and not underway.isdisjoint(coming[:1])
            if budget > 0 and not waits:
                chunks[sequence] = PrefillChunk.after(sequence, budget)
                budget -= len(chunks[sequence].token_ids)
            underway.update(coming)
        return chunks

    def _reuse_pages(self, sequence: Sequence) -> None:
        """Takes over pages that hold the sequence's next tokens already."""
        if self._is_between_pages(sequence):
            digests = self._shareable_digests(sequence)[sequence.num_cached // PAGE_SIZE :]
            num_tokens = self._cache.share(sequence.row, digests) * PAGE_SIZE
            sequence.num_cached += num_tokens
            self.num_reused_tokens += num_tokens

    def _is_between_pages(self, sequence: Sequence) -> bool:
        return self._cache.num_owned(sequence.row) * PAGE_SIZE == sequence.num_cached

    def _shareable_digests(self, sequence: Sequence) -> list[bytes]:
        """Of full pages before the last token to fill, which is always computed: the heads need its hidden state."""
        if sequence.needs_prompt_logprobs:
            return []
        return sequence.page_digests(self._cache.pool.root_digest, (sequence.num_to_fill - 1) // PAGE_SIZE)

    def _pages_to_come(self, sequence: Sequence) -> int:
        """Pages that a sequence still takes from the available ones until it has been filled and can decode."""
        total = pages_for(sequence.num_to_fill + self._max_nodes)
        if sequence.row >= 0:
            return total - self._cache.num_owned(sequence.row)
        return total - self._cache.pool.num_shareable_in_use(self._shareable_digests(sequence))

    def _preempt(self, sequence: Sequence) -> None:
        """Takes the row and pages of the last running sequence, which waits for its turn again."""
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=_turn)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._cache.free(sequence.row)
        self._rows.append(sequence.row)
        sequence.forget_cache()


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn


def _decodes(sequence: Sequence, chunk: PrefillChunk | None) -> bool:
    """Whether it decodes in this step, after its chunk if it has one; not where that token ends it for sure."""
    if chunk is None:
        return sequence.is_filled and not sequence.is_ending
    return chunk.is_last and not (chunk.gives_token and sequence.max_new_tokens == 1)


def _positions_needed(sequence: Sequence, chunk: PrefillChunk | None, tree: TokenTree | None) -> int:
    """Positions that must have pages for the sequence's part of a step."""
    filled = chunk.end if chunk else sequence.num_cached
    return filled + sequence.most_ahead + tree.num_nodes if tree else filled
