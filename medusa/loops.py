"""Where a reply falls into a loop. Small models repeat themselves for ever; a loop is easy to guess ahead, so
counted in full it would flatter any acceptance figure, and trained on in full it would teach the heads little
else.
"""

from __future__ import annotations

from collections.abc import Sequence


def cut_at_loop(token_ids: Sequence[int], n: int = 4, repeats: int = 3) -> int:
    """How many tokens stand before the `repeats`-th occurrence of any n-gram; all, when none occurs so often.

    Occurrences may overlap. What follows that occurrence does not change the cut, so it is known while the
    reply is still being written.
    """
    finder = LoopFinder(n, repeats)
    for token_id in token_ids:
        finder.push(token_id)
    return len(token_ids) if finder.cut is None else finder.cut


class LoopFinder:
    """The same rule, one token at a time: `push` is True once the reply loops, and `cut` is where."""

    def __init__(self, n: int = 4, repeats: int = 3) -> None:
        if n < 1 or repeats < 1:
            raise ValueError(f"a loop is an n-gram with n >= 1 seen repeats >= 1 times, got n={n}, repeats={repeats}")
        self.cut: int | None = None
        self._n, self._repeats = n, repeats
        self._length = 0
        self._window: tuple[int, ...] = ()
        self._seen: dict[tuple[int, ...], int] = {}

    def push(self, token_id: int) -> bool:
        if self.cut is not None:
            return True
        self._length += 1
        self._window = (*self._window, token_id)[-self._n :]
        if len(self._window) < self._n:
            return False
        self._seen[self._window] = self._seen.get(self._window, 0) + 1
        if self._seen[self._window] == self._repeats:
            self.cut = self._length - self._n
        return self.cut is not None
