"""How long to train and how fast: every number of a training run, and the learning rate as a pure function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from medusa.config import strict


@strict
@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Numbers of a run. `max_steps` replaces `epochs`; `warmup_steps` replaces `warmup_ratio`.

    `batch_size` is rows a step over all workers, `micro_batch_size` rows a forward on one of them (None: all).
    `chunk_size` is rows of logits that exist at once. `hidden_cache_gib` is main memory a worker may spend on
    keeping the backbone's hidden states over epochs (0: compute them every epoch).
    """

    epochs: int = 2
    max_steps: int | None = None
    batch_size: int = 64
    micro_batch_size: int | None = None
    bucket_batches: int = 16
    max_length: int = 2048
    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_ratio: float = 0.1
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float | None = 1.0
    head_decay: float = 0.8
    chunk_size: int = 1024
    hidden_cache_gib: float = 0.0
    log_every: int = 10
    checkpoint_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "bucket_batches", "chunk_size", "log_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("max_steps", "micro_batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1, or null", value)
        _require(self.max_length >= 3, "max_length", "at least 3 (prompt, next token, label)", self.max_length)
        for name in ("lr", "eps"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, "above 0", value)
        for name in ("warmup_ratio", "min_lr_ratio", "head_decay"):
            _require(0 <= getattr(self, name) <= 1, name, "from 0 to 1", getattr(self, name))
        for name in ("weight_decay", "hidden_cache_gib"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "0 or more", self.warmup_steps)
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", "each from 0 to below 1", self.betas)
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", "above 0, or null", self.grad_clip)

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps if self.max_steps is not None else self.epochs * steps_per_epoch


def learning_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
    """Rate of the step with this 0-based number: linear warm-up to `lr`, then constant or cosine to the floor."""
    warmup = config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    floor = config.lr * config.min_lr_ratio
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _require(holds: bool, name: str, allowed: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value}")
