"""How long to train and how fast: every number of a training run, and its rates as pure functions of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from medusa.config import strict


@strict
@dataclass(frozen=True, kw_only=True)
class HeadsLossConfig:
    """What a head learns from each position.

    `kind` "tokens": cross-entropy with the reply's token (the paper's). "soft": KL from the backbone's own distribution
    for that token, at `teacher_temperature`; `tokens_share` mixes the token's own cross-entropy into it.
    """

    kind: Literal["tokens", "soft"] = "soft"
    teacher_temperature: float = 1.0
    tokens_share: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.teacher_temperature < math.inf, "teacher_temperature", "above 0", self.teacher_temperature)
        _require(0 <= self.tokens_share <= 1, "tokens_share", "from 0 to 1", self.tokens_share)


@strict
@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Medusa-2 (paper, section 2.2.2): the backbone learns too, L = L_LM + lambda_0 * (weighted sum over the heads).

    `method` "lora": adapters of `rank`, `alpha`, `dropout` on all linear layers, on the LM head only with
    `train_lm_head` (refused where it is tied to the embeddings); "full": every weight. `lm_loss` "distill": KL from the
    model as it was before training; "tokens": cross-entropy. `heads_weight` is lambda_0, reached by
    `heads_weight_schedule` at `ramp_ratio` of the joint steps. The backbone's rate is `lr / heads_lr_scale`.
    For the first `heads_only_ratio` of all steps the backbone rests (two stages, each with its own rate schedule).
    """

    method: Literal["lora", "full"] = "lora"
    rank: int = 32
    alpha: float = 16.0
    dropout: float = 0.05
    train_lm_head: bool = False
    lm_loss: Literal["distill", "tokens"] = "distill"
    heads_weight: float = 0.2
    heads_weight_schedule: Literal["constant", "linear", "sine"] = "constant"
    ramp_ratio: float = 1.0
    heads_lr_scale: float = 4.0
    heads_only_ratio: float = 0.0

    @property
    def needs_base(self) -> bool:
        """Whether any step asks for the model as it was before."""
        return self.lm_loss == "distill" or self.heads_only_ratio > 0

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", "at least 1", self.rank)
        for name in ("alpha", "heads_weight", "heads_lr_scale"):
            _require(0 < getattr(self, name) < math.inf, name, "above 0", getattr(self, name))
        for name in ("dropout", "heads_only_ratio"):
            _require(0 <= getattr(self, name) < 1, name, "from 0 to below 1", getattr(self, name))
        _require(0 < self.ramp_ratio <= 1, "ramp_ratio", "above 0, at most 1", self.ramp_ratio)
        _require(
            not (self.method == "full" and self.train_lm_head),
            "train_lm_head",
            "false with method full, which trains every weight",
            True,
        )


@strict
@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Numbers of a run. `max_steps` replaces `epochs`; `warmup_steps` replaces `warmup_ratio`.

    `batch_size` is rows a step over all workers, `micro_batch_size` rows a forward on one of them (None: all).
    `chunk_size` is rows of logits that exist at once. `hidden_cache_gib` is memory a worker may spend on
    keeping the base model's hidden states over epochs (0: compute them every epoch), main memory or, with
    `hidden_cache_on` "device", the GPU's; joint training has it of its teacher's. `lr` is the heads' peak rate.
    `packing` puts a forward's rows behind each other in one line, without padding.
    `activation_checkpointing` computes the backbone's layers again in the backward (joint training).
    `cross_entropy`: "chunked" is the project's own; "liger" its fused kernels (GPU only); "auto" takes liger on a GPU
    where it is installed. `joint` null: the backbone stays frozen. `loss` null: `heads_loss` tells what is taken.
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
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    loss: HeadsLossConfig | None = None
    joint: JointConfig | None = None
    packing: bool = False
    activation_checkpointing: bool = False
    cross_entropy: Literal["auto", "chunked", "liger"] = "auto"
    chunk_size: int = 1024
    hidden_cache_gib: float = 0.0
    hidden_cache_on: Literal["host", "device"] = "host"
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
        _require(
            self.hidden_cache_gib == 0 or self.joint is None or self.joint.needs_base,
            "hidden_cache_gib",
            "0 in joint training without a teacher: hidden states change",
            self.hidden_cache_gib,
        )

    @property
    def heads_loss(self) -> HeadsLossConfig:
        """The loss that was chosen. Without a choice: soft targets from a frozen backbone, which gave more tokens a
        step (docs/results.md, "Training recipes on chat-28m"); tokens in joint training, as in the paper, since the
        distribution there is that of a model that moves."""
        if self.loss is not None:
            return self.loss
        return HeadsLossConfig(kind="soft" if self.joint is None else "tokens")

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps if self.max_steps is not None else self.epochs * steps_per_epoch

    def heads_only_steps(self, total_steps: int) -> int:
        """Steps of the first stage; all of them where the backbone is frozen."""
        return total_steps if self.joint is None else round(self.joint.heads_only_ratio * total_steps)


def learning_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
    """The heads' rate at the step with this 0-based number: linear warm-up to `lr`, then constant or cosine to the
    floor; of two stages each has this schedule for itself."""
    first_stage = config.heads_only_steps(total_steps)
    if step < first_stage or first_stage == total_steps:
        return _stage_rate(config, step, first_stage)
    return _stage_rate(config, step - first_stage, total_steps - first_stage)


def heads_weight(config: TrainerConfig, step: int, total_steps: int) -> float:
    """lambda_0 at this step: 1 where the backbone is frozen; constant in a first stage; then as scheduled."""
    if config.joint is None:
        return 1.0
    first_stage = config.heads_only_steps(total_steps)
    if step < first_stage or config.joint.heads_weight_schedule == "constant":
        return config.joint.heads_weight
    ramp_steps = config.joint.ramp_ratio * (total_steps - first_stage)
    progress = min((step - first_stage + 1) / ramp_steps, 1.0)
    ramp = math.sin(progress * math.pi / 2) if config.joint.heads_weight_schedule == "sine" else progress
    return config.joint.heads_weight * ramp


def _stage_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
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
