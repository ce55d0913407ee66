"""What one request accepts, compared with what calibration expects of it."""

from __future__ import annotations

MIN_FACTOR, MAX_FACTOR = 1 / 16, 4.0  # how far a request may lie from calibration
MEMORY = 31 / 32  # of what was seen, what a step with drafts leaves
FADING = 255 / 256  # ... and a plain step, which shows nothing
PRIOR = 1.0  # calibration counts as much as so many expected drafts


class Acceptance:
    """`factor` multiplies calibration's probabilities; from MIN_FACTOR to MAX_FACTOR, 1 at the start.

    It is the ratio of two moving averages, accepted over expected drafts, drawn towards 1 while there is little to go
    by. After a plain step there are no guesses, so the next step's drafts say nothing and are not counted.
    """

    __slots__ = ("_accepted", "_expected", "_has_guesses", "factor")

    def __init__(self) -> None:
        self.factor = 1.0
        self._accepted = self._expected = 0.0
        self._has_guesses = True

    def observe(self, expected: float, accepted: float) -> None:
        """After a step with drafts: how many calibration expected to be accepted, and how many were."""
        if self._has_guesses:
            self._update(self._accepted * MEMORY + accepted, self._expected * MEMORY + expected)
        self._has_guesses = True

    def rest(self) -> None:
        """After a plain step: what was seen fades, so that a request that was given up is tried again."""
        self._update(self._accepted * FADING, self._expected * FADING)
        self._has_guesses = False

    def _update(self, accepted: float, expected: float) -> None:
        self._accepted, self._expected = accepted, expected
        ratio = (accepted + PRIOR) / (expected + PRIOR)
        self.factor = min(max(ratio, MIN_FACTOR), MAX_FACTOR)
