"""What the engine asks of a runner, whatever runs it: prefill chunks and decode steps, launched now, collected later.

The rules between the two:

- Before a launch every sequence has pages for all positions that the launch can write: a chunk its own, a decode step
  one a node behind the sequence's length. Until a step is collected the host knows that length as an upper bound.
- Launches take effect in order. What a launch writes may be relied on by every later one, collected or not; so a page
  that the host gives to another sequence is safe from the steps that were launched before.
- A runner of lag 1 is collected one engine step late. A sequence that ended on the host meanwhile (a stop string, an
  abort) may therefore be in a step that no one waits for: what that step gave it is dropped.
- A launch may be dropped without being collected.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from medusa.engine.sequence import Sequence, TokenLogprob
from medusa.engine.shapes import Buckets
from medusa.heads import DraftHeads
from medusa.tree import Path, TokenTree


@dataclass(frozen=True)
class StepTokens:
    """What a launch gave one sequence, in order; log-probabilities only when its request asks for them.

    `prompt_logprobs` are a chunk's, of the prompt's tokens after each of its own.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob]
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens of a sequence to compute next: those from position `start` on; all before them are in its pages.

    After the last chunk the sequence decodes. Its next token is drawn, or is `next_token` where the reply had begun
    before the sequence lost its pages; such a chunk gives no token.
    """

    sequence: Sequence
    start: int
    token_ids: list[int]
    is_last: bool
    next_token: int | None = None

    @classmethod
    def after(cls, sequence: Sequence, max_tokens: int) -> PrefillChunk:
        """What follows the cached positions of a sequence that is being filled."""
        start = sequence.num_cached
        end = min(start + max_tokens, sequence.num_to_fill)
        is_last = end == sequence.num_to_fill
        return cls(
            sequence=sequence,
            start=start,
            token_ids=sequence.tokens(start, end),
            is_last=is_last,
            next_token=sequence.output_ids[-1] if is_last and sequence.output_ids else None,
        )

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def gives_token(self) -> bool:
        return self.is_last and self.next_token is None


class Launched(Protocol):
    """Work under way."""

    def collect(self) -> list[StepTokens]:
        """Waits for its end: one entry a chunk or sequence, in the order of the launch. To be called once at most."""
        ...


@dataclass(frozen=True)
class Done:
    """Work that had ended when its launch returned."""

    steps: list[StepTokens]

    def collect(self) -> list[StepTokens]:
        return self.steps


class StepRunner(Protocol):
    """Owns the device state of the batch, one row a running sequence (`Sequence.row`)."""

    @property
    def lag(self) -> int:
        """How many engine steps a launch may be collected late: 0 or 1."""
        ...

    @property
    def buckets(self) -> Buckets | None:
        """The shapes that it has ready, by sequences and by nodes of all trees together, which may differ from tree to
        tree. None where it pads all trees of a step to the largest."""
        ...

    def prefill(self, chunks: Items[PrefillChunk], *, num_heads: int) -> Launched:
        """Computes the chunks' keys and values; after a last chunk also the next token, as drawn or as told, and the
        guesses of the first `num_heads` heads. Chunks that are not the last give no token. A chunk of a sequence that
        `needs_prompt_logprobs` gives those of the prompt's tokens that follow its own."""
        ...

    def decode(self, sequences: Items[Sequence], trees: Items[TokenTree], *, num_heads: int) -> Launched:
        """One step with a tree a sequence: propose, verify in one forward, accept, commit. `num_heads` heads guess for
        the next step; nodes deeper than the heads that guessed for this one take no part."""
        ...

    def take_heads(self, heads: DraftHeads, growth: Items[Path]) -> DraftHeads:
        """Guesses with the weights of these heads from the next launch on, and returns those that hold them: they are
        copied into the ones in use, which must have the same shape. Guesses that were made stay. `growth` is the order
        in which the trees of these heads grow."""
        ...

    def rewind(self, sequences: Items[Sequence], length: int) -> None:
        """Forgets what was committed after `length` positions, for timing the same step again. Rows then count as
        having guesses of all heads, whatever they are."""
        ...
