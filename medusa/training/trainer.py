"""Medusa-1: the backbone is frozen, only the heads learn (paper, section 2.2.1). One process, or one of several.

A step: the backbone's hidden states without gradient, the heads' chunked loss divided by the *global* number of
labels, so that any number of workers gives the same trajectory, then clipped AdamW. Numbers stay on the device; the
host reads them only when a record is taken or a state is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medusa.heads import MedusaHeads
from medusa.model import Backbone
from medusa.training.batch import Batch, EpochSampler, Row, collate, fit_rows
from medusa.training.hidden import CachedHidden, ComputedHidden
from medusa.training.loss import HeadsLoss, HeadTotals, count_covered, head_weights
from medusa.training.schedule import TrainerConfig, learning_rate
from medusa.training.state import read_state, write_state


class NonFiniteLossError(ArithmeticError):
    """A head's loss became NaN or infinite; the message names the step (1-based) and the heads."""

    def __init__(self, step: int, heads: Sequence[int]) -> None:
        self.step, self.heads = step, tuple(heads)
        super().__init__(
            f"loss of head {', '.join(map(str, heads))} is not finite at step {step}; nothing was saved since. "
            "Lower the learning rate or look at the rows of that step"
        )


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step over all workers; tensors are on the device until read. `step` counts done steps."""

    step: int
    learning_rate: float
    tokens: int
    totals: HeadTotals
    loss: Tensor
    grad_norm: Tensor


class Trainer:
    """Trains `heads` in place on rows cut to `max_length`.

    `wrap` turns the loss module into its distributed twin (DistributedDataParallel), given with `rank` and
    `world_size`; it must average gradients over workers, as DDP does.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: MedusaHeads,
        rows: Iterable[Row],
        config: TrainerConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.rows, self.row_counts = fit_rows(rows, config.max_length)
        if not self.rows:
            raise ValueError(f"none of {self.row_counts.read} rows carries a label; replies need two tokens or more")
        self.sampler = _sampler(self.rows, config, rank, world_size)
        self.total_steps = config.total_steps(self.sampler.steps_per_epoch)
        self.heads = heads.to(backbone.device, torch.promote_types(backbone.dtype, torch.float32)).train()
        self.step = 0
        self.tokens_seen = 0
        self._device = backbone.device
        self._compute_dtype = torch.bfloat16 if backbone.dtype.itemsize == 2 else backbone.dtype
        self._hidden = _hidden_source(backbone, self.rows, config)
        self._loss = wrap(HeadsLoss(heads, backbone.lm_head_weight, backbone.cap, config.chunk_size))
        self._optimizer = torch.optim.AdamW(
            heads.parameters(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        weights = head_weights(heads.config.num_heads, config.head_decay)
        self._weights_K = torch.tensor(weights, dtype=torch.float64, device=self._device)
        self._window = HeadTotals.zeros(heads.config.num_heads, self._device)
        self._first_bad_step_K = torch.zeros(heads.config.num_heads, dtype=torch.long, device=self._device)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def next_batches(self) -> list[Batch]:
        """This worker's micro-batches of the next step; at least one, if only of padding."""
        indices = self.sampler(self.step)
        size = self.config.micro_batch_size or max(len(indices), 1)
        parts = [indices[start : start + size] for start in range(0, max(len(indices), 1), size)]
        return [collate(self.rows, part, self.heads.config.num_heads).to(self._device) for part in parts]

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        """One optimiser step over the micro-batches of all workers."""
        covered_K = self._global_sum(torch.stack([count_covered(self.heads, b.labels_NK) for b in batches]).sum(0))
        local = HeadTotals.zeros(len(self._weights_K), self._device)
        for index, batch in enumerate(batches):
            with self._gradients_meet(last=index == len(batches) - 1):
                local += self._backward(batch, covered_K)
        totals = HeadTotals(self._global_sum(local.values_MK))
        self._note_non_finite(totals)
        grad_norm, rate = self._update()
        self._window += totals
        tokens = sum(len(self.rows[index]) for index in self.sampler.global_rows(self.step))
        self.step += 1
        self.tokens_seen += tokens
        return StepMetrics(self.step, rate, tokens, totals, self._objective(totals), grad_norm)

    def take_record(self, metrics: StepMetrics) -> dict[str, float]:
        """Plain numbers of the steps since the last record (`metrics` being the last of them); waits for the device."""
        self.check_finite()
        window = self._window
        record = {
            "step": metrics.step,
            "loss": float(self._objective(window)),
            "learning_rate": metrics.learning_rate,
            "grad_norm": float(metrics.grad_norm),
            "tokens_seen": self.tokens_seen,
        }
        for name in ("loss", "top1_accuracy", "top5_accuracy", "coverage"):
            values = getattr(window, "mean_loss_K" if name == "loss" else f"{name}_K").tolist()
            record |= {f"head_{k}/{name}": value for k, value in enumerate(values)}
        self._window = HeadTotals.zeros(len(self._weights_K), self._device)
        return record

    def check_finite(self) -> None:
        """Raises NonFiniteLossError if any step so far had a loss that is not finite."""
        bad = {k: step for k, step in enumerate(self._first_bad_step_K.tolist()) if step}
        if bad:
            first = min(bad.values())
            raise NonFiniteLossError(first, [k for k, step in bad.items() if step == first])

    def state_dict(self) -> dict[str, Any]:
        """All that a later process needs to go on with the same numbers: flat, tensors and JSON values."""
        self.check_finite()
        state: dict[str, Any] = {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "sampler": self._sampler_identity(),
            "window": self._window.values_MK,
            "rng.cpu": torch.get_rng_state(),
        }
        if self._device.type == "cuda":
            state["rng.cuda"] = torch.cuda.get_rng_state(self._device)
        state |= {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        return state | self._optimizer_state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; any number of workers, the same rows and batches."""
        if state["sampler"] != self._sampler_identity():
            raise ValueError(
                f"this state was saved over {state['sampler']}, the trainer has {self._sampler_identity()}; "
                "resume with the same rows, batch size and seed, or start anew"
            )
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self._window = HeadTotals(state["window"].to(self._device))
        self.heads.load_state_dict(_below(state, "heads."))
        self._load_optimizer_state(_below(state, "optimizer."))
        torch.set_rng_state(state["rng.cpu"])
        if self._device.type == "cuda" and "rng.cuda" in state:
            torch.cuda.set_rng_state(state["rng.cuda"], self._device)

    def save_state(self, directory: Path) -> None:
        """Writes `state_dict` as a new folder, atomically, as safetensors and JSON."""
        write_state(directory, self.state_dict())

    def load_state(self, directory: Path) -> None:
        self.load_state_dict(read_state(directory))

    def _backward(self, batch: Batch, covered_K: Tensor) -> HeadTotals:
        hidden_Nd = self._hidden(batch).to(self._compute_dtype)
        half = self._compute_dtype == torch.bfloat16
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half):
            totals = HeadTotals(self._loss(hidden_Nd, batch.labels_NK))
        # DDP averages gradients over the workers, each of which divides by the global count: undo the average.
        objective = (self._weights_K * totals.loss_K / covered_K.clamp_min(1)).sum() * self.sampler.world_size
        objective.backward()
        return totals.detach()

    def _update(self) -> tuple[Tensor, float]:
        rate = learning_rate(self.config, self.step, self.total_steps)
        limit = self.config.grad_clip if self.config.grad_clip is not None else float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.heads.parameters(), limit)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return grad_norm, rate

    def _note_non_finite(self, totals: HeadTotals) -> None:
        """Remembers the first bad step on the device; asking at once would make every step wait for it."""
        bad_K = ~totals.loss_K.isfinite() & (self._first_bad_step_K == 0)
        self._first_bad_step_K.masked_fill_(bad_K, self.step + 1)
        if self._device.type == "cpu":
            self.check_finite()

    def _objective(self, totals: HeadTotals) -> Tensor:
        return (self._weights_K * totals.mean_loss_K).sum()

    def _gradients_meet(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients once a step, in the backward of the last micro-batch."""
        no_sync = getattr(self._loss, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def _global_sum(self, values: Tensor) -> Tensor:
        if self.sampler.world_size > 1:
            dist.all_reduce(values)
        return values

    def _sampler_identity(self) -> dict[str, int]:
        return asdict(self.row_counts) | {
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "bucket_batches": self.config.bucket_batches,
        }

    def _optimizer_state(self) -> dict[str, Tensor]:
        of_parameter = self._optimizer.state
        return {
            f"optimizer.{name}/{key}": value
            for name, parameter in self.heads.named_parameters()
            for key, value in of_parameter.get(parameter, {}).items()
        }

    def _load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        entries = self._optimizer.state_dict()
        entries["state"] = {
            index: {key: state[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            for index, (name, _) in enumerate(self.heads.named_parameters())
            if f"{name}/step" in state
        }
        self._optimizer.load_state_dict(entries)


def _sampler(rows: Sequence[Row], config: TrainerConfig, rank: int, world_size: int) -> EpochSampler:
    return EpochSampler(
        len(rows),
        config.batch_size,
        config.seed,
        rank,
        world_size,
        lengths=[len(row) for row in rows],
        bucket_batches=config.bucket_batches,
    )


def _hidden_source(backbone: Backbone, rows: Sequence[Row], config: TrainerConfig) -> Callable[[Batch], Tensor]:
    if config.hidden_cache_gib > 0:
        return CachedHidden(backbone, rows, config.hidden_cache_gib)
    return ComputedHidden(backbone)


def _below(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
