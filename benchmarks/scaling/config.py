"""What `medusa bench scale` measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa.config import ConfigError, to_dict

PARTS = ("ray", "distill", "medusa-1", "medusa-2", "serve", "autoscale", "tensor-parallel")
TARGETS = {"distill": 0.95, "medusa-1": 0.9, "medusa-2": 0.9, "serve": 0.95}
_NOT_OF_A_PART = {"parts", "time_budget", "part_limit", "out", "again"}


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """`workers` counts actors, training workers or replicas, one GPU each where there are GPUs; 1 is among them, since
    ratios are to it. Work grows with the workers: `rows` prompts an actor, `batch` training rows a worker,
    `concurrency` requests at once a replica.
    """

    workers: tuple[int, ...] = (1, 2, 4)
    parts: tuple[str, ...] = PARTS
    model: str = "models/chat-8m"
    heads: str | None = None
    inflate: str | None = None
    dtype: str | None = None
    device: str | None = None
    repeats: int = 3
    max_batch_size: int = 64
    kv_cache_gb: float | None = None
    # distillation
    prompts: Path | None = None
    rows: int = 256
    reply_tokens: int = 128
    rows_per_block: int = 16
    # training
    batch: int = 8
    length: int = 2048
    num_heads: int = 4
    steps: int = 5
    joint_method: str = "lora"
    # serving
    concurrency: tuple[int, ...] = (1, 16, 64)
    prompt_tokens: int = 128
    upscale_delay_s: float = 10.0
    # time
    time_budget: float | None = None
    part_limit: float = 600.0
    again: bool = False
    out: Path = Path("runs/bench/scale")

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            raise ConfigError(f"--parts are of {', '.join(PARTS)}, got {', '.join(unknown) or 'none'}")
        if 1 not in self.workers or min(self.workers) < 1:
            raise ConfigError(f"--workers must have 1 among numbers from 1 on (ratios are to it), got {self.workers}")
        if not self.concurrency or min(self.concurrency) < 1:
            raise ConfigError(f"--concurrency is numbers from 1 on, got {self.concurrency}")
        for name in ("repeats", "max_batch_size", "rows", "reply_tokens", "rows_per_block", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.part_limit <= 0 or (self.time_budget is not None and self.time_budget <= 0):
            raise ConfigError(f"seconds are above 0, got {self.part_limit} a part and {self.time_budget} in all")
        if self.joint_method not in ("lora", "full"):
            raise ConfigError(f"--joint-method is lora or full, got {self.joint_method!r}")

    @property
    def most(self) -> int:
        return max(self.workers)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the figures."""
        return {name: value for name, value in to_dict(self).items() if name not in _NOT_OF_A_PART}
