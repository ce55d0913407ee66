"""What one training worker does, with Ray Train around it or without: rows -> Trainer -> records and checkpoints.

Exact resume. A checkpoint is the trainer's whole state; rows are drawn by step, not from a stream. So a worker
that starts from a checkpoint goes through the same batches with the same numbers. `metrics.jsonl` is cut back to
the checkpoint's step before it goes on: each step is there once.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from medusa.adapter import write_merged
from medusa.checkpoint import HEADS, AdapterRef, BackboneRef, CheckpointMeta, save_checkpoint
from medusa.digests import directory_digest
from medusa.model import Backbone
from medusa.training.adaptation import LoraAdaptation
from medusa.training.batch import Row, fit_rows
from medusa.training.quantisation import quantise
from medusa.training.sharding import shard
from medusa.training.totals import NonFiniteLossError
from medusa.training.trainer import Trainer
from medusa.weights import model_directory, weights_digest
from pipelines.journal import RunLog
from pipelines.records import METRICS, Recorder
from pipelines.split import is_held_back
from pipelines.train_config import TrainConfig

CHECKPOINT, BACKBONE, ADAPTER = "checkpoint", "backbone", ".adapter"
STATE, STATES = "state", ".states"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything a worker needs; plain values, as it travels to other processes."""

    backbone: str
    dtype: str | None
    tokenizer_digest: str
    table: Path
    step_folder: Path
    config: TrainConfig
    use_gpu: bool
    token_map: tuple[int, ...] | None
    training: Mapping[str, Any]
    log: RunLog
    on_step: Callable[[int], None] | None = None


@dataclass(frozen=True)
class TrainOutcome:
    """How the worker ended; `failure` is for errors that a retry from the last checkpoint would only repeat."""

    steps: int
    tokens_seen: int
    failure: str | None = None


class Checkpoints(Protocol):
    """Where a trainer's states go."""

    def restore(self, trainer: Trainer) -> None:
        """Loads the last state, if there is one."""
        ...

    def save(self, trainer: Trainer) -> None: ...


def train_on_ray(job_config: Mapping[str, Any]) -> TrainOutcome:
    """The function that Ray Train runs on each worker."""
    job: TrainJob = job_config["job"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if job.use_gpu else torch.device("cpu")
    if job.use_gpu:
        torch.cuda.set_device(device)  # where FSDP moves its shards
    else:
        torch.set_num_threads(max(int(job.config.cpus_per_worker), 1))
    wrap = shard if job.config.sharding == "fsdp" else distributed
    trainer = build_trainer(job, device, rank=rank, world_size=world_size, wrap=wrap)
    return run_training(job, trainer, RayCheckpoints(rank), leads=rank == 0)


def train_here(job: TrainJob) -> TrainOutcome:
    """The same in this process, without Ray."""
    device = torch.device("cuda" if job.use_gpu else "cpu")
    trainer = build_trainer(job, device)
    return run_training(job, trainer, FolderCheckpoints(job.step_folder / STATES), leads=True)


def build_trainer(
    job: TrainJob,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Trainer:
    """`wrap` is for several workers."""
    dtype = None if job.dtype is None else getattr(torch, job.dtype)
    wrap = wrap if world_size > 1 else lambda module: module
    backbone = Backbone.from_pretrained(job.backbone, dtype=dtype, device=loaded_on(job.config, device, wrap))
    config = job.config.heads.on(backbone.hidden_size, backbone.vocab_size)
    token_map = None if job.token_map is None else torch.tensor(job.token_map)
    heads = HEADS[job.config.heads.kind].initialised(config, backbone.lm_head_weight, token_map)
    if job.config.quantization is not None:
        quantise(backbone.model, job.config.quantization)
    rows, _ = read_rows(job.table, job.config.validation_fraction)
    return Trainer(
        backbone, heads, rows, job.config.trainer, rank=rank, world_size=world_size, wrap=wrap, device=device
    )


def loaded_on(config: TrainConfig, device: torch.device, wrap: Callable[[nn.Module], nn.Module]) -> torch.device:
    """Main memory for a backbone that is sharded, as one that learns is: a worker's GPU may not hold all of it."""
    return torch.device("cpu") if wrap is shard and config.trainer.joint is not None else device


def run_training(job: TrainJob, trainer: Trainer, checkpoints: Checkpoints, *, leads: bool) -> TrainOutcome:
    """Trains to the end from the last checkpoint. The worker that `leads` writes records and the heads."""
    config = job.config.trainer
    checkpoints.restore(trainer)
    metrics_file = job.step_folder / METRICS
    recorder = Recorder(metrics_file, job.log, trainer.step, trainer.tokens_seen) if leads else None
    validation = validation_rows(job) if job.config.validate_every else []
    try:
        while not trainer.finished:
            metrics = trainer.train_step(trainer.next_batches())
            if job.on_step is not None:
                job.on_step(metrics.step)
            if metrics.step % config.log_every == 0 or trainer.finished:
                record = trainer.take_record(metrics)
                if validation and (metrics.step % job.config.validate_every == 0 or trainer.finished):
                    measured = trainer.validate(validation)
                    record |= {f"validation/{name}": value for name, value in measured.items()}
                if recorder is not None:
                    recorder.write(record)
            if metrics.step % config.checkpoint_every == 0 or trainer.finished:
                checkpoints.save(trainer)
    except NonFiniteLossError as error:
        return TrainOutcome(trainer.step, trainer.tokens_seen, str(error))
    weights = trainer.whole_weights(keep=leads)
    if leads:
        save_heads(job, trainer, weights)
    return TrainOutcome(trainer.step, trainer.tokens_seen)


def read_rows(table: Path, held_back: float) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those that are kept back, each by (id, turn)."""
    columns = ["id", "turn", "prompt_ids", "completion_ids"]
    rows = pq.read_table(table, columns=columns).sort_by([("id", "ascending"), ("turn", "ascending")])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for id_, prompt, completion in zip(rows["id"].to_pylist(), rows["prompt_ids"], rows["completion_ids"], strict=True):
        row = Row.of(prompt.values.to_numpy(), completion.values.to_numpy())
        parts[is_held_back(id_, held_back)].append(row)
    return parts


def validation_rows(job: TrainJob) -> list[Row]:
    """Of the rows kept back, the first that fit; the same for every worker."""
    _, kept_back = read_rows(job.table, job.config.validation_fraction)
    fitting, _ = fit_rows(kept_back, job.config.trainer.max_length)
    return fitting[: job.config.validation_rows]


def save_heads(job: TrainJob, trainer: Trainer, weights: Mapping[str, Tensor]) -> None:
    """The Medusa checkpoint, in the base's dtype, and the merged backbone of a joint training; what an interrupted run
    left is replaced."""
    for folder in (CHECKPOINT, BACKBONE, ADAPTER):
        shutil.rmtree(job.step_folder / folder, ignore_errors=True)
    base_folder = model_directory(job.backbone)
    base = BackboneRef(
        name=trainer.backbone.name, weights_digest=weights_digest(base_folder), tokenizer_digest=job.tokenizer_digest
    )
    of_model = {name.removeprefix("model."): weight for name, weight in weights.items() if name.startswith("model.")}
    backbone, adapter = save_backbone(job, trainer, base_folder, base, of_model)
    training = {**job.training, "steps": trainer.step, "tokens": trainer.tokens_seen}
    meta = CheckpointMeta.of(trainer.heads, backbone, adapter=adapter, training=training)
    adapter_folder = None if adapter is None else job.step_folder / ADAPTER
    heads = trainer.trained_heads(dict(weights))
    save_checkpoint(job.step_folder / CHECKPOINT, heads, meta, adapter=adapter_folder)
    shutil.rmtree(job.step_folder / ADAPTER, ignore_errors=True)


def save_backbone(
    job: TrainJob, trainer: Trainer, base_folder: Path, base: BackboneRef, weights: Mapping[str, Tensor]
) -> tuple[BackboneRef, AdapterRef | None]:
    """What the heads run on: the base, or the model that it has become, written as a folder of its own."""
    if trainer.adaptation is None:
        return base, None
    merged = job.step_folder / BACKBONE
    if isinstance(trainer.adaptation, LoraAdaptation):
        trainer.adaptation.save(job.step_folder / ADAPTER, weights)
        digest = write_merged(base_folder, job.step_folder / ADAPTER, merged)
        adapter = AdapterRef(base=base, digest=directory_digest(job.step_folder / ADAPTER))
    else:
        others = shutil.ignore_patterns("*.safetensors", "*.bin", "*.pt", "*.pth", "README*", "*.index.json")
        shutil.copytree(base_folder, merged, ignore=others)
        trainer.adaptation.save(merged, weights)
        digest, adapter = weights_digest(merged), None
    return dataclasses.replace(base, weights_digest=digest), adapter


class RayCheckpoints:
    """States through ray.train.report, which every rank must call: Ray keeps them under the run's name. Of sharded
    workers each brings its part; Ray puts them into one checkpoint."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def restore(self, trainer: Trainer) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                trainer.load_state(Path(folder) / STATE)

    def save(self, trainer: Trainer) -> None:
        metrics = {"step": trainer.step}
        if self._rank != 0 and not trainer.sharded:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as folder:
            trainer.save_state(Path(folder) / STATE)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class FolderCheckpoints:
    """States in a folder of this machine; only the last one stays."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def restore(self, trainer: Trainer) -> None:
        states = self._states()
        if states:
            trainer.load_state(states[-1])

    def save(self, trainer: Trainer) -> None:
        older = self._states()
        trainer.save_state(self._folder / f"step-{trainer.step:09d}")
        for state in older:
            shutil.rmtree(state)

    def _states(self) -> list[Path]:
        return sorted(self._folder.glob("step-*"))


def distributed(module: nn.Module) -> nn.Module:
    return ray.train.torch.prepare_model(
        module,
        parallel_strategy="ddp",
        parallel_strategy_kwargs={"broadcast_buffers": False, "gradient_as_bucket_view": True},
    )
