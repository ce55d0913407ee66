"""A runner whose steps several processes share: an error of any of them ends them all, and is told with its cause."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medusa.engine.followers import Followers
from medusa.engine.sequence import Sequence
from medusa.engine.shapes import Buckets
from medusa.engine.step import Launched, PrefillChunk, StepTokens
from medusa.heads import DraftHeads
from medusa.tree import Path, TokenTree

if TYPE_CHECKING:
    from medusa.engine.graph_runner import GraphRunner  # Triton is not installed everywhere


@dataclass(frozen=True)
class WatchedLaunch:
    """Work under way in all processes."""

    launched: Launched
    followers: Followers

    def collect(self) -> list[StepTokens]:
        """As Launched.collect. What came of a step whose sums were broken off is not taken."""
        with self.followers.together():
            steps = self.launched.collect()
            self.followers.check()
            return steps


class WatchedRunner:
    """`runner`, which tells the followers by itself, with its errors told as theirs."""

    def __init__(self, runner: GraphRunner, followers: Followers) -> None:
        self._runner, self._followers = runner, followers
        self.release = runner.release

    @property
    def lag(self) -> int:
        return self._runner.lag

    @property
    def buckets(self) -> Buckets | None:
        return self._runner.buckets

    def prefill(self, chunks: Items[PrefillChunk], *, num_heads: int) -> Launched:
        """As StepRunner.prefill."""
        with self._followers.together():
            return WatchedLaunch(self._runner.prefill(chunks, num_heads=num_heads), self._followers)

    def decode(self, sequences: Items[Sequence], trees: Items[TokenTree], *, num_heads: int) -> Launched:
        """As StepRunner.decode."""
        with self._followers.together():
            return WatchedLaunch(self._runner.decode(sequences, trees, num_heads=num_heads), self._followers)

    def take_heads(self, heads: DraftHeads, growth: Items[Path]) -> DraftHeads:
        """As StepRunner.take_heads: heads are in the first process alone."""
        return self._runner.take_heads(heads, growth)

    def rewind(self, sequences: Items[Sequence], length: int) -> None:
        """As StepRunner.rewind: lengths are handed out with each pass."""
        self._runner.rewind(sequences, length)
