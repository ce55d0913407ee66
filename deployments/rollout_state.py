"""What a rollout is told, and what it leaves behind: the tag that says what a service has done with a version."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from medusa.config import ConfigError
from registry.versions import VersionRef


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What counts as worse. Rates are compared once there are `min_requests` (and as many drafts) to judge by.

    `watch_s` without a request settles too: nobody was harmed, and nothing could be learned.
    """

    settle_timeout_s: float = 900.0  # for all replicas to answer with the new heads
    baseline_s: float = 60.0  # how the service does is measured for so long before anything is changed
    watch_s: float = 600.0
    poll_s: float = 5.0
    away_s: float = 60.0  # a service that answers nothing for so long is not well
    min_requests: int = 50
    max_more_errors: float = 0.02  # error rate above the one before
    acceptance_tolerance: float = 0.10  # tokens a step below those before

    def __post_init__(self) -> None:
        for name in ("settle_timeout_s", "baseline_s", "watch_s", "poll_s", "away_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What a service has done with a version: the content of its tag."""

    state: Literal["started", "settled", "failed"]
    baseline: dict[str, float] | None = None
    model: str | None = None  # the backbone's folder that it runs on
    reason: str | None = None
    time: float = 0.0

    @classmethod
    def of(cls, version: VersionRef, key: str) -> Mark | None:
        return cls(**json.loads(version.tags[key])) if version.tags.get(key) else None
