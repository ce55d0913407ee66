"""Whether a service does worse than before, by what its replicas counted: in words, as they are what is recorded."""

from __future__ import annotations

from deployments.rollout_signals import Counts
from deployments.rollout_state import RolloutConfig


def why_worse(seen: Counts, before: Counts, config: RolloutConfig) -> str | None:
    """More errors or fewer tokens a step than `config` allows; None where it is neither, or there is too little to
    judge by."""
    if seen.requests >= config.min_requests:
        allowed = before.error_rate + config.max_more_errors
        if seen.error_rate > allowed:
            return (
                f"{seen.error_rate:.1%} of {seen.requests:.0f} requests failed, before it were "
                f"{before.error_rate:.1%} (allowed: {allowed:.1%})"
            )
    ours, theirs = seen.tokens_per_step, before.tokens_per_step
    if ours is None or theirs is None or min(seen.drafts, before.drafts) < config.min_requests:
        return None
    if ours < theirs * (1 - config.acceptance_tolerance):
        return (
            f"{ours:.2f} tokens a step over {seen.drafts:.0f} steps, before it were {theirs:.2f} "
            f"(tolerance {config.acceptance_tolerance:.0%})"
        )
    return None


def in_words(seen: Counts) -> str:
    if not seen.requests:
        return "without a request in that time"
    length = f", {seen.tokens_per_step:.2f} tokens a step" if seen.tokens_per_step else ""
    return f"{seen.requests:.0f} requests, {seen.error_rate:.1%} failed{length}"
