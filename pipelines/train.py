"""The train step: draft heads on the model's own replies, by Ray Train workers, resumed where it stopped.

    <step dir>/checkpoint/     the heads (medusa/checkpoint.py), with the adapter where the backbone learnt by LoRA
    <step dir>/backbone/       Medusa-2: the model that the heads run on, merged; the later steps use it
    <step dir>/metrics.jsonl   a record every `log_every` steps: losses and accuracies by head, rate, tokens/s, system
    <step dir>/curves.png      the same drawn
    <step dir>/.ray/           Ray Train's own storage while the step runs: the trainer's states

The run's name is the step's key, so a step that is run again goes on from Ray's last checkpoint, and a changed
config can never pick up another's. With `num_workers` 0 all happens in this process, without Ray.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from medusa.tokenizer import ChatTokenizer
from medusa.training.batch import Row, fit_rows
from medusa.weights import model_directory, weights_digest
from pipelines.artifact import StepDir, StepOutput, open_step
from pipelines.curves import CURVES, draw_curves
from pipelines.distill import DATA
from pipelines.journal import RunLog
from pipelines.records import METRICS, following, read_records
from pipelines.tracking import TrackingUnavailable
from pipelines.train_config import HeadsChoice, TrainConfig
from pipelines.train_worker import (
    BACKBONE,
    CHECKPOINT,
    STATES,
    TrainJob,
    TrainOutcome,
    read_rows,
    train_here,
    train_on_ray,
)

if TYPE_CHECKING:
    from pipelines.run import RunContext

STEP_VERSION = 2
RAY = ".ray"


class TrainError(RuntimeError):
    """Training cannot go on; the message says why and what to do. What was checkpointed is kept."""


def train(
    context: RunContext,
    config: TrainConfig,
    distilled: StepOutput,
    *,
    on_step: Callable[[int], None] | None = None,
) -> StepOutput:
    """Runs the step, or what is left of it. Ray must be initialised unless `num_workers` is 0.

    `on_step` is called in every worker with the number of steps done. TrainError when the run cannot be ended.
    """
    directory = model_directory(context.model.backbone)
    inputs = {
        "distill": distilled.digest,
        "backbone": weights_digest(directory),
        "dtype": str(context.model.dtype),
    }
    with (
        open_step(context.root, "train", STEP_VERSION, config.meaning, inputs) as step,
        context.tracker.step(step) as log,
    ):
        if step.complete:
            return step.output
        log.log_params(config.recipe)
        log.log_dataset("distilled", distilled.digest, str(distilled.path))
        rows, counts = _fitted_rows(distilled.path / DATA, config)
        tokenizer = ChatTokenizer.from_pretrained(directory)
        job = TrainJob(
            backbone=_as_seen_by_workers(context.model.backbone),
            dtype=context.model.dtype,
            tokenizer_digest=tokenizer.digest,
            table=distilled.path / DATA,
            step_folder=step.path,
            config=config,
            use_gpu=_uses_gpu(config),
            token_map=_token_map(config.heads, rows, tokenizer.eos_token_ids),
            training=_provenance(context, config, distilled, log),
            log=log,
            on_step=on_step,
        )
        total_steps = config.trainer.total_steps(-(-len(rows) // config.trainer.batch_size))
        with context.bar("train", total_steps) as advance, following(step.path / METRICS, advance):
            outcome = train_here(job) if config.num_workers == 0 else _fit(job)
        if outcome.failure is not None:
            raise TrainError(outcome.failure)
        draw_curves(read_records(step.path / METRICS), step.path / CURVES)
        output = _commit(step, outcome, counts)
        log.log_artifact(step.path / CHECKPOINT, CHECKPOINT)
        log.log_artifact(step.path / CURVES)
        for folder in (RAY, STATES):
            shutil.rmtree(step.path / folder, ignore_errors=True)
        return output


def _fitted_rows(table: Path, config: TrainConfig) -> tuple[list[Row], dict[str, int]]:
    """The rows as the workers will train on them, and what became of all rows of the table."""
    read, held_back = read_rows(table, config.validation_fraction)
    rows, counts = fit_rows(read, config.trainer.max_length)
    if not rows:
        raise TrainError(
            f"{table} gives nothing to learn: {len(held_back)} rows kept back (validation_fraction "
            f"{config.validation_fraction}), {counts.without_labels} without a label within max_length "
            f"{config.trainer.max_length}; distil more or longer replies"
        )
    return rows, {**asdict(counts), "held_back": len(held_back)}


def _as_seen_by_workers(backbone: str) -> str:
    """Workers have a working directory of their own; a hub id is the same everywhere."""
    return str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone


def frequent_reply_tokens(rows: Sequence[Row], size: int, always: Sequence[int] = ()) -> tuple[int, ...]:
    """The `size` tokens that replies use most, `always` among them, as ascending ids; ties go to lower ids."""
    replies = torch.cat([row.token_ids[row.prompt_length :] for row in rows])
    counts_V = torch.bincount(replies, minlength=max(size, *always, 0) + 1)
    counts_V[list(always)] = len(replies) + 1
    return tuple(sorted(counts_V.argsort(descending=True, stable=True)[:size].tolist()))


def _token_map(heads: HeadsChoice, rows: Sequence[Row], eos: frozenset[int]) -> tuple[int, ...] | None:
    if heads.truncated_vocab_size is None:
        return None
    return frequent_reply_tokens(rows, heads.truncated_vocab_size, sorted(eos))


def _fit(job: TrainJob) -> TrainOutcome:
    config = job.config
    trainer = TorchTrainer(
        train_on_ray,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers),
            use_gpu=job.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if job.use_gpu else {}),
        ),
        run_config=RunConfig(
            name=job.step_folder.name,
            storage_path=str(job.step_folder / RAY),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    try:
        outcome: TrainOutcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise TrainError(
            f"training failed more than max_failures={config.max_failures} times; run the same command again to go "
            f"on from the last checkpoint. {error}"
        ) from error
    return outcome


def _uses_gpu(config: TrainConfig) -> bool:
    if config.use_gpu is not None:
        return config.use_gpu
    if config.num_workers == 0:
        return torch.cuda.is_available()
    return bool(ray.cluster_resources().get("GPU", 0) >= (config.min_workers or config.num_workers))


def _provenance(context: RunContext, config: TrainConfig, distilled: StepOutput, log: RunLog) -> dict[str, Any]:
    try:
        mlflow_run = context.tracker.run_id(log)
    except TrackingUnavailable:  # lost during the run: what is logged waits on disk, training goes on
        mlflow_run = ""
    return {
        "data_digest": distilled.digest,
        "recipe": config.recipe,
        "code_version": STEP_VERSION,
        "mlflow_run": mlflow_run,
    }


def _commit(step: StepDir, outcome: TrainOutcome, counts: dict[str, int]) -> StepOutput:
    last = read_records(step.path / METRICS)[-1]
    told = {"counts": counts, "training": {**asdict(outcome), "last_record": last}}
    made = [name for name in (CHECKPOINT, METRICS, BACKBONE) if (step.path / name).exists()]
    return step.commit(told, outputs=made)


def trained_backbone(trained: StepOutput, base: str) -> str:
    """The model that the trained heads run on: the merged one of a joint training, else the base."""
    merged = trained.path / BACKBONE
    return str(merged) if merged.is_dir() else base
