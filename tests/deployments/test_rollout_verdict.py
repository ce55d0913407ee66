"""What counts as worse, at the edges of what a rollout is told to allow."""

from __future__ import annotations

import pytest

from deployments.rollout_signals import Counts
from deployments.rollout_state import RolloutConfig
from deployments.rollout_verdict import why_worse

CONFIG = RolloutConfig(min_requests=50, max_more_errors=0.02, acceptance_tolerance=0.125)
BEFORE = Counts(answered=98, errors=2, drafts=100, accepted=300)  # four tokens a step


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (Counts(answered=96, errors=4, drafts=100, accepted=300), None),
        (Counts(answered=95, errors=5, drafts=100, accepted=300), "5.0% of 100 requests failed, before it were 2.0%"),
        (Counts(answered=0, errors=49), None),
        (Counts(answered=0, errors=50), "100.0% of 50 requests failed"),
        (Counts(answered=100, drafts=100, accepted=250), None),
        (Counts(answered=100, drafts=100, accepted=249), "3.49 tokens a step over 100 steps, before it were 4.00"),
        (Counts(answered=100, drafts=49, accepted=0), None),
        (Counts(answered=100), None),
    ],
)
def test_worse_is_what_passes_the_allowance_with_enough_to_judge_by(seen: Counts, reason: str | None) -> None:
    found = why_worse(seen, BEFORE, CONFIG)
    assert found is None if reason is None else reason in (found or "")


def test_after_plain_decoding_no_length_is_worse() -> None:
    assert why_worse(Counts(answered=100, drafts=100, accepted=1), Counts(answered=100), CONFIG) is None
