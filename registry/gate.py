"""The promotion gate: what an evaluation must show before a version may become the champion.

`evaluation.json` of the evaluate step is one EvaluationSummary: the candidate's Measurement and, when a
champion exists, the champion's own beside it, measured in the same run on the same prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from medusa.config import strict, validate

FLOAT32 = "float32"


class GateRefused(RuntimeError):
    """The version may not become champion; the message holds every reason."""

    def __init__(self, subject: str, reasons: tuple[str, ...]) -> None:
        super().__init__(f"{subject} is refused by the gate: {'; '.join(reasons)}")
        self.reasons = reasons


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    digest: str
    num_prompts: int


@strict
@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first token of a reply where Medusa and plain decoding differ.

    `logit_gap` is the distance between plain decoding's two best logits there: small means a tie that
    rounding broke the other way, large means an error.
    """

    id: str
    position: int
    logit_gap: float
    plain_token: int | None = None
    medusa_token: int | None = None


@strict
@dataclass(frozen=True, kw_only=True)
class ConcurrencyResult:
    plain_tokens_per_second: float
    medusa_tokens_per_second: float
    speedup: float
    speedup_interval: tuple[float, float] | None = None
    acceptance_length: float | None = None
    tree_size: int | None = None
    speculation_chosen: bool | None = None


@strict
@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One checkpoint, measured. Speeds without a concurrency beside them are those at `concurrency`.

    `lossless`: every reply equals plain decoding's; below float32, up to the near-ties in `divergences`.
    When calibration chose a tree of one node the service decodes plainly: then `speculation_chosen` is false
    and `speedup` and `acceptance_length` are 1.0. Quality is for a changed backbone; `details` is free.
    """

    checkpoint_digest: str
    lossless: bool
    divergences: tuple[Divergence, ...]
    evaluation_set: EvaluationSet
    dtype: str
    tree_size: int
    speculation_chosen: bool
    acceptance_length: float
    plain_tokens_per_second: float
    medusa_tokens_per_second: float
    speedup: float
    by_concurrency: dict[str, ConcurrencyResult]
    concurrency: int = 1
    backbone_changed: bool = False
    kl: float | None = None
    perplexity: float | None = None
    base_perplexity: float | None = None
    task_accuracy: float | None = None
    base_task_accuracy: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("acceptance_length", "plain_tokens_per_second", "medusa_tokens_per_second", "speedup"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")


@strict
@dataclass(frozen=True, kw_only=True)
class EvaluationSummary(Measurement):
    champion: Measurement | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "evaluation.json") -> EvaluationSummary:
        """Strict: ConfigError names each key that is missing, unknown or of another type."""
        return validate(cls, data, source=source)


@strict
@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """Tolerances are relative to the champion's value (or to the base model's, for a changed backbone)."""

    min_speedup: float = 1.0
    require_speedup: bool = False  # also refuse a candidate for which calibration switched speculation off
    acceptance_tolerance: float = 0.01
    speedup_tolerance: float = 0.03
    max_logit_gap: float = 0.25  # two bfloat16 steps at logits of 16 to 32
    max_kl: float = 0.05
    perplexity_tolerance: float = 0.02
    task_accuracy_tolerance: float = 0.02


@dataclass(frozen=True)
class GateResult:
    """`reasons` says why a candidate was refused; it is empty when it passed."""

    passed: bool
    reasons: tuple[str, ...] = ()

    def require(self, subject: str) -> None:
        if not self.passed:
            raise GateRefused(subject, self.reasons)


def evaluate_gate(candidate: Measurement, champion: Measurement | None, config: GateConfig) -> GateResult:
    """Judges a candidate by the rules, and against the champion measured beside it (None: first version)."""
    reasons = [*_exactness(candidate, config), *_speed(candidate, config), *_quality(candidate, config)]
    if champion is not None:
        reasons += _against(candidate, champion, config)
    return GateResult(not reasons, tuple(reasons))


def check_champion(candidate: EvaluationSummary, current_digest: str | None) -> GateResult:
    """Whether the champion measured beside the candidate is the one that it would replace."""
    measured = candidate.champion.checkpoint_digest if candidate.champion else None
    if measured == current_digest or current_digest is None:
        return GateResult(True)
    shown = f"champion {measured}" if measured else "no champion"
    reason = f"the current champion is {current_digest}, but the evaluation measured {shown}; evaluate again"
    return GateResult(False, (reason,))


def _exactness(candidate: Measurement, config: GateConfig) -> Iterator[str]:
    if candidate.evaluation_set.num_prompts < 1:
        yield "the evaluation set is empty"
    if not candidate.lossless:
        yield f"not lossless: {len(candidate.divergences)} replies differ from plain decoding"
    if candidate.dtype == FLOAT32 and candidate.divergences:
        first = candidate.divergences[0]
        yield (
            f"{len(candidate.divergences)} replies differ from plain decoding in float32, where none may "
            f"(first: prompt {first.id}, position {first.position})"
        )
    for divergence in candidate.divergences:
        if not divergence.logit_gap <= config.max_logit_gap:
            yield (
                f"the reply to {divergence.id} differs at position {divergence.position} over a logit gap "
                f"of {divergence.logit_gap:g}, above max_logit_gap {config.max_logit_gap:g}: not rounding"
            )


def _speed(candidate: Measurement, config: GateConfig) -> Iterator[str]:
    if candidate.speculation_chosen:
        if candidate.speedup < config.min_speedup:
            yield (
                f"speedup {candidate.speedup:.3f} at concurrency {candidate.concurrency} is below "
                f"min_speedup {config.min_speedup:g}"
            )
    elif config.require_speedup:
        yield "calibration switched speculation off, and require_speedup asks for a gain"


def _against(candidate: Measurement, champion: Measurement, config: GateConfig) -> Iterator[str]:
    if candidate.evaluation_set.digest != champion.evaluation_set.digest:
        yield (
            f"measured on evaluation set {candidate.evaluation_set.digest}, the champion on "
            f"{champion.evaluation_set.digest}; only numbers of one set compare"
        )
        return
    if candidate.concurrency != champion.concurrency:
        yield f"measured at concurrency {candidate.concurrency}, the champion at {champion.concurrency}"
        return
    acceptance_tolerance = config.acceptance_tolerance
    for what, ours, theirs, tolerance in (
        ("acceptance length", candidate.acceptance_length, champion.acceptance_length, acceptance_tolerance),
        ("speedup", candidate.speedup, champion.speedup, config.speedup_tolerance),
    ):
        yield from _not_below(what, ours, "the champion's", theirs, tolerance)


def _quality(candidate: Measurement, config: GateConfig) -> Iterator[str]:
    if candidate.backbone_changed and (candidate.kl is None or candidate.perplexity is None):
        yield "the backbone was changed, but its kl and perplexity were not measured"
    if candidate.kl is not None and not candidate.kl <= config.max_kl:
        yield f"kl {candidate.kl:g} from the base model is above max_kl {config.max_kl:g}"
    if candidate.perplexity is not None and candidate.base_perplexity is not None:
        limit = candidate.base_perplexity * (1 + config.perplexity_tolerance)
        if not candidate.perplexity <= limit:
            yield f"perplexity {candidate.perplexity:g} is above {limit:g}, the base model's plus tolerance"
    if candidate.task_accuracy is not None and candidate.base_task_accuracy is not None:
        ours, theirs = candidate.task_accuracy, candidate.base_task_accuracy
        yield from _not_below("task accuracy", ours, "the base model's", theirs, config.task_accuracy_tolerance)


def _not_below(what: str, ours: float, whose: str, theirs: float, tolerance: float) -> Iterator[str]:
    if not ours >= theirs * (1 - tolerance):
        yield f"{what} {ours:.3f} is below {whose} {theirs:.3f} (tolerance {tolerance:.0%})"
