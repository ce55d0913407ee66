"""How many replicas the load needs: replies, pages in use, waiting prompt tokens and step time, against their targets.

Every replica reports its load (`record_autoscaling_stats`); Serve's controller averages the reports and calls
`LoadPolicy`, and applies the bounds and delays of the configuration itself. The controller unpickles this module:
nothing but the standard library is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from deployments.async_engine import AsyncEngine
    from deployments.config import ServerConfig

SLACK = 0.85  # fewer replicas only where these would be filled to at most so much, so that the number does not swing


class Context(Protocol):
    """What `LoadPolicy` reads of Ray Serve's AutoscalingContext."""

    target_num_replicas: int
    running_replicas: list[Any]
    aggregated_metrics: dict[str, dict[Any, float]] | None
    total_queued_requests: float | None


def load_of(engine: AsyncEngine) -> dict[str, float]:
    """What a replica reports."""
    stats, held = engine.stats(), engine.held
    return {
        "replies": float(held.replies),
        "page_use": stats.pages_used / stats.pages_total if stats.pages_total else 0.0,
        "queued_tokens": float(held.prompt_tokens),
        "step_s": engine.step_seconds if stats.running else 0.0,
    }


class LoadPolicy:
    """The loads of all replicas, in replicas filled to their targets, summed. A target of None is not looked at."""

    def __init__(
        self,
        *,
        replies: float,
        page_use: float | None = None,
        queued_tokens: float | None = None,
        step_s: float | None = None,
    ) -> None:
        self.targets = {"replies": replies, "page_use": page_use, "queued_tokens": queued_tokens, "step_s": step_s}

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        reports = context.aggregated_metrics or {}
        needed = sum(self._fill(reports, replica) for replica in context.running_replicas)
        needed += (context.total_queued_requests or 0.0) / float(self.targets["replies"] or 1.0)
        now = context.target_num_replicas
        if SLACK * (now - 1) < needed < now:
            needed = now
        return needed, {}

    def _fill(self, reports: dict[str, dict[Any, float]], replica: Any) -> float:
        """How full a replica is, by the target that it is closest to or furthest above; 0 before its first report."""
        shares = [
            reports.get(name, {}).get(replica, 0.0) / target
            for name, target in self.targets.items()
            if target is not None
        ]
        return max(shares)


def autoscaling_options(config: ServerConfig) -> dict[str, Any]:
    """Serve's `autoscaling_config`."""
    replies = config.target_ongoing_requests or max(1.0, 0.75 * config.max_batch_size)
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": replies,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
        "look_back_period_s": config.look_back_s,
        "policy": {
            "policy_function": "deployments.autoscaling:LoadPolicy",
            "policy_kwargs": {
                "replies": replies,
                "page_use": config.target_page_use,
                "queued_tokens": config.target_queued_tokens,
                "step_s": config.target_step_s,
            },
        },
    }
