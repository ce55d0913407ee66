"""What steps add up to over all workers, and the watch for losses that are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medusa.training.loss import LM_SUMS, HeadTotals
from medusa.training.objective import Sums


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite; the message names the step (1-based) and the heads, or the language model."""

    def __init__(self, step: int, heads: Sequence[int], language_model: bool = False) -> None:
        self.step, self.heads = step, tuple(heads)
        of_heads = [f"head {', '.join(map(str, heads))}"] if heads else []
        of_model = ["the language model"] if language_model else []
        super().__init__(
            f"loss of {' and of '.join(of_heads + of_model)} is not finite at step {step}; nothing was saved since. "
            "Lower the learning rate or look at the rows of that step"
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """The sums of some steps or rows over all workers: the heads', and the language model's by LM_SUMS."""

    heads: HeadTotals
    lm_L: Tensor

    @classmethod
    def zeros(cls, num_heads: int, device: torch.device) -> Totals:
        lm_L = torch.zeros(len(LM_SUMS), dtype=torch.float64, device=device)
        return cls(HeadTotals.zeros(num_heads, device), lm_L)

    @classmethod
    def of(cls, sums: Sums) -> Totals:
        return cls(HeadTotals(sums.heads_MK.detach()), sums.lm_L.detach())

    def __add__(self, other: Totals) -> Totals:
        return Totals(self.heads + other.heads, self.lm_L + other.lm_L)

    def record(self) -> dict[str, float]:
        """Plain numbers, by head and of the language model where it learns; waits for the device."""
        record: dict[str, float] = {}
        for name in ("loss", "top1_accuracy", "top5_accuracy", "coverage"):
            values = getattr(self.heads, "mean_loss_K" if name == "loss" else f"{name}_K").tolist()
            record |= {f"head_{k}/{name}": value for k, value in enumerate(values)}
        lm = dict(zip(LM_SUMS, self.lm_L.tolist(), strict=True))
        if lm["labels"]:
            record |= {f"lm/{name}": lm[name] / lm["labels"] for name in ("loss", "top1", "overlap")}
        return record


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step over all workers; tensors are on the device until read. `step` counts done steps."""

    step: int
    learning_rate: float
    heads_weight: float
    tokens: int
    totals: Totals
    loss: Tensor
    grad_norm: Tensor


class NonFiniteWatch:
    """Remembers, on the device, the first step at which each loss was not finite: asking at once would make every step
    wait for it."""

    def __init__(self, num_heads: int, device: torch.device) -> None:
        self._first_bad_step = torch.zeros(num_heads + 1, dtype=torch.long, device=device)  # the last: the model's

    def note(self, totals: Totals, step: int) -> None:
        """The totals of this step, from 1 on. On a CPU, where nothing is waited for, checks at once."""
        losses = torch.cat([totals.heads.loss_K, totals.lm_L[:1]])
        bad = ~losses.isfinite() & (self._first_bad_step == 0)
        self._first_bad_step.masked_fill_(bad, step)
        if self._first_bad_step.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises NonFiniteLossError if any step so far had a loss that is not finite."""
        bad = {k: step for k, step in enumerate(self._first_bad_step.tolist()) if step}
        if bad:
            first, lm = min(bad.values()), len(self._first_bad_step) - 1
            bad_heads = [k for k, step in bad.items() if step == first and k != lm]
            raise NonFiniteLossError(first, bad_heads, language_model=bad.get(lm) == first)
