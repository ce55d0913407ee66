"""One process of training, alone or one of several: Medusa-1 (only the heads learn) or Medusa-2 (the backbone too).

A step: the objective's sums over this worker's micro-batches, divided by the *global* numbers of labels, so that any
number of workers gives the same trajectory, then clipped AdamW. What is random in a step (dropout) is seeded by the
step and the worker, so a state holds no generator's. Numbers stay on the device; the host reads them only when a
record is taken or a state is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medusa.heads import DraftHeads
from medusa.model import Backbone
from medusa.training.adaptation import Adaptation, adapt
from medusa.training.batch import Batch, EpochSampler, Row, collate, fit_rows
from medusa.training.fused import choose_cross_entropy
from medusa.training.hidden import RememberedHidden, check_packing, forward
from medusa.training.loss import HeadTotals, count_covered, head_weights
from medusa.training.objective import HeadsObjective, JointObjective, Sums
from medusa.training.optimiser import Optimiser, named_groups
from medusa.training.resume import Progress, load_training, save_training
from medusa.training.schedule import TrainerConfig, heads_weight, learning_rate
from medusa.training.sharding import is_sharded, whole
from medusa.training.state import below
from medusa.training.totals import NonFiniteWatch, StepMetrics, Totals


class Trainer:
    """Trains `heads` in place, and with a joint configuration the backbone too, on rows cut to `max_length`.

    `wrap` turns the objective into its distributed twin (DistributedDataParallel, FSDP), given with `rank` and
    `world_size`; it must average gradients over workers, as both do. `device` is where it leaves the weights, if
    not where the backbone is: one that is sharded from main memory need not fit a GPU.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: DraftHeads,
        rows: Iterable[Row],
        config: TrainerConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        device: torch.device | None = None,
    ) -> None:
        self.config = config
        self.backbone = backbone
        self.rows, self.row_counts = fit_rows(rows, config.max_length)
        if not self.rows:
            raise ValueError(f"none of {self.row_counts.read} rows carries a label; replies need two tokens or more")
        self.sampler = _sampler(self.rows, config, rank, world_size)
        self.total_steps = config.total_steps(self.sampler.steps_per_epoch)
        self.heads = heads.to(backbone.device, torch.promote_types(backbone.dtype, torch.float32)).train()
        self._device = device or backbone.device
        self._base_dtype = backbone.dtype
        self._half = backbone.dtype.itemsize == 2
        if config.packing:
            check_packing(backbone)
        self.adaptation: Adaptation | None = None if config.joint is None else adapt(backbone, config)
        self.fused = choose_cross_entropy(config.cross_entropy, backbone, self._device)
        self._loss = wrap(self._objective_module())
        model = None if self.adaptation is None else backbone.model
        self._optimiser = Optimiser(named_groups(heads, model, config), config)
        if self.sharded and config.optimizer != "adamw":
            raise ValueError(f"optimizer {config.optimizer} keeps moments that cannot be sharded; use adamw with FSDP")
        self.memory = self._make_memory() if config.hidden_cache_gib else None
        weights = head_weights(heads.config.num_heads, config.head_decay)
        self._weights_K = torch.tensor(weights, dtype=torch.float64, device=self._device)
        self.progress = Progress(self.row_counts, config, heads.config.num_heads, self._device)
        self._watch = NonFiniteWatch(heads.config.num_heads, self._device)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.progress.step

    @property
    def tokens_seen(self) -> int:
        """Of all workers, in those steps."""
        return self.progress.tokens_seen

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def heads_only(self) -> bool:
        """Whether the backbone rests in the next step: always in Medusa-1, in Medusa-2 during a first stage."""
        return self.step < self.config.heads_only_steps(self.total_steps)

    def next_batches(self) -> list[Batch]:
        """This worker's micro-batches of the next step; at least one, if only of padding."""
        return self._batches(self.rows, self.sampler(self.step))

    def train_step(self, batches: Sequence[Batch]) -> StepMetrics:
        """One optimiser step over the micro-batches of all workers."""
        weight = heads_weight(self.config, self.step, self.total_steps)
        counts = self._global_sum(torch.stack([self._counts(batch) for batch in batches]).sum(0))
        local = Totals.zeros(len(self._weights_K), self._device)
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            torch.manual_seed((self.config.seed * 1_000_003 + self.step) * 65_537 + self.sampler.rank)
            for index, batch in enumerate(batches):
                with self._gradients_meet(last=index == len(batches) - 1):
                    local += self._backward(batch, counts, weight)
        totals = self._over_workers(local)
        self._watch.note(totals, self.step + 1)
        rate = learning_rate(self.config, self.step, self.total_steps)
        grad_norm = self._update(rate)
        tokens = sum(len(self.rows[index]) for index in self.sampler.global_rows(self.step))
        self.progress.advance(totals, tokens)
        return StepMetrics(self.step, rate, weight, tokens, totals, self._objective(totals, weight), grad_norm)

    def take_record(self, metrics: StepMetrics) -> dict[str, float]:
        """Plain numbers of the steps since the last record (`metrics` being the last of them); waits for the device."""
        self._watch.check()
        window = self.progress.take_window()
        record = {
            "step": metrics.step,
            "loss": float(self._objective(window, metrics.heads_weight)),
            "learning_rate": metrics.learning_rate,
            "heads_weight": metrics.heads_weight,
            "grad_norm": float(metrics.grad_norm),
            "tokens_seen": self.tokens_seen,
        }
        return record | window.record()

    @torch.no_grad()
    def validate(self, rows: Sequence[Row]) -> dict[str, float]:
        """The record of rows that are not trained on, as they stand now; every worker calls it with the same rows."""
        size = self.config.micro_batch_size or self.config.batch_size
        by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        totals = Totals.zeros(len(self._weights_K), self._device)
        share = size * self.sampler.world_size
        for start in range(0, len(rows), share):  # as many forwards on each worker, since sharded ones are collective
            mine = by_length[start : start + share][self.sampler.rank :: self.sampler.world_size]
            for batch in self._batches(rows, mine):
                with self._autocast():
                    totals += Totals.of(self._loss(batch, self.heads_only))
        totals = self._over_workers(totals)
        weight = heads_weight(self.config, max(self.step - 1, 0), self.total_steps)
        return {"loss": float(self._objective(totals, weight))} | totals.record()

    def save_state(self, directory: Path) -> None:
        """Writes all that a later process needs to go on with the same numbers, as a new folder; every worker calls it
        where they are sharded. Raises NonFiniteLossError rather than save what a loss that was not finite has spoilt.
        """
        self._watch.check()
        save_training(directory, self.progress, self.heads, self._optimiser, leads=self.sampler.rank == 0)

    def load_state(self, directory: Path) -> None:
        """Goes on where a state was saved; any number of workers, the same rows and batches."""
        load_training(directory, self.progress, self._optimiser)

    @property
    def sharded(self) -> bool:
        """Whether this worker holds only its part of what learns."""
        return is_sharded(self._optimiser.parameters)

    def whole_weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """What learns, by name, in main memory. Every worker must call it where they are sharded; those that do not
        `keep` get nothing."""
        kept = {}
        for name, parameter in self._optimiser.parameters.items():
            gathered = whole(parameter.detach())
            if keep:
                kept[name] = gathered.cpu()
        return kept

    def trained_heads(self, weights: dict[str, Tensor]) -> DraftHeads:
        """The heads of `whole_weights` as a module of their own, in the type that they are served in."""
        token_map = self.heads.token_map.cpu() if self.heads.config.vocabulary == "truncated" else None
        heads = type(self.heads)(self.heads.config, token_map)
        heads.load_state_dict(below(weights, "heads."), strict=False)
        return heads.to(self.served_dtype)

    @property
    def served_dtype(self) -> torch.dtype:
        """What heads and backbone are saved in: the backbone's type as it was loaded."""
        return self._base_dtype

    @property
    def optimiser(self) -> Optimiser:
        return self._optimiser

    def _objective_module(self) -> nn.Module:
        if self.adaptation is not None:
            return JointObjective(self.adaptation, self.heads, self.config, self.fused)
        return HeadsObjective(self.backbone, self.heads, self.config, self.fused)

    def _make_memory(self) -> RememberedHidden:
        """Of the base model's hidden states; not a sharded one's, since workers lack rows at different times."""
        if self.adaptation is not None and self.sharded:
            raise ValueError(
                f"hidden_cache_gib is {self.config.hidden_cache_gib:g}, but a sharded model runs on all workers at "
                "once, not where one of them lacks a row; set it to 0, or sharding to ddp"
            )
        return RememberedHidden(
            self._base_hidden,
            self.rows,
            self.heads.config.num_heads,
            self.backbone.hidden_size * self._base_dtype.itemsize,
            limit_gib=self.config.hidden_cache_gib,
            home=self._device if self.config.hidden_cache_on == "device" else torch.device("cpu"),
            device=self._device,
            packed=self.config.packing,
            with_tokens=self.adaptation is not None,
        )

    def _base_hidden(self, batch: Batch) -> Tensor:
        with self._autocast():
            hidden = forward(self.backbone, batch) if self.adaptation is None else self.adaptation.teacher(batch)[0]
        return hidden.to(torch.bfloat16) if self._half else hidden

    def _batches(self, rows: Sequence[Row], indices: Sequence[int]) -> list[Batch]:
        size = self.config.micro_batch_size or max(len(indices), 1)
        parts = [indices[start : start + size] for start in range(0, max(len(indices), 1), size)]
        if self.memory is not None and rows is self.rows:
            return [self.memory.batch(part) for part in parts]
        num_heads = self.heads.config.num_heads
        return [collate(rows, part, num_heads, packed=self.config.packing).to(self._device) for part in parts]

    def _counts(self, batch: Batch) -> Tensor:
        """What the sums are divided by: labels of each head, then of the language model."""
        covered_K = count_covered(self.heads, batch.labels_NK, self.config.heads_loss)
        return torch.cat([covered_K, covered_K.new_tensor([len(batch.next_N)])])

    def _backward(self, batch: Batch, counts: Tensor, weight: float) -> Totals:
        with self._autocast():
            sums: Sums = self._loss(batch, self.heads_only)
        divisors = counts.clamp_min(1)
        objective = weight * (self._weights_K * sums.heads_MK[0] / divisors[:-1]).sum() + sums.lm_L[0] / divisors[-1]
        if self.heads_only and self.adaptation is not None and self.sampler.world_size > 1 and not self.sharded:
            objective = objective + self._idle_backbone()
        # DDP averages gradients over the workers, each of which divides by the global count: undo the average.
        (objective * self.sampler.world_size).backward()
        return Totals.of(sums)

    def _idle_backbone(self) -> Tensor:
        """Nothing, from every parameter that rests in the first stage: DDP waits for a gradient of each."""
        idle = [p for name, p in self._optimiser.parameters.items() if name.startswith("model.")]
        return torch.stack([parameter.sum() for parameter in idle]).sum() * 0.0

    def _update(self, rate: float) -> Tensor:
        parameters = self._optimiser.parameters
        if self.heads_only:
            for name, parameter in parameters.items():
                if name.startswith("model."):
                    parameter.grad = None
        limit = self.config.grad_clip if self.config.grad_clip is not None else float("inf")
        grad_norm = whole(nn.utils.clip_grad_norm_(list(parameters.values()), limit))
        self._optimiser.step(rate)
        return grad_norm

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._half)

    def _objective(self, totals: Totals, weight: float) -> Tensor:
        lm = totals.lm_L[0] / totals.lm_L[-1].clamp_min(1)
        return weight * (self._weights_K * totals.heads.mean_loss_K).sum() + lm

    def _gradients_meet(self, last: bool) -> AbstractContextManager[None]:
        """Workers exchange gradients once a step, in the backward of the last micro-batch."""
        no_sync = getattr(self._loss, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def _over_workers(self, totals: Totals) -> Totals:
        return Totals(HeadTotals(self._global_sum(totals.heads.values_MK)), self._global_sum(totals.lm_L))

    def _global_sum(self, values: Tensor) -> Tensor:
        if self.sampler.world_size > 1:
            dist.all_reduce(values)
        return values


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
