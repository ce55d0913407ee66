"""What requests accept, compared with what calibration expects of them."""

from __future__ import annotations

MIN_FACTOR, MAX_FACTOR = 1 / 16, 4.0  # how far a request may lie from calibration
MEMORY = 31 / 32  # of what was seen, what a step with drafts leaves
FADING = 255 / 256  # ... and a plain step, which shows nothing
PRIOR = 1.0  # where a request begins counts as much as so many expected drafts
LONG_MEMORY = 2047 / 2048  # of what was seen of all requests of a temperature
LONG_PRIOR = 32.0


class Acceptance:
    """`factor` multiplies calibration's probabilities; from MIN_FACTOR to MAX_FACTOR, 1 at the start unless told
    otherwise.

    It is the ratio of two moving averages, accepted over expected drafts, drawn towards where it began while there is
    little to go by. After a plain step there are no guesses, so the next step's drafts say nothing and are not counted.
    """

    __slots__ = ("_accepted", "_expected", "_has_guesses", "_start", "factor", "has_begun")

    def __init__(self) -> None:
        self.factor = self._start = 1.0
        self.has_begun = False
        self._accepted = self._expected = 0.0
        self._has_guesses = True

    def begin(self, factor: float) -> None:
        """What to expect of the request before it has shown anything."""
        self.factor, self._start, self.has_begun = factor, factor, True

    def observe(self, expected: float, accepted: float) -> bool:
        """After a step with drafts: how many calibration expected to be accepted, and how many were. Returns whether
        that says anything."""
        counts, self._has_guesses = self._has_guesses, True
        if counts:
            self._update(self._accepted * MEMORY + accepted, self._expected * MEMORY + expected)
        return counts

    def rest(self) -> None:
        """After a plain step: what was seen fades, so that a request that was given up is tried again."""
        self._update(self._accepted * FADING, self._expected * FADING)
        self._has_guesses = False

    def _update(self, accepted: float, expected: float) -> None:
        self._accepted, self._expected = accepted, expected
        self.factor = _bounded((accepted + PRIOR * self._start) / (expected + PRIOR))


class UsualAcceptance:
    """What requests of one temperature accept by and by, for new ones to begin at: calibration was made at another
    temperature, or on other text."""

    __slots__ = ("_accepted", "_expected")

    def __init__(self) -> None:
        self._accepted = self._expected = 0.0

    @property
    def factor(self) -> float:
        return _bounded((self._accepted + LONG_PRIOR) / (self._expected + LONG_PRIOR))

    def observe(self, expected: float, accepted: float) -> None:
        self._accepted = self._accepted * LONG_MEMORY + accepted
        self._expected = self._expected * LONG_MEMORY + expected


def _bounded(ratio: float) -> float:
    return min(max(ratio, MIN_FACTOR), MAX_FACTOR)
